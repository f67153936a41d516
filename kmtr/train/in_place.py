"""A run whose one worker is the process that asks for it, in place of Ray Train's controller and its new processes.

They take about 25 s of two cores each time, which a study of short runs pays for every row. What the worker asks of Ray
Train is answered here: who it is, its last checkpoint, and a report that keeps one. Like `trainer.py` it leans on the
inside of Ray Train.
"""

from __future__ import annotations

import datetime
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ray.train import Checkpoint
from ray.train.v2._internal.execution import train_fn_utils
from ray.train.v2._internal.execution.train_fn_utils import LocalTrainFnUtils

from kmtr.config import RunConfig
from kmtr.train import checkpoint
from kmtr.train.loop import train_worker


@dataclass(frozen=True)
class Ended:
    """Result of a run, as `trainer.fit` returns it.

    Attributes:
        return_value: of the worker.
        checkpoint: the last one; None: there is none.
    """

    return_value: dict[str, Any]
    checkpoint: Checkpoint | None


class Alone(LocalTrainFnUtils):
    """Ray Train as its only worker sees it.

    Args:
        folder: of the checkpoints.
        keep: so many of them.
    """

    def __init__(self, folder: Path, keep: int):
        super().__init__(experiment_name=folder.name)
        self.folder, self.keep = folder, keep

    def get_checkpoint(self) -> Checkpoint | None:
        """The last one to which no file is missing."""
        there = self._whole()
        return Checkpoint.from_directory(str(there[-1])) if there else None

    def report(
        self, metrics: dict[str, Any], checkpoint: Any = None, *_: Any, checkpoint_upload_fn: Any = None, **__: Any
    ) -> None:
        """Keep a checkpoint, before training goes on."""
        if checkpoint_upload_fn is not None:
            now = f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S.%f}"  # local time and sorted with Ray Train's own
            checkpoint_upload_fn(checkpoint, f"checkpoint_{now}")
            for old in self._whole()[: -self.keep]:
                shutil.rmtree(old)

    def _whole(self) -> list[Path]:
        return [one for one in sorted(self.folder.glob("checkpoint_*")) if one.is_dir() and checkpoint.complete(one)]


def fit(config: RunConfig, job: dict[str, Any], folder: Path) -> Ended:
    """Train to the end in this process, which is a Ray actor's: who watches the run ends it by its handle.

    Args:
        job: of `loop.Worker`.

    Returns:
        What the worker returned, and the last checkpoint.
    """
    assert config.train.workers.most == 1, "one process is one worker"
    place = folder / "train"
    place.mkdir(exist_ok=True)
    if (place / checkpoint.LIST).is_file():  # Ray Train's workers would go on from what it lists, not from ours
        (place / checkpoint.LIST).replace(place / checkpoint.ASIDE)
    (place / checkpoint.ASIDE).touch()
    before, here = train_fn_utils._train_fn_utils, Alone(place, config.train.keep)
    _join()
    train_fn_utils.set_train_fn_utils(here)
    try:
        return Ended(train_worker(job), here.get_checkpoint())
    finally:
        train_fn_utils._train_fn_utils = before


def _join() -> None:
    """A process group of one, which stays: DeepSpeed keeps what it made of the first one in this process."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
