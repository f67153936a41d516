"""Signs of life of the workers of a run: what each tells of itself, and when the run must not go on so.

A worker waits for the others in every collective operation. One that has died takes them along, since Ray notices; one
that stands still, or is stuck where no other one is, would let them wait for as long as NCCL's or gloo's timeout.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist

from kmtr.train.agreed import NOTHING, SAVE, STOP

BEAT_S = 2.0
"""Time between two signs of life of a worker."""
LEAVE_S = 3.0
"""Time that a worker has to leave by itself when another one has failed; then it is torn away, and ended after as much
again."""

ROOT = Path(__file__).parents[1]


@dataclass
class Beat:
    """The last sign of life of a worker.

    Attributes:
        moves: counts up with everything that it finishes.
        where: it is, in words (`where`).
        seen: time of this sign, in seconds.
        moved: time at which `moves` last changed.
    """

    moves: int
    where: str
    seen: float
    moved: float


class Watch:
    """Signs of life of all workers of one group, and what follows from them. Times are given, so nothing waits here.

    Args:
        silent_s: after so many seconds without a sign a worker is lost; 0: never.
        hang_s: after so many seconds in which no worker finished anything all are; 0: never.
    """

    def __init__(self, silent_s: float, hang_s: float):
        self.silent_s, self.hang_s = silent_s, hang_s
        self.beats: dict[int, Beat] = {}
        self.group = ""
        self._looked = float("inf")

    def beat(self, group: str, rank: int, moves: int, where: str, now: float) -> None:
        """A sign of life; the first of another group forgets the group before it."""
        if group != self.group:
            self.group, self.beats = group, {}
        known = self.beats.get(rank)
        moved = known.moved if known is not None and known.moves == moves else now
        self.beats[rank] = Beat(moves, where, now, moved)

    def leave(self, rank: int) -> None:
        """It has ended by itself."""
        self.beats.pop(rank, None)

    def forget(self) -> None:
        """All are about to start again."""
        self.beats = {}

    def judge(self, now: float) -> tuple[str, tuple[int, ...]]:
        """Why the run must not go on so, in one line, and the workers that are to be ended; empty: all is well.

        They are forgotten then. A pause between two looks (this machine slept) is nobody's silence.
        """
        pause = max(0.0, now - self._looked - 2 * BEAT_S)
        self._looked = now
        for beat in self.beats.values() if pause else ():
            beat.seen, beat.moved = beat.seen + pause, beat.moved + pause
        line, ranks = verdict(self.beats, now, self.silent_s, self.hang_s)
        for rank in ranks:
            self.leave(rank)
        return line, ranks


def verdict(beats: Mapping[int, Beat], now: float, silent_s: float, hang_s: float) -> tuple[str, tuple[int, ...]]:
    """`Watch.judge` without memory."""
    silent = tuple(rank for rank, beat in beats.items() if silent_s and now - beat.seen > silent_s)
    hangs = bool(hang_s and beats) and all(now - beat.moved > hang_s for beat in beats.values())
    if not silent and not hangs:
        return "", ()
    told = "; ".join(
        f"worker {rank} {'was last' if rank in silent else 'is'} {beat.where}" for rank, beat in sorted(beats.items())
    )
    if silent:
        names = " and ".join(map(str, silent))
        return f"no sign of life of worker {names} for {silent_s:.0f} s: {told}", silent
    return f"no worker has finished anything for {hang_s:.0f} s: {told}", tuple(beats)


def where(thread: int) -> str:
    """Place in the code where a thread of this process is, in words: whether it waits for other workers, and the
    innermost line of ours.
    """
    frame = _frames().get(thread)
    stack = traceback.extract_stack(frame) if frame is not None else []
    ours = [entry for entry in stack if Path(entry.filename).is_relative_to(ROOT)]
    if not ours:
        return "outside our code"
    entry = ours[-1]
    place = f"{Path(entry.filename).relative_to(ROOT.parent)}:{entry.lineno} ({entry.name})"
    inner = stack[stack.index(entry) :]
    waits = any(part in one.filename for one in inner for part in _INNER)
    return f"waiting for the others at {place}" if waits else f"at {place}"


def _frames() -> dict[int, FrameType]:
    """Frame of every thread. No garbage may be collected meanwhile: Python holds the lock of its list of threads, and a
    finalizer that lets another thread run, which starts a third, makes both wait for ever (CPython issue 106883).
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        if collects:
            gc.enable()


class Pulse:
    """A thread of a worker: tells that it lives and where it is, and hears whether the run is to stop.

    Args:
        tell: (moves, where) -> orders: ``stop``: save and leave; ``saves``: how often it was asked to save and go on;
            ``failure``: another worker's error. None: nobody answered.
        leave: called once when another worker has failed and this one has not left `LEAVE_S` later; and
        end: called as much later.
    """

    def __init__(
        self,
        tell: Callable[[int, str], dict[str, Any] | None],
        leave: Callable[[], None],
        end: Callable[[], None],
    ):
        self.stopping = False
        self.moves, self.asked, self.done = 0, 0, 0
        self._tell, self._steps = tell, [leave, end]
        self._watched = threading.get_ident()
        self._ended = threading.Event()
        self._beat()  # from now on its silence is noticed
        self._thread = threading.Thread(target=self._run, name="kmtr-pulse", daemon=True)
        self._thread.start()

    def moved(self) -> None:
        """Something is finished."""
        self.moves += 1

    @property
    def wish(self) -> int:
        """Wish of this worker (`agreed`): the order that it has not followed yet."""
        return STOP if self.stopping else SAVE if self.asked > self.done else NOTHING

    def answered(self) -> None:
        """It has saved."""
        self.done = self.asked

    def close(self) -> None:
        """No more signs of life; one that is under way may still arrive where nobody answers."""
        self._ended.set()
        self._thread.join(2 * BEAT_S)

    def _beat(self) -> dict[str, Any]:
        orders = self._tell(self.moves, where(self._watched)) or {}
        self.stopping = self.stopping or bool(orders.get("stop"))
        self.asked = max(self.asked, orders.get("saves", 0))
        return orders

    def _run(self) -> None:
        failed = float("inf")
        while True:
            now = time.monotonic()
            if self._beat().get("failure"):
                failed = min(failed, now)
            if self._steps and now - failed > LEAVE_S * (3 - len(self._steps)):
                self._steps.pop(0)()
            if self._ended.wait(BEAT_S):
                return


@contextmanager
def beating(tell: Orders, rank: int, device: torch.device) -> Iterator[Pulse]:
    """Inside, this worker gives signs of life, and leaves the others' operations when one of them has failed."""

    def leave() -> None:
        if device.type == "cuda":  # nothing tears a thread out of gloo but the end of a process
            threading.Thread(target=abandon, args=(device,), daemon=True).start()  # it may wait, or fail

    def end() -> None:
        tell.settle()
        faulthandler.dump_traceback(sys.__stderr__ or 2)  # the worker's log
        os._exit(1)

    pulse = Pulse(lambda moves, place: tell.beat(rank, moves, place), leave, end)
    try:
        yield pulse
    finally:
        pulse.close()
        tell.leave(rank)


class Orders(Protocol):
    """A worker's end of the progress actor (`kmtr.train.progress.Sender`)."""

    def beat(self, rank: int, moves: int, where: str) -> dict[str, Any] | None: ...

    def leave(self, rank: int) -> None: ...

    def settle(self) -> None: ...


def abandon(device: torch.device) -> None:
    """Leave the process group without waiting for anyone.

    Under NCCL a group can't be destroyed while an operation runs, so it is aborted.
    """
    if not dist.is_initialized():
        return
    if device.type == "cuda":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def lost_peer(error: BaseException) -> bool:
    """True for an error that only says that another worker has left, or that Ray has ended this one's process group:
    raised by a collective operation.
    """
    frames = traceback.extract_tb(error.__traceback__)
    inside = any(any(part in frame.filename for part in _INNER) for frame in frames)
    if isinstance(error, AssertionError | AttributeError | ValueError):
        return inside and not dist.is_initialized()
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, dist.DistError) or bool(_LEFT.search(str(error))) or inside


_LEFT = re.compile(r"\bgloo\b|\bNCCL\b|connection (closed|reset) by peer|broken pipe", re.IGNORECASE)
_INNER = ("/torch/distributed/", "/deepspeed/comm/")
