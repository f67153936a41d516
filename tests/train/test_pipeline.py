"""Ray Data executes the plan: identical batches from either loader, at any number of workers."""

from __future__ import annotations

import pytest

from kmtr.config import RunConfig, override
from kmtr.data import pipeline, shards
from kmtr.data.plan import Plan

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("world", [1, 2])
def test_loaders_agree(cluster: None, config: RunConfig, world: int) -> None:
    manifest = shards.read_manifest(config.data.root)
    reader = shards.Reader(config.data.root, manifest, "train", shards.columns_of(config.data.views))
    plan = Plan(len(reader), config.data.global_batch, 3)
    steps = range(2, 2 * plan.steps_per_epoch)
    for rank in range(world):
        batches = [
            list(pipeline.batches(override(config, {"data.loader": loader}), reader, plan, steps, rank, world))
            for loader in ("ray", "threads")
        ]
        assert len(batches[0]) == len(batches[1]) == len(steps)
        for a, b in zip(*batches, strict=True):
            assert a.stored.equal(b.stored)
            assert all(a.rest[name].equal(b.rest[name]) for name in a.rest)


def test_several_readers_keep_the_order(cluster: None, config: RunConfig) -> None:
    manifest = shards.read_manifest(config.data.root)
    reader = shards.Reader(config.data.root, manifest, "train", shards.columns_of(config.data.views))
    plan = Plan(len(reader), config.data.global_batch, 3)
    steps = range(40)
    keys = [
        [b.rest["key"].tolist() for b in pipeline.batches(c, reader, plan, steps, 0, 1)]
        for c in (override(config, {"data.readers": 2}), override(config, {"data.loader": "threads"}))
    ]
    assert keys[0] == keys[1]
