"""The workers of a run as forked processes in place of Ray Train's, for promises that are not Ray's.

The worker is the one that Ray Train starts (`kmtr.train.loop.Worker`); here are only the four functions that it asks of
Ray Train: who it is, its device, the last checkpoint, and a report that brings the parts of a checkpoint together.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist

from kmtr.config import RunConfig
from kmtr.train import checkpoint, driver, trainer
from kmtr.train.progress import Display


def place_of(progress: str) -> Path:
    """File that stands for the progress actor: the first failure of the workers."""
    return Path(tempfile.gettempdir()) / progress


class Silent:
    """A worker's end of the progress actor, where nobody listens to anything but the first failure."""

    def __init__(self, name: str):
        self.place = place_of(name)

    def put(self, step: int, stage: str, metrics: dict[str, float]) -> None: ...

    def say(self, line: str) -> None: ...

    def beat(self, *_: object) -> None: ...

    def leave(self, rank: int) -> None: ...

    def settle(self) -> None: ...

    def settled(self) -> str:
        return ""

    def fail(self, message: str, lost_peer: bool = False) -> None:
        with contextlib.suppress(FileExistsError), self.place.open("x") as file:
            file.write(message)


class Unseen(Display):
    """The driver's end, without an actor."""

    def __init__(self, name: str, *_: object):
        self.place = place_of(name)

    def __enter__(self) -> Unseen:
        return self

    def __exit__(self, *_: object) -> None: ...

    def line(self, text: str) -> None: ...

    def own_failure(self) -> str:
        return self.first_failure()

    def first_failure(self) -> str:
        said = self.place.read_text() if self.place.exists() else ""
        self.place.unlink(missing_ok=True)
        return said


def instead_of_ray_train(patch: pytest.MonkeyPatch) -> None:
    """Let `driver.fit` train with forked processes."""
    patch.setattr(trainer, "trainer_of", Forked)
    patch.setattr(driver, "Display", Unseen)


@dataclass(frozen=True)
class Forked:
    """What `kmtr.train.trainer.trainer_of` returns, without Ray."""

    config: RunConfig
    job: dict[str, Any]
    folder: Path
    callbacks: list[Any]

    def fit(self) -> SimpleNamespace:
        world = self.config.train.workers.sizes(self.config.data.global_batch)[-1]
        (self.folder / "train").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as meeting:
            processes.run(WORK, world, world, self.job, meeting)
            returned = json.loads((Path(meeting) / "returned.json").read_text())
        return SimpleNamespace(return_value=returned, checkpoint=last_checkpoint(self.folder))


def last_checkpoint(folder: Path) -> Any:
    from ray.train import Checkpoint

    written = sorted((folder / "train").glob(f"checkpoint_*/{checkpoint.HEAD}"))
    return Checkpoint.from_directory(str(written[-1].parent)) if written else None


def work(rank: int, world: int, job: dict[str, Any], meeting: str) -> None:
    """One worker; the first writes what it returned."""
    import ray.train
    import ray.train.torch

    from kmtr.train import loop

    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    folder = Path(job["folder"])
    reports = len(list((folder / "train").glob("checkpoint_*")))
    here = SimpleNamespace(
        get_world_rank=lambda: rank,
        get_world_size=lambda: world,
        get_local_world_size=lambda: world,
        get_local_rank=lambda: rank,
        get_node_rank=lambda: 0,
    )

    def report(metrics: dict[str, float], checkpoint: Any, checkpoint_upload_fn: Any, **_: Any) -> None:
        nonlocal reports
        checkpoint_upload_fn(checkpoint, f"checkpoint_{9 * 10**8 + reports}")
        reports += 1
        dist.barrier()

    ray.train.get_context, ray.train.torch.get_device = lambda: here, lambda: torch.device("cpu")
    ray.train.get_checkpoint, ray.train.report = lambda: last_checkpoint(folder), report
    loop.Sender = Silent  # type: ignore[misc, assignment]
    dist.init_process_group("gloo", f"file://{meeting}/rendezvous", rank=rank, world_size=world)
    returned = loop.train_worker(job)
    if rank == 0:
        (Path(meeting) / "returned.json").write_text(json.dumps(returned))
    if dist.is_initialized():
        dist.destroy_process_group()


WORK: Callable[..., None] = work
"""One worker; a test may put another in its place."""


@dataclass(frozen=True)
class Dying:
    """`work` of which the last worker is killed in the middle of the first step behind so many checkpoints."""

    checkpoints: int

    def __call__(self, rank: int, world: int, job: dict[str, Any], meeting: str) -> None:
        from kmtr.train import step

        backward = step.accumulate

        def killed(*arguments: Any) -> Any:
            found = backward(*arguments)
            written = len(list(Path(job["folder"]).glob("train/checkpoint_*")))
            if written == self.checkpoints and rank == world - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        step.accumulate = killed  # type: ignore[assignment]
        work(rank, world, job, meeting)
