"""Recipes: each a function returning the RunConfig of one whole run. Its docstring says command, cost and expected
metric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kmtr.config import Align, Data, Evaluate, Masked, Model, RunConfig, Sampling, Shards, Simulate, Task, Train


def tiny() -> RunConfig:
    """``python jobs/pretrain.py tiny``: 0.4 M parameters, 10 minutes on two cores; probe of LVEF: R2 0.68 at R = 8."""
    return RunConfig(
        recipe="tiny",
        data=Data(
            root="runs/tiny",
            views=("sax", "lax_2ch", "lax_4ch"),
            sax_slices=2,
            frames=8,
            matrix=(64, 64),
            global_batch=32,
        ),
        sampling=Sampling(accelerations=(4, 8, 16), acs_lines=2),
        model=Model(
            width=96,
            depth=2,
            head_width=32,
            mlp_ratio=2,
            decoder_width=96,
            decoder_depth=1,
            patch=(2, 16, 16),
            readout_fraction=0.5,
            centre=16,
            projection=64,
        ),
        masked=Masked(steps=1200, mask_ratio=0.5, target_lines=0.3, image_weight=0.0),
        align=Align(steps=200, teacher="components", learning_rate=5e-4, head_steps=40, head_factor=4.0),
        # 2 frames of 8, which are much alike: more subjects in the same time. Its small decoders learn best at 6e-3.
        task=Task(frames=2, decoder_factor=12.0),
        train=Train(workers=2, zero_stage=2, checkpoint_every=150, eval_every=150),
        simulate=Simulate(subjects=1600, difficulty="easy"),
        evaluate=Evaluate(accelerations=(4, 8, 16), labels=800, subjects=320),
    )


def base() -> RunConfig:
    """``python jobs/pretrain.py base data.root=...``: 92 M parameters, one GPU; cost and metric not measured yet.

    The mask ratio of ViTa (.7) and the paper's image encoder as teacher; `tiny` does better with .5 and components
    (RESULTS.md of studies), which nobody has tried at this size.
    """
    return RunConfig(
        recipe="base",
        data=Data(root="runs/base"),
        shards=Shards(rows=32),  # of 14.7 MB: files of half a GB, footers of 0.1 MB
        model=Model(width=768, depth=5, centre=16),
        task=Task(steps=5_000, warmup_steps=100),  # tiny's 400 are too few for masks (RESULTS.md of studies)
        train=Train(zero_stage=1, bf16=True, accumulation=4),  # 64 subjects at once need 87 GiB of activations
    )


def large() -> RunConfig:
    """``python jobs/pretrain.py large train.workers=8``: 586 M parameters, ZeRO-1 on GPUs; not measured yet."""
    return RunConfig(
        recipe="large",
        data=Data(root="runs/large", global_batch=256),
        shards=Shards(rows=32),
        model=Model(width=1024, depth=21, decoder_width=512, decoder_depth=4, centre=16),
        masked=Masked(steps=60_000, learning_rate=5e-4, warmup_steps=1000),
        task=Task(steps=5_000, warmup_steps=100),
        train=Train(workers=8, zero_stage=1, bf16=True, accumulation=4, checkpoint_every=500, eval_every=500),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {"tiny": tiny, "base": base, "large": large}

KINDS = {
    "study": {"labels": "tiny", "ablation": "tiny", "tasks": "tiny", "systems": "tiny"},
    "export": {"nnunet": "tiny"},
    "bench": {"data": "base", "step": "tiny", "tracking": "tiny", "search": "tiny"},
}
"""Commands whose first word is what to do -> what it may be -> recipe where none is given."""

WITHOUT = ("ingest", "predict")
"""Commands that take no recipe: their settings come from a source or from a model."""


def named(command: str, words: Sequence[str]) -> str:
    """Recipe of a command as it is typed, else its default one; empty: it has none, and all settings their defaults."""
    if command in WITHOUT:
        return ""
    kinds = KINDS.get(command, {})
    default = next((kinds[word] for word in words if word in kinds), next(iter(kinds.values()), ""))
    return next((word for word in words if word in RECIPES), default)
