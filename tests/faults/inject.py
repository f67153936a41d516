"""Faults in the workers of a real run: where, in which worker, and what happens there; each once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from survived import wait_for

START, FIRST, MIDDLE, VALIDATION, SAVING, LAST = "start", "first step", "mid-epoch", "validation", "saving", "last step"
MOMENTS = (START, FIRST, MIDDLE, VALIDATION, SAVING, LAST)
STEPS = {FIRST: 0, MIDDLE: 6, LAST: -1}
"""Moments that are a step, in the middle of which, behind the backward pass, it happens."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        deed: a name in `DEEDS`.
        folder: for the files that say that it happened, and that what happens outside is done.
    """

    moment: str
    deed: str
    folder: str
    rank: int = 1

    @property
    def happened(self) -> Path:
        return Path(self.folder) / "happened"

    @property
    def done(self) -> Path:
        return Path(self.folder) / "done"


def hold(fault: Fault) -> None:
    """Wait for what happens elsewhere."""
    while not fault.done.exists():
        time.sleep(0.05)


def hang(_: Fault) -> None:
    while True:
        time.sleep(1)


def refuse(_: Fault) -> None:
    raise RuntimeError("planted in one worker")


def no_memory(_: Fault) -> None:
    raise MemoryError("planted: no memory in one worker")


DEEDS: dict[str, Callable[[Fault], None]] = {
    "killed": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "hangs": hang,
    "raises": refuse,
    "out of memory": no_memory,
    "outside": hold,
}


def plant(patch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Let the workers of the runs that this process starts meet the fault."""
    from ray import cloudpickle

    from kmtr.train import trainer

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import from tests/
    original = trainer.trainer_of

    def trainer_of(config: Any, job: dict[str, Any], folder: Path, callbacks: list[Any]) -> Any:
        return original(config, job | {"fault": asdict(fault)}, folder, callbacks)

    patch.setattr(trainer, "train_worker", faulty_worker)
    patch.setattr(trainer, "trainer_of", trainer_of)


def faulty_worker(job: dict[str, Any]) -> dict[str, Any]:
    """`train_worker` with the fault, in a worker's process."""
    import ray.train

    from kmtr.train import checkpoint, loop, step

    fault = Fault(**job["fault"])
    mine = ray.train.get_context().get_world_rank() == fault.rank
    at = {"step": -1}

    def happen() -> None:
        try:
            fault.happened.open("x").close()
        except FileExistsError:
            return
        DEEDS[fault.deed](fault)

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*arguments: Any, **more: Any) -> Any:
            happen()
            return call(*arguments, **more)

        return faulty

    def behind_backward(*arguments: Any) -> Any:
        found = accumulate(*arguments)
        last = loop.from_json(job["config"]).total_steps - 1
        if at["step"] == (last if fault.moment == LAST else STEPS[fault.moment]):
            happen()
        return found

    def counted(self: Any, number: int, *arguments: Any) -> Any:
        at["step"] = number
        return stepped(self, number, *arguments)

    accumulate, stepped = step.accumulate, step.TrainingStep.__call__
    if mine and fault.moment in STEPS:
        step.accumulate, step.TrainingStep.__call__ = behind_backward, counted  # type: ignore[assignment, method-assign]
    elif mine and fault.moment == START:
        loop.Worker.__init__ = before(loop.Worker.__init__)  # type: ignore[method-assign]
    elif mine and fault.moment == VALIDATION:
        loop.Worker._evaluate = before(loop.Worker._evaluate)  # type: ignore[method-assign]
    elif mine and fault.moment == SAVING:  # the weights are written, their hashes are not
        checkpoint._sha256 = before(checkpoint._sha256)
    return loop.train_worker(job)


@contextmanager
def meanwhile(fault: Fault, happens: Any) -> Iterator[None]:
    """While the block runs, call `happens` at the fault's moment; the worker that waits for it goes on then."""

    def wait() -> None:
        wait_for(fault.moment, fault.happened.exists)
        happens()
        fault.done.touch()

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()
    assert fault.done.exists(), "nothing happened: the test proves nothing"


def cases(short: set[tuple[str, str]], deeds: tuple[str, ...], moments: tuple[str, ...] = MOMENTS) -> Any:
    """Parameters ``deed`` and ``moment`` of a test; those that are not `short` are marked `full`."""
    every = [(deed, moment) for deed in deeds for moment in moments]
    marked = [pytest.param(*case, marks=[] if case in short else pytest.mark.full) for case in every]
    return pytest.mark.parametrize(("deed", "moment"), marked)
