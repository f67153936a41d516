"""Ray Data executes the plan: identical batches from either loader, at any number of workers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kmtr.config import RunConfig, override, to_json
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import pipeline, planning
from kmtr.physics.sampling import subject_key

pytestmark = pytest.mark.ray

Batches = dict[int, list]
"""Step -> keys and contents of the subjects of a global batch, in the order of ranks."""


def test_loaders_agree(cluster: None, config: RunConfig) -> None:
    dataset = Dataset.open(config.data)
    reader, plan, steps = dataset.reader("train", config.data), planning.plan_of(config, dataset), range(2, 42)
    loaders = [override(config, {"data.readers": 2}), override(config, {"data.loader": "threads"})]
    batches = [list(pipeline.batches(loader, reader, plan, steps, 0, 1)) for loader in loaders]
    assert len(batches[0]) == len(batches[1]) == len(steps)
    for a, b in zip(*batches, strict=True):
        assert a.stored.equal(b.stored)
        assert all(a.meta[name].equal(b.meta[name]) for name in a.meta)


def contents(stored: torch.Tensor) -> list[int]:
    """A sum over the bits of each subject's k-space."""
    return [int(bits) for bits in stored.flatten(1).view(torch.int16).long().sum(1)]


def note_batches(job: dict[str, Any]) -> None:
    """A training worker that writes down what it was given, saves every fourth step, and may be killed once."""
    import json
    import os
    import signal
    import tempfile
    from pathlib import Path

    import ray.train

    from kmtr.config import from_json
    from kmtr.data.dataset.reader import Dataset
    from kmtr.data.loader import pipeline, planning

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config = from_json(job["config"])
    dataset = Dataset.open(config.data)
    plan = planning.plan_of(config, dataset)
    reader = dataset.reader("train", config.data)
    start, last = job["start"], ray.train.get_checkpoint()
    if last is not None:
        with last.as_directory() as folder:
            start = json.loads((Path(folder) / "step.json").read_text())
    steps = range(start, job["stop"])
    for step, batch in zip(steps, pipeline.batches(config, reader, plan, steps, rank, world), strict=True):
        line = json.dumps([step, rank, world, batch.meta["key"].tolist(), contents(batch.stored)])
        with open(Path(job["folder"]) / f"{rank}-{os.getpid()}.jsonl", "a") as file:
            file.write(line + "\n")
        killed = Path(job["folder"]) / "killed"
        if step == job["kill_at"] and rank == world - 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if (step + 1) % 4 == 0:
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:
                    (Path(folder) / "step.json").write_text(json.dumps(step + 1))
                ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def noted(folder: Path, config: RunConfig, workers: int, start: int, stop: int, kill_at: int = -1) -> Batches:
    """Global batches that a TorchTrainer of so many workers saw."""
    import ray.cloudpickle
    import ray.train
    from ray.train.torch import TorchTrainer

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import a test
    folder.mkdir()
    job = {"config": to_json(config), "folder": str(folder), "start": start, "stop": stop, "kill_at": kill_at}
    TorchTrainer(
        note_batches,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.25}),
        run_config=ray.train.RunConfig(
            name="order", storage_path=str(folder), failure_config=ray.train.FailureConfig(max_failures=1)
        ),
    ).fit()
    seen: dict[int, dict[int, tuple]] = {}
    for file in folder.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            step, rank, world, keys, content = json.loads(line)
            assert world == workers
            # What was seen twice, before and after the kill, must be the same.
            assert seen.setdefault(step, {}).setdefault(rank, (keys, content)) == (keys, content)
    assert (kill_at >= 0) == (folder / "killed").exists()
    assert set(seen) == set(range(start, stop))
    assert all(set(ranks) == set(range(workers)) for ranks in seen.values()), "a rank had other steps"
    return {
        step: [[value for rank in range(workers) for value in ranks[rank][i]] for i in (0, 1)]
        for step, ranks in seen.items()
    }


def shared(config: RunConfig, steps: range, world: int) -> Batches:
    """Global batches that so many workers share, made by this process."""
    dataset = Dataset.open(config.data)
    reader, plan = dataset.reader("train", config.data), planning.plan_of(config, dataset)
    ranks = [list(pipeline.batches(config, reader, plan, steps, rank, world)) for rank in range(world)]
    return {
        step: [
            [key for share in shares for key in share.meta["key"].tolist()],
            [content for share in shares for content in contents(share.stored)],
        ]
        for step, *shares in zip(steps, *ranks, strict=True)
    }


@pytest.fixture
def twice(config: RunConfig) -> tuple[RunConfig, Batches, int]:
    """A run, its global batches of two epochs as one worker sees them, and the steps of an epoch."""
    config = override(config, {"data.global_batch": 4, "data.read_cpus": 0.25, "stage": "masked", "train.workers": 1})
    dataset = Dataset.open(config.data)
    plan = planning.plan_of(config, dataset)
    whole = shared(override(config, {"data.loader": "threads"}), range(2 * plan.steps_per_epoch), 1)
    keys = dataset.reader("train", config.data).samples(range(24)).meta.column("subject_id").to_pylist()
    number = {np.uint64(subject_key(key)).astype(np.int64): row for row, key in enumerate(keys)}
    for step, (seen, _) in whole.items():
        assert [number[key] for key in seen] == plan.batch(step).row.tolist()
    return config, whole, plan.steps_per_epoch


def test_any_number_of_workers_goes_on_with_the_same_batches(
    cluster: None, twice: tuple[RunConfig, Batches, int]
) -> None:
    """Two workers by Ray Data, then four by threads."""
    config, whole, epoch = twice
    two = shared(config, range(epoch + 1), 2)
    four = shared(override(config, {"data.loader": "threads"}), range(epoch + 1, 2 * epoch), 4)
    assert two | four == whole


@pytest.mark.full
def test_workers_of_ray_train_go_on_with_the_same_batches_after_kills_and_stops(
    cluster: None, twice: tuple[RunConfig, Batches, int], tmp_path: Path
) -> None:
    """Bit for bit what `test_a_killed_worker_changes_no_number` shows by the losses, on two workers and on four."""
    config, whole, epoch = twice
    two = noted(tmp_path / "two", config, 2, 0, epoch + 1, kill_at=epoch // 2)
    four = noted(tmp_path / "four", config, 4, epoch + 1, 2 * epoch)
    assert two | four == whole
