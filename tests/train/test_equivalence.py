"""One process equals many, and every ZeRO stage the others: losses of the real engine on the real data path."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from kmtr.config import RunConfig, override, to_json
from kmtr.data import statistics
from kmtr.data.reader import Dataset

pytestmark = pytest.mark.ray


def losses(job: dict[str, Any]) -> dict[str, list[float]]:
    """Train function: the first losses of each variant of a configuration, one after the other."""
    import ray.train
    import ray.train.torch
    import torch

    from kmtr.config import from_json
    from kmtr.data import pipeline
    from kmtr.data.reader import Dataset
    from kmtr.objectives import STAGES, Preparer, Pretraining
    from kmtr.train.engine import ShardedEngine, learning_rate, stage_of
    from kmtr.train.loop import reduce

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    found: dict[str, list[float]] = {}
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
        values: list[float] = []
        for step, host in zip(steps, pipeline.batches(config, reader, plan, steps, rank, world), strict=True):
            stage, _ = stage_of(config, step)
            batch = host.to(device)
            micro = [batch[i : i + size] for i in range(0, len(batch), size)]
            means = reduce(STAGES[stage](engine, micro, prepare, config), device)
            values += [means[k] for k in sorted(means) if "top1" not in k]
            engine.update(learning_rate(config, step), freeze_images=stage == "align")
        found[name] = values
    return found


def run(variants: dict[str, RunConfig], workers: int, folder: str) -> dict[str, list[float]]:
    import ray.cloudpickle
    import ray.train
    from ray.train.torch import TorchTrainer

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import a test
    config = next(iter(variants.values()))
    dataset = Dataset.open(config.data)
    reader = dataset.reader("train", config.data)
    tables = {key: table.numpy() for key, table in statistics.fit(config, reader).tensors().items()}
    result = TorchTrainer(
        losses,
        train_loop_config={"variants": {k: to_json(c) for k, c in variants.items()}, "tables": tables},
        scaling_config=ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(name=f"equivalence-{workers}", storage_path=folder),
    ).fit()
    assert result.return_value is not None
    return result.return_value


def test_zero_stages_workers_and_accumulation_agree(cluster: None, config: RunConfig, tmp_path: Any) -> None:
    base = override(config, {"data.loader": "threads", "reconstruct.steps": 5, "align.steps": 3})
    variants = {f"zero{stage}": override(base, {"train.zero_stage": stage}) for stage in range(4)}
    variants |= {f"accumulation{n}": override(base, {"train.accumulation": n}) for n in (2, 4)}
    saving = {"train.zero_stage": 3, "model.checkpointing": True, "align.train_image_encoder": False}
    variants["checkpointing"] = override(base, saving)
    two = run(variants, 2, str(tmp_path / "two"))
    one = run({"one": override(base, {"train.workers": 1})}, 1, str(tmp_path / "one"))["one"]
    assert np.isfinite(one).all()
    assert any(a != b for a, b in pairwise(one[::3])), "the losses must move, else equality says nothing"
    for stage in (1, 2, 3):
        np.testing.assert_allclose(two[f"zero{stage}"], two["zero0"], rtol=1e-4, atol=1e-5, err_msg=f"ZeRO-{stage}")
    np.testing.assert_allclose(
        two["checkpointing"], two["zero0"], rtol=1e-4, atol=1e-5, err_msg="ZeRO-3, blocks run twice"
    )
    np.testing.assert_allclose(two["zero2"], one, rtol=1e-4, atol=1e-5, err_msg="two workers against one")
    for n in (2, 4):
        np.testing.assert_allclose(two[f"accumulation{n}"], one, rtol=1e-4, atol=1e-5, err_msg=f"accumulation {n}")
