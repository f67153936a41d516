"""bench.py step: FLOPs are what is computed, the reference is what it claims, the clock loses nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from inside import prepared, shown
from torch import Tensor

from jobs import bench
from kmtr.bench import flops as bench_flops
from kmtr.bench import reference as bench_reference
from kmtr.bench import step as bench_step
from kmtr.bench.parts import PARTS, Clock, OnTheClock, watched
from kmtr.bench.reference import Padded, Positions, Reference
from kmtr.bench.step_worker import Worker
from kmtr.config import RunConfig, override
from kmtr.config.recipes import RECIPES
from kmtr.data.loader.batch import Batch
from kmtr.tasks import STAGES, Inputs, Model, Preparer, accumulate
from kmtr.types import InputError

CPU = torch.device("cpu")
Tables = dict[str, Tensor]


class Alone:
    """An engine of one process that collects gradients."""

    def __init__(self, module: torch.nn.Module):
        self.wrapped = self.module = module

    def __call__(self, inputs: Inputs, predict: bool = False) -> dict[str, dict[str, Tensor]]:
        out: dict[str, dict[str, Tensor]] = self.module(inputs, predict)
        return out

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, rates: Mapping[str, float]) -> bool:
        return True


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["step", "huge"], "recipe: expected one of tiny, base, large, got 'huge'"),
        (["step", "bench.folder=s3://bucket/bench"], "bench.folder: expected a local folder"),
        (["step", "bench.lines=100"], "bench.lines: expected at least the 128 lines of one slice, got 100"),
        (["step", "bench.pairs=1"], "bench.pairs"),
        (
            ["step", "model.width=32", "model.depth=1", "model.decoder_width=32", "masked.image_weight=1"],
            "heads of 205 channels",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(InputError) as error:
        bench.run([*words, *([] if words[1] == "huge" else ["train.device=cpu"])])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_missing_is_refused() -> None:
    with pytest.raises(InputError, match=r"train\.device: expected a GPU"):
        bench.run(["step", "train.device=cuda"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_size_for_a_cpu(recipe: str) -> None:
    config = RECIPES[recipe]()
    assert bench_step.fitting(config, 0) == config
    data = bench_step.fitting(config, 2000).data
    assert 1000 < data.slices * data.frames * data.matrix[0] <= 2000
    assert data.matrix == config.data.matrix


# ------------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("masked", {}),
        ("masked", {"model.depth": 2, "model.decoder_depth": 2, "model.mlp_ratio": 4}),
        ("masked", {"masked.image_weight": 0.0, "model.line_parts": "whole"}),
        ("masked", {"model.encoder_inputs": "zerofilled"}),
        ("align", {"model.encoder_inputs": "both"}),
        ("align", {}),
        ("align", {"align.train_image_encoder": True}),
        ("align", {"align.masked_weight": 0.0}),
    ],
)
def test_the_formula_is_what_is_computed(
    small: RunConfig, tables: Tables, batch: Batch, stage: str, changes: dict[str, Any]
) -> None:
    config = override(small, changes)
    counted, formula = bench_flops.counted(config, stage, batch, tables)
    assert counted == formula > 0


def test_what_is_computed_is_what_the_batch_holds(small: RunConfig, tables: Tables, batch: Batch) -> None:
    config = override(small, {"align.train_image_encoder": True})  # so that all kinds of tokens are there
    inputs = prepared(Preparer(config, tables, CPU), batch, "align")
    counts = bench_flops.useful(batch, config)
    assert counts == bench_flops.executed(inputs, config), "nothing is computed on padding"
    assert len({n.visible for n in counts}) > 1
    assert all(n.visible + n.targets == n.sampled for n in counts)
    assert all(n.visible_patches + n.hidden_patches == n.patches for n in counts)


# --------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_reference_has_our_parameters(recipe: str) -> None:
    config = RECIPES[recipe]()
    with torch.device("meta"):
        reference = Reference(config, "all", bench_reference.widening_of(config))
    assert bench_reference.count(reference) == pytest.approx(bench_reference.our_parameters(config), rel=0.05)
    maps = reference.get_submodule("systems.kspace.blocks.0.attention.qkv").get_parameter("weight")
    assert len(maps) % (3 * 205) == 0


def test_materialised_attention_is_attention() -> None:
    torch.manual_seed(0)
    attention = bench_reference.Attention(2 * 205)
    x, padded = torch.randn(2, 7, 410), torch.zeros(2, 7, dtype=torch.bool)
    padded[1, 4:] = True
    q, k, v = attention.qkv(x).unflatten(-1, (3, 2, 205)).permute(2, 0, 3, 1, 4)
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=~padded[:, None, None])
    torch.testing.assert_close(attention(x, padded), attention.out(fused.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("positions", ["all", "acquired"])
def test_the_reference_predicts_targets_from_visible_tokens(
    small: RunConfig, tables: Tables, batch: Batch, positions: Positions
) -> None:
    torch.manual_seed(0)
    model = Reference(small, positions, 1.0).systems["kspace"]
    torch.nn.init.normal_(model.mask_token)
    inputs = shown(prepared(Preparer(small, tables, CPU), batch, "masked"))
    seen, targets = Padded.of(inputs.lines), Padded.of(inputs.line_targets)
    assert torch.equal(seen.values[~seen.padded], inputs.lines.values)

    def predict(visible: Padded, index: Tensor = targets.index) -> Tensor:
        asked = Padded(targets.values, index, targets.padded)
        return model.decode(model.encode(visible), visible, asked, positions)

    with torch.no_grad():
        there = predict(seen)
        assert there.shape == targets.values.shape
        noise = torch.where(seen.padded[..., None], torch.randn_like(seen.values), seen.values)
        torch.testing.assert_close(
            predict(Padded(noise, seen.index, seen.padded)), there, msg="padding is not looked at"
        )
        assert (predict(Padded(seen.values + 1, seen.index, seen.padded)) - there).abs().max() > 1e-4
        swapped = predict(seen, targets.index[:, [1, 0, *range(2, targets.index.shape[1])]])
        real = ~targets.padded[:, 1]
        torch.testing.assert_close(swapped[real, 0], there[real, 1], msg="a prediction belongs to its position")


@pytest.mark.parametrize("stage", ["masked", "align"])
@pytest.mark.parametrize("positions", ["all", "acquired"])
def test_the_reference_minimises_the_same_terms(
    small: RunConfig, tables: Tables, batch: Batch, stage: str, positions: Positions
) -> None:
    prepare = Preparer(small, tables, CPU)
    reference, ours = Reference(small, positions, 1.0), Model(small)
    theirs = accumulate(Alone(reference), [batch], prepare, STAGES[stage](small))
    wanted = accumulate(Alone(ours), [batch], prepare, STAGES[stage](small))
    assert theirs.sums.keys() == wanted.sums.keys()
    assert {k: float(v) for k, v in theirs.counts.items()} == {k: float(v) for k, v in wanted.counts.items()}
    trained = {name.split(".")[1] for name, p in reference.named_parameters() if p.grad is not None}
    assert trained == ({"kspace", "image"} if stage == "masked" else {"kspace", "align"})


# ------------------------------------------------------------------------------------------------------------- clock


@pytest.mark.parametrize("stage", ["masked", "align"])
def test_the_clock_loses_nothing_and_changes_nothing(
    small: RunConfig, tables: Tables, batch: Batch, stage: str
) -> None:
    prepare = Preparer(small, tables, CPU)

    def gradients(step: Callable[[Model], object]) -> list[Tensor | None]:
        torch.manual_seed(0)
        module = Model(small)
        step(module)
        return [p.grad for p in module.parameters()]

    plain = gradients(lambda module: accumulate(Alone(module), [batch], prepare, STAGES[stage](small)))
    clock = Clock(CPU)
    moments: list[float] = []

    def now() -> None:
        moments.append(time.perf_counter())

    def step(module: Model) -> None:
        engine = OnTheClock(Alone(module), clock)
        with watched(clock, module):
            now()
            clock.start()
            now()
            accumulate(engine, [batch], prepare, STAGES[stage](small))
            engine.update({})
            now()
            clock("rest")
            now()

    timed = gradients(step)
    for a, b in zip(plain, timed, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    around, began, ended, afterwards = moments
    assert ended - began <= sum(clock.seconds.values()) <= afterwards - around
    busy = {part for part, seconds in clock.seconds.items() if seconds > 0}
    assert busy >= {"encoders", "decoders", "rest"} | ({"contrastive"} if stage == "align" else set())
    assert "communication" not in busy, "one process, no collectives"
    assert clock.seconds.keys() == PARTS.keys()


def test_collectives_are_on_the_clock_and_work_afterwards(small: RunConfig, tmp_path: Path) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        clock, x, parts = Clock(CPU), torch.ones(3), [torch.zeros(3)]
        with watched(clock, Model(small)):
            dist.all_reduce(x)
            dist.all_gather(parts, x)
            dist.barrier()
        inside = clock.seconds["communication"]
        assert inside > 0
        assert clock.part == "rest"
        dist.all_gather(parts, 2 * x)
        assert parts[0].tolist() == [2.0, 2.0, 2.0]
        assert clock.seconds["communication"] == inside
    finally:
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------------------- step


SHARE = {"stage": "masked", "data.global_batch": 4}
"""One process's share of a batch: too few subjects for a run that aligns."""


@pytest.mark.parametrize(("stage", "share"), [("masked", {}), ("align", {}), ("masked", SHARE), ("align", SHARE)])
def test_a_measured_step_is_that_of_training(
    small: RunConfig, tables: Tables, tmp_path: Path, stage: str, share: dict[str, object]
) -> None:
    changes = {"masked.image_weight": 0.0, "align.head_steps": 1, "train.workers": 1}
    config = override(small, changes | share)
    asked, seen, parts = [], [], []

    class Engine(Alone):
        def __call__(self, inputs: Inputs, predict: bool = False) -> dict[str, dict[str, Tensor]]:
            asked.append(set(inputs.tasks))
            return super().__call__(inputs, predict)

        def update(self, rates: Mapping[str, float]) -> bool:
            seen.append(rates)
            return True

    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        worker = Worker(config, tables, (stage,), 0, 1, CPU, print)
        host = next(worker.batches(worker.config))
        worker.step(Engine(worker.model()), host, stage, worker.config, parts.append)
    finally:
        dist.destroy_process_group()
    assert asked == [set(STAGES[stage](config).tasks)]
    assert parts[:2] == ["patterns + FFT", "patterns + FFT"], "the copy to the device, which knows the readout"
    (rates,) = seen
    assert 0 < rates["kspace"] <= 1e-7
    assert rates["heads.align"] > 0


# ------------------------------------------------------------------------------------------------------------- whole


def test_a_ratio_is_that_of_medians_with_its_interval() -> None:
    found = bench_step.ratio([2.0, 2.0, 2.0, 50.0], [1.0, 1.0, 1.0, 1.0], scale=3.0)
    assert found["ratio"] == 6.0
    low, high = found["interval"]
    assert low == 6.0 < high
    times = torch.rand(40, generator=torch.Generator().manual_seed(0)) + 1
    same = bench_step.ratio(times.tolist(), times.tolist())
    assert same == {"ratio": 1.0, "interval": [1.0, 1.0]}, "turns are drawn as pairs"


@pytest.mark.full
@pytest.mark.slow
def test_a_whole_measurement(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = (
        "step tiny train.device=cpu data.views=sax data.sax_slices=1 data.frames=4 data.matrix=32,32 model.patch=2,8,8 "
        f"sampling.accelerations=2,4 evaluate.accelerations=2,4 data.global_batch=8 bench.pairs=2 "
        f"bench.folder={tmp_path / 'data'} storage.root={tmp_path}"
    )
    found = json.loads(json.dumps(bench.run(words.split())))
    for stage in (found, found["align"]):
        for key in ("ratio_to_reference", "ratio_to_reference_acquired", "ratio_to_ddp", "mfu", "tokens_per_s"):
            assert stage[key] > 0, key
        assert stage["flops_counted_over_formula"] == 1
        assert stage["ratio_to_ddp_interval"][0] <= stage["ratio_to_ddp"] <= stage["ratio_to_ddp_interval"][1]
        assert stage["parts_s"].keys() == PARTS.keys()
        assert stage["parts_s"]["communication"] > 0
        assert sum(stage["parts_share"].values()) == pytest.approx(1, abs=1e-3)
        assert 0 < stage["memory_gib"]["ours"] < 8
    assert found["cost_vs_acceleration"].keys() == {"2", "4", "8", "16"}
    assert found["parameters"]["reference"] == pytest.approx(found["parameters"]["ours"], rel=0.05)
    kept = json.loads(Path(found["results"]).read_text())
    assert len(kept["raw"]["together"]["masked"]["seconds"]["ddp"]) == 2
    told = capfd.readouterr().out
    assert "ratio to reference" in told
    assert "align on 2 processes 2/2" in told
    assert "DeepSpeed" not in told, "chatter goes to logs"
