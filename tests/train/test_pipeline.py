"""Ray Data executes the plan: identical batches from either loader, at any number of workers."""

from __future__ import annotations

import pytest

from kmtr.config import RunConfig, override
from kmtr.data import pipeline
from kmtr.data.reader import Dataset

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("world", [1, 2])
def test_loaders_agree(cluster: None, config: RunConfig, world: int) -> None:
    dataset = Dataset.open(config.data)
    reader, plan = dataset.reader("train", config.data), pipeline.plan_of(config, dataset)
    steps = range(2, 2 * plan.steps_per_epoch)
    for rank in range(world):
        batches = [
            list(pipeline.batches(override(config, {"data.loader": loader}), reader, plan, steps, rank, world))
            for loader in ("ray", "threads")
        ]
        assert len(batches[0]) == len(batches[1]) == len(steps)
        for a, b in zip(*batches, strict=True):
            assert a.stored.equal(b.stored)
            assert all(a.meta[name].equal(b.meta[name]) for name in a.meta)


def test_several_readers_keep_the_order(cluster: None, config: RunConfig) -> None:
    dataset = Dataset.open(config.data)
    reader, plan = dataset.reader("train", config.data), pipeline.plan_of(config, dataset)
    steps = range(40)
    keys = [
        [b.meta["key"].tolist() for b in pipeline.batches(c, reader, plan, steps, 0, 1)]
        for c in (override(config, {"data.readers": 2}), override(config, {"data.loader": "threads"}))
    ]
    assert keys[0] == keys[1]
