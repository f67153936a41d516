"""Processes that compute together, forked from one that has imported torch, DeepSpeed and kmtr already.

Each would else import them anew: seconds of every processor for every process.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch.multiprocessing

IMPORTED = [
    "deepspeed",
    "kmtr.train.loop",
    "ray.train.torch",
    "kmtr.train.checkpoint",
    "kmtr.train.engine",
    "kmtr.train.step",
    "kmtr.tasks.model",
]


def start(work: Callable[..., None], world: int, *arguments: Any) -> torch.multiprocessing.ProcessContext:
    """Start ``work(rank, *arguments)`` in so many processes; they inherit the environment of the first call."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for one when it is imported
        started = torch.multiprocessing.start_processes(
            work, arguments, nprocs=world, join=False, start_method="forkserver"
        )
    assert started is not None
    return started


def run(work: Callable[..., None], world: int, *arguments: Any) -> None:
    """`start`, and wait for their end.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them failed; the others are ended.
    """
    started = start(work, world, *arguments)
    while not started.join(timeout=60):
        pass
