"""What the optimizer is told: who decays, how fast each block learns, and the rate at each step."""

from __future__ import annotations

from importlib.metadata import files

import pytest
import torch

from kmtr.config import RunConfig, override
from kmtr.tasks import Model
from kmtr.train.engine import learning_rate, learning_rates, parameter_groups


def rates(config: RunConfig) -> dict[str, tuple[float, float]]:
    """Parameter -> (share of the learning rate, weight decay)."""
    module = Model(config)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, config)
    found = {names[id(p)]: (g["share"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(names) == sum(len(g["params"]) for g in groups)
    return found


def test_matrices_decay_and_lower_blocks_learn_slower(small: RunConfig) -> None:
    found = rates(override(small, {"optimizer.layer_decay": 0.5, "model.depth": 3, "optimizer.weight_decay": 0.05}))
    for domain, head in (("kspace", "masked"), ("image", "masked_images")):
        shares = [found[f"systems.{domain}.{part}"][0] for part in ("position.0.view.weight", "blocks.0.mlp.0.weight")]
        shares += [found[f"systems.{domain}.blocks.{i}.attention.query.weight"][0] for i in (1, 2)]
        assert shares == [0.5**4, 0.5**3, 0.5**2, 0.5**1]
        assert found[f"systems.{domain}.frame_block.mlp.0.weight"] == (1.0, 0.05)
        assert found[f"heads.{head}.blocks.0.mlp.0.bias"] == (1.0, 0.0)
    assert found["systems.kspace.embed.0.linear.linear.weight"] == (0.5**4, 0.05)
    for name in ("embed.0.linear.gate", "position.0.view.weight", "norm.weight", "blocks.0.norm_mlp.bias"):
        assert found[f"systems.kspace.{name}"][1] == 0
    assert {share for share, _ in rates(small).values()} == {1.0}


def test_cosine_of_each_stage(small: RunConfig) -> None:
    config = override(small, {"masked.steps": 30, "masked.warmup_steps": 10, "align.steps": 5})
    curve = [learning_rate(config, step) / config.masked.learning_rate for step in range(30)]
    assert curve[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert curve[20] == pytest.approx(0.5)
    assert curve[10:] == sorted(curve[10:], reverse=True)
    assert 0 < curve[-1] < 0.01
    assert learning_rate(config, 30) == pytest.approx(config.align.learning_rate)  # its warm-up is one step


def test_a_plateau_is_the_same_however_long_the_run(small: RunConfig) -> None:
    changes = {"optimizer.schedule": "plateau", "optimizer.cooldown": 0.25, "masked.warmup_steps": 4}
    short, long = (override(small, changes | {"masked.steps": n}) for n in (40, 400))
    rate = short.masked.learning_rate
    assert [learning_rate(short, i) for i in range(30)] == [learning_rate(long, i) for i in range(30)]
    assert learning_rate(short, 29) == rate
    falling = torch.tensor([learning_rate(short, i) / rate for i in range(30, 40)])
    torch.testing.assert_close(falling, torch.arange(10, 0, -1) / 10)


def test_projections_learn_alone_first_and_a_teacher_that_is_not_trained_never(small: RunConfig) -> None:
    config = override(
        small,
        {"align.steps": 10, "align.head_steps": 3, "align.head_factor": 5.0, "align.learning_rate": 2e-4},
    )
    first = config.masked_steps
    assert len(set(learning_rates(config, first - 1).values())) == 1
    for step in range(first, first + 3):
        assert learning_rates(config, step) == {"kspace": 0.0, "image": 0.0, "heads.align": pytest.approx(1e-3)}
    found = learning_rates(config, first + 3)
    assert found["kspace"] == learning_rate(config, first + 3) > 0
    assert found["heads.align"] == pytest.approx(5 * found["kspace"])
    assert found["image"] == 0.0
    trained = learning_rates(override(config, {"align.train_image_encoder": True}), first + 3)
    assert trained["image"] == trained["kspace"]
    domains = {g["domain"] for g in parameter_groups(Model(config), config)}
    assert domains == set(found)


def test_decoders_learn_faster_than_heads_that_begin_in_closed_form(small: RunConfig) -> None:
    config = override(
        small,
        {"stage": "task", "task.tasks": ("phenotypes", "segmentation"), "task.encoder": "none", "task.warmup_steps": 0}
        | {"task.learning_rate": 1e-3, "task.head_factor": 2.0, "task.decoder_factor": 5.0},
    )
    rates = learning_rates(config, 0)
    assert rates == pytest.approx({"kspace": 1e-3, "heads.phenotypes": 2e-3, "heads.segmentation": 5e-3})
    unet = override(config, {"task.system": "unet", "task.tasks": ("segmentation",)})
    assert learning_rates(unet, 0) == pytest.approx({"unet": 1e-3, "heads.segmentation": 2e-3}), "it has no decoder"


def test_deepspeed_still_has_the_tuner_that_is_left_out() -> None:
    """A new version that imports MLflow elsewhere must be met here, not in every worker's start."""
    source = {str(path): path for path in files("deepspeed") or [] if path.suffix == ".py"}
    importing = [name for name, path in source.items() if "import mlflow" in path.read_text()]
    assert importing == ["deepspeed/autotuning/autotuner.py"]
    assert "from .autotuner import Autotuner" in source["deepspeed/autotuning/__init__.py"].read_text()
