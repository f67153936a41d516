"""One local Ray cluster for all tests here, and a small simulated dataset on disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmtr.config import RunConfig, override
from kmtr.data import pipeline, shards
from kmtr.physics import phantom
from kmtr.recipes import tiny


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Local Ray; four logical CPUs so that two workers, their readers and a trial fit on two cores."""
    os.environ["RAY_DATA_LOG_LEVEL"] = "ERROR"
    import ray

    ray.init(num_cpus=4, namespace="kmtr", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    yield
    ray.shutdown()


SMALL = {
    "data.views": ("sax", "lax_4ch"),
    "data.sax_slices": 1,
    "data.frames": 4,
    "data.matrix": (32, 32),
    "data.global_batch": 8,
    "sampling.accelerations": (2, 4),
    "model.width": 32,
    "model.depth": 1,
    "model.head_width": 16,
    "model.decoder_width": 32,
    "model.patch": (2, 16, 16),
    "model.projection": 16,
    "reconstruct.steps": 6,
    "reconstruct.warmup_steps": 2,
    "align.steps": 4,
    "align.warmup_steps": 1,
    "train.workers": 2,
    "train.log_every": 1,
    "train.checkpoint_every": 3,
    "train.eval_every": 5,
    "train.eval_subjects": 16,
    "evaluate.accelerations": (2, 4),
    "simulate.subjects": 80,
    "shards.rows": 16,
}


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 simulated subjects of two slices, four frames and 32 x 32, in shards of 16."""
    config = override(tiny(), SMALL)
    root = tmp_path_factory.mktemp("ray") / "data"
    data = config.data
    ids = [phantom.subject_id(i, seed=0) for i in range(config.simulate.subjects)]
    parts = []
    for job in pipeline.shard_jobs(ids, config.shards.rows, "hash"):
        studies = (
            phantom.simulate(
                i, seed=0, views=data.views, sax_slices=1, frames=data.frames, matrix=data.matrix, snr_db=30.0
            )
            for i in job.items
        )
        parts.append(shards.write_shard(str(root), job.name, job.split, studies, "float16"))
    shards.write_manifest(str(root), parts, "float16", "test")
    return root


@pytest.fixture
def config(small_dataset: Path, tmp_path: Path) -> RunConfig:
    """A run of 6 + 4 steps on that dataset, with storage and tracking of its own."""
    return override(tiny(), SMALL | {"data.root": str(small_dataset), "storage.root": str(tmp_path / "runs")})
