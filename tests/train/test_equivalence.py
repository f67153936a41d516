"""One process equals many, every ZeRO stage the others, and all of them the golden losses of `tiny`'s model.

The real engine on the real data path. ``golden.json`` holds what the first 5 steps of stage b and 3 of stage c log. A
change of model, losses, order or sampling changes them; look at the difference, then write them anew:

    KMTR_GOLDEN=write python -m pytest tests/train/test_equivalence.py
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kmtr.config import RunConfig, override, to_json
from kmtr.data import statistics
from kmtr.data.reader import Dataset
from kmtr.recipes import tiny

pytestmark = pytest.mark.ray

GOLDEN = Path(__file__).with_name("golden.json")
DATA = {
    "data.views": ("sax", "lax_4ch"),
    "data.sax_slices": 2,
    "data.frames": 4,
    "data.matrix": (32, 32),
    "data.global_batch": 8,
    "data.loader": "threads",
    "sampling.accelerations": (2, 4),
    "evaluate.accelerations": (2, 4),
}
"""Where the dataset of the tests is smaller than `tiny`'s; model and losses are the recipe's."""
STEPS = {
    "reconstruct.steps": 5,
    "reconstruct.warmup_steps": 2,
    "align.steps": 3,
    "align.warmup_steps": 1,
    "align.head_steps": 1,
    "model.projection": 8,  # of so few subjects rounding would decide which the last of many components are
}
Steps = list[dict[str, float]]
"""What each step logged, without what is counted in whole subjects (retrieval)."""


def losses(job: dict[str, Any]) -> dict[str, Steps]:
    """Train function: the first losses of each variant of a configuration, one after the other."""
    import ray.train
    import ray.train.torch
    import torch

    from kmtr.config import from_json
    from kmtr.data import pipeline
    from kmtr.data.reader import Dataset
    from kmtr.objectives import STAGES, Preparer, Pretraining
    from kmtr.train.engine import ShardedEngine, learning_rates, stage_of
    from kmtr.train.loop import reduce

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    found: dict[str, Steps] = {}
    for name, text in job["variants"].items():
        config = from_json(text)
        dataset = Dataset.open(config.data)
        reader, plan = dataset.reader("train", config.data), pipeline.plan_of(config, dataset)
        torch.manual_seed(config.seed)
        tables = {key: torch.from_numpy(table) for key, table in job["tables"].items()}
        engine = ShardedEngine(Pretraining(config), config, world, device)
        prepare = Preparer(config, tables, device)
        steps = range(config.total_steps)
        size = config.data.global_batch // world // config.train.accumulation
        values: Steps = []
        for step, host in zip(steps, pipeline.batches(config, reader, plan, steps, rank, world), strict=True):
            stage, _ = stage_of(config, step)
            batch = host.to(device)
            micro = [batch[i : i + size] for i in range(0, len(batch), size)]
            means = reduce(STAGES[stage](engine, micro, prepare, config), device)
            values.append({name: value for name, value in means.items() if "top1" not in name})
            engine.update(learning_rates(config, step))
        found[name] = values
    return found


def run(variants: dict[str, RunConfig], workers: int, folder: str) -> dict[str, Steps]:
    import ray.cloudpickle
    import ray.train
    from ray.train.torch import TorchTrainer

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import a test
    config = next(iter(variants.values()))
    dataset = Dataset.open(config.data)
    reader = dataset.reader("train", config.data)
    tables = {key: table.numpy() for key, table in statistics.tables(config, reader).items()}
    result = TorchTrainer(
        losses,
        train_loop_config={"variants": {k: to_json(c) for k, c in variants.items()}, "tables": tables},
        scaling_config=ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(name=f"equivalence-{workers}", storage_path=folder),
    ).fit()
    assert result.return_value is not None
    return result.return_value


def assert_equal(steps: Steps, expected: Steps, what: str, rtol: float, atol: float) -> None:
    assert [sorted(step) for step in steps] == [sorted(step) for step in expected], what
    for number, (step, other) in enumerate(zip(steps, expected, strict=True), 1):
        for name, value in step.items():
            np.testing.assert_allclose(value, other[name], rtol, atol, err_msg=f"{what}: {name} of step {number}")


def test_zero_stages_workers_and_accumulation_agree(cluster: None, dataset: str, tmp_path: Path) -> None:
    base = override(tiny(), DATA | STEPS | {"data.root": dataset, "train.workers": 2})
    stages = {f"zero{stage}": override(base, {"train.zero_stage": stage}) for stage in range(4)}
    variants = stages | {f"accumulation{n}": override(base, {"train.accumulation": n}) for n in (2, 4)}
    saving = {"train.zero_stage": 3, "model.checkpointing": True, "align.train_image_encoder": False}
    variants["checkpointing"] = override(base, saving)
    two = run(variants, 2, str(tmp_path / "two"))
    one = run({k: override(c, {"train.workers": 1}) for k, c in stages.items()}, 1, str(tmp_path / "one"))
    first = one["zero0"]
    curve = [step["kspace_loss"] for step in first]
    assert np.isfinite(curve).all()
    assert len(set(curve)) == len(curve), "the losses must move, else equality says nothing"
    for workers, found in ((1, one), (2, two)):
        for name, steps in found.items():
            assert_equal(steps, first, f"{name} on {workers} worker(s)", rtol=1e-4, atol=1e-5)
    if os.environ.get("KMTR_GOLDEN") == "write":
        rounded = [{name: float(f"{value:.7g}") for name, value in step.items()} for step in first]
        GOLDEN.write_text(json.dumps(rounded, indent=2) + "\n")
    golden = json.loads(GOLDEN.read_text())
    for workers, found in ((1, one), (2, two)):
        for name in stages:
            assert_equal(found[name], golden, f"golden, {name} on {workers} worker(s)", rtol=1e-3, atol=1e-4)
