"""What many tests share: a very small configuration, a dataset on disk that fits it, and its statistics."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import torch
from cohort import simulated, write
from hypothesis import settings

from kmtr.config import RunConfig, override
from kmtr.config.recipes import tiny
from kmtr.data.dataset import record
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader import statistics
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.collate import collate
from kmtr.types import PHENOTYPES, Study

settings.register_profile("kmtr", deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile("kmtr")

SPLITS = {"train": 24, "val": 12, "test": 12}
SMALL = {
    "data.views": ("sax", "lax_4ch"),
    "data.sax_slices": 2,
    "data.frames": 4,
    "data.matrix": (32, 32),
    "data.global_batch": 8,
    "data.loader": "threads",
    "train.zero_stage": 2,
    "sampling.accelerations": (2, 4),
    "sampling.acs_lines": 4,
    "evaluate.accelerations": (2, 4),
    "evaluate.labels": 24,
    "evaluate.subjects": 12,
    "evaluate.bootstrap": 100,
    "masked.image_weight": 1.0,
    "masked.target_lines": 0.0,
    "align.teacher": "encoder",
    "align.head_steps": 0,
    "align.head_factor": 1.0,
    "model.centre": 0,
    "model.width": 32,
    "model.depth": 1,
    "model.head_width": 16,
    "model.decoder_width": 32,
    "model.patch": (2, 8, 8),
    "model.projection": 16,
    "masked.steps": 4,
    "masked.warmup_steps": 1,
    "align.steps": 2,
    "align.warmup_steps": 1,
    "align.guard": False,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "train.eval_every": 2,
    "train.eval_subjects": 8,
    "simulate.subjects": sum(SPLITS.values()),
    "simulate.difficulty": "easy",  # so few subjects can be learnt from
    "shards.rows": 16,
}


LONG = (
    "test_resized",
    "test_finetune",
    "test_packed",
    "test_training",
    "test_equivalence",
    "test_study",
    "test_study_runs",
    "test_spool",
    "test_run",
    "test_verify",
    "test_sharding",
    "test_new_task",
    "test_objectives",
)
"""Files that take longest, so that none of them is left for the end, when one processor has nothing else to do."""


def pytest_configure() -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="kmtr-ray-", dir="/tmp")  # a socket's path is short


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ray's tests come first, then the long files. One process runs a file, and one all tests that share a Ray."""

    def place(item: pytest.Item) -> int:
        if item.get_closest_marker("ray"):
            return -1
        return LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG)

    items.sort(key=place)
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group("ray" if item.get_closest_marker("ray") else item.path.stem))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Root of a simulated dataset of 24 training, 12 validation and 12 test subjects; never written to."""
    root = tmp_path_factory.mktemp("dataset")
    config = override(tiny(), SMALL)
    subjects: dict[str, list[Study]] = {}
    first = 0
    for split, count in SPLITS.items():
        subjects[split] = [simulated(i, config) for i in range(first, first + count)]
        first += count
    write(root, subjects)
    return str(root)


@pytest.fixture(scope="session")
def small(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Configuration of a run of a second on `dataset`."""
    return override(tiny(), SMALL | {"data.root": dataset, "storage.root": str(tmp_path_factory.mktemp("runs"))})


@pytest.fixture(scope="session")
def reader(small: RunConfig) -> Reader:
    """Training rows of `dataset`, with all phenotypes."""
    columns = record.columns_of(small.data.views, tuple(PHENOTYPES))
    return Reader(Dataset.of(small.data.root), "train", columns)


@pytest.fixture(scope="session")
def tables(small: RunConfig, reader: Reader) -> dict[str, torch.Tensor]:
    """Population statistics of `dataset`; read only."""
    return statistics.fit(small, reader).tensors()


@pytest.fixture
def batch(small: RunConfig, reader: Reader) -> Batch:
    """The first eight training subjects, epoch 0."""
    return collate(reader.samples(range(8)), small).to(torch.device("cpu"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One Ray of its own for all tests; four logical CPUs: two workers, their readers and a trial fit on two cores."""
    # At Ray's own niceness its workers would wait for the tests beside them.
    os.environ |= {
        "RAY_DATA_LOG_LEVEL": "ERROR",
        "RAY_raylet_start_wait_time_s": "300",
        "RAY_worker_niceness": "0",
    }
    import ray

    ray.init(
        "local",  # never one that runs here already
        num_cpus=4,
        object_store_memory=1 << 30,
        namespace="kmtr",
        log_to_driver=False,
        logging_level=logging.ERROR,
        include_dashboard=False,
    )
    yield
    ray.shutdown()
