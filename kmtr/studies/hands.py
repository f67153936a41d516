"""Hands of a study: processes that live as long as it does, each of which makes one row after the other.

Where one worker serves a run, no row starts Ray Train: the hand itself is the worker. As many work side by side as the
cluster has room for. What several rows begin from is made once: a row waits while another one is at it.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kmtr import machine
from kmtr.config import RunConfig, override
from kmtr.ray_start import described, start_ray
from kmtr.train import room
from kmtr.train.progress import STOP_S, Display, Sender
from kmtr.train.room import no_memory
from kmtr.train.watch import BEAT_S
from kmtr.types import KmtrError, StoppedError

if TYPE_CHECKING:
    from kmtr.studies.task_rows import Asked, Shown, Values
    from kmtr.studies.task_study import Study


@dataclass(frozen=True)
class Finished:
    """A row that is ready to be kept: arguments of `task_rows.Rows.add`."""

    asked: Asked
    said: Mapping[str, Any]
    values: Values
    shown: Shown | None = None


LOOK_S = 5.0
"""Seconds after which an idle hand looks again whether a row can be made."""
ROOM_S = 30.0
"""Seconds after which it is said that the cluster has no room for a hand yet."""
MOST_FAILED = 2
"""Rows whose failures leave the others going on; more are no accident, and end the study."""
STOPPED = "study: stopped; the same command goes on, each row from its last checkpoint"

Done = Mapping["Asked", Mapping[str, Any]]
"""Finished rows by their keys, as `task_rows.Rows.read` gives them."""
Make = Callable[["Study", "Asked", Done], Finished]
"""Function that makes a row, knowing those that are done."""


@dataclass(frozen=True)
class Needs:
    """Reasons for which rows are not made at the same time.

    Attributes:
        after: rows that have to be done before.
        makes: what it makes unless it is there already, and others need as well, by names.
    """

    after: frozenset[Asked] = frozenset()
    makes: frozenset[str] = frozenset()


def ready(waiting: Sequence[Asked], needs: Mapping[Asked, Needs], running: Sequence[Asked]) -> Asked | None:
    """The first waiting row that nothing keeps back; None: there is none.

    Args:
        needs: of the waiting and the running rows.
    """
    busy = {name for one in running for name in needs[one].makes}
    behind = {*waiting, *running}
    for one in waiting:
        if not needs[one].after & behind and not needs[one].makes & busy:
            return one
    return None


class Hand:
    """One process; a Ray actor. Told to stop, it asks itself as a user would: a training saves and ends.

    Args:
        number: among the hands.
        threads: that it computes with.
        progress: name of the progress actor.
    """

    def __init__(self, study: Study, number: int, threads: int, progress: str):
        own = override(study.config, {"train.threads": study.config.train.threads or threads})
        self.study = replace(study, config=own, in_place=True)
        self.number, self.sender = number, Sender(progress)
        threading.Thread(target=self._listen, name="kmtr-hand", daemon=True).start()

    def here(self) -> None:
        """Answers once the cluster had room for it."""

    def make(self, function: Make, asked: Asked, done: Done) -> Finished:
        """A row; what is printed meanwhile goes to the study's screen, behind the row's name."""
        try:
            with contextlib.redirect_stdout(_Lines(lambda line: self.sender.say(f"[{asked.title}] {line}"))):
                return function(self.study, asked, done)
        finally:
            machine.give_back_memory()

    def _listen(self) -> None:
        while not (self.sender.beat(self.number, 0, "") or {}).get("stop"):
            time.sleep(BEAT_S)
        os.kill(os.getpid(), signal.SIGTERM)


class _Lines(io.TextIOBase):
    """A stream that passes on whole lines."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.rest = say, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if line.strip():
                self.say(line.rstrip())
        return len(text)


def at_once(study: Study) -> int:
    """Rows that are made side by side by hands; 0: a run has several workers, so that Ray Train makes one row after the
    other. Ray must be up.

    Raises:
        InputError: GPUs are asked for, and there are none.
    """
    import ray

    if study.config.train.workers.most > 1:
        return 0
    room.refuse_missing_gpu(study.config.train.device)
    hand, readers = _reserved(study.config)
    have = ray.cluster_resources()
    wanted = hand | {"CPU": hand["CPU"] + readers}
    return max(1, int(min(have.get(kind, 0) / number for kind, number in wanted.items() if number)))


def threads_of(study: Study) -> int:
    """Threads of a hand: the same however many rows are left, and no more than the cores of a node."""
    import ray

    cores = max((node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]), default=1)
    return max(1, int(min(ray.cluster_resources().get("CPU", 1) // max(1, at_once(study)), cores)))


def _reserved(config: RunConfig) -> tuple[room.Resources, float]:
    """Resources of a hand, and CPUs that Ray Data's readers of its run need beside it. Without a GPU it computes on a
    core of its own, however little a worker of a run reserves.
    """
    gpus = room.uses_gpus(config.train.device)
    one = room.of_worker(config, gpus=gpus)
    readers = room.reserved(config, 1, gpus=gpus)["CPU"] - one["CPU"]
    return one | {"CPU": one["CPU"] if gpus else max(1.0, one["CPU"])}, readers


def side_by_side(
    study: Study, rows: Sequence[Asked], make: Make, needs: Callable[[Asked], Needs]
) -> Iterator[Finished]:
    """Rows as they are made, in the order in which they end. One that fails is said; the others go on, but for those
    that need it.

    Args:
        needs: of a row, asked anew each time that one has ended.

    Raises:
        KmtrError: of the first row that failed, once the others are made or more than `MOST_FAILED` have failed; or a
            hand was lost too often.
        StoppedError: the command was asked to stop.
    """
    start_ray()
    import ray
    from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

    number, threads = min(at_once(study), len(rows)), threads_of(study)
    progress = f"hands-{os.getpid()}-{time.time_ns()}"
    one, _ = _reserved(study.config)
    kind = ray.remote(num_cpus=one["CPU"], num_gpus=one.get("GPU", 0))(Hand)
    waiting, lost = list(rows), 0
    running: dict[Any, tuple[Asked, Any]] = {}
    failed: list[Exception] = []
    print(f"study: {len(rows)} row(s), {number} at once; the cluster has {described()}", flush=True)
    with Display(progress, len(rows)) as display:
        hands = [kind.remote(study, place, threads, progress) for place in range(number)]
        coming, idle = {hand.here.remote(): hand for hand in hands}, list[Any]()
        began, told = time.monotonic(), False
        try:
            while waiting or running:
                busy = [asked for asked, _ in running.values()]
                found = {asked: needs(asked) for asked in (*waiting, *busy)} if idle else {}
                while idle and (asked := ready(waiting, found, busy)):
                    waiting.remove(asked)
                    busy.append(asked)
                    hand = idle.pop(0)
                    running[hand.make.remote(make, asked, study.rows.read())] = asked, hand
                # What keeps a row back may be there long before the row that makes it has ended.
                if (ended := _ended(running, coming, idle, waiting)) is None:
                    if waiting and coming and not told and time.monotonic() - began > ROOM_S:
                        told = True
                        display.line(f"study: the cluster has no room yet for {len(coming)} of {number} processes")
                    continue
                asked, hand = running.pop(ended)
                try:
                    yield ray.get(ended)
                except RayTaskError as error:
                    failed.append(_failure(error))
                    if len(failed) > MOST_FAILED:
                        display.line(f"[{asked.title}] failed: {_words(failed[-1])}; the rows under way are saved")
                        display.stop()
                        break
                    waiting = _but_left_out(asked, failed[-1], waiting, needs, display)
                except (RayActorError, OutOfMemoryError) as error:
                    lost += 1
                    _tell_lost(study, asked, lost, error, display)
                    waiting.insert(0, asked)
                    hand = kind.remote(study, number + lost, threads, progress)
                    hands.append(hand)
                    coming[hand.here.remote()] = hand
                    continue
                idle.append(hand)
        except KeyboardInterrupt:
            raise StoppedError(STOPPED) from None
        finally:
            if running and display.stopping:
                ray.wait(list(running), num_returns=len(running), timeout=STOP_S)
            for hand in hands:
                ray.kill(hand)
    if failed:
        raise failed[0]


def left_out(failed: Sequence[Asked], waiting: Sequence[Asked], needs: Callable[[Asked], Needs]) -> list[Asked]:
    """The waiting rows that need one that failed, or one that is left out, in their order."""
    found = list(failed)
    while more := [one for one in waiting if one not in found and needs(one).after & {*found}]:
        found += more
    return [one for one in waiting if one in found]


def _but_left_out(
    asked: Asked, error: Exception, waiting: Sequence[Asked], needs: Callable[[Asked], Needs], display: Display
) -> list[Asked]:
    """The rows that still wait when one has failed, with lines about that one and those that need it."""
    display.line(f"[{asked.title}] failed, and is left out: {_words(error)}")
    without = left_out([asked], waiting, needs)
    for other in without:
        display.line(f"[{other.title}] is left out: it needs the row that failed")
    return [one for one in waiting if one not in without]


def _failure(error: Any) -> Exception:
    """The error of a row that failed, as it was raised; one that was told to stop has not."""
    if isinstance(error.cause, StoppedError):
        raise error.cause from None
    return error.cause if isinstance(error.cause, KmtrError) else error


def _words(error: Exception) -> str:
    """A failure in one line: what is told to a user, or the last line of a traceback."""
    return str(error).strip().split("\n")[-1]


def _tell_lost(study: Study, asked: Asked, lost: int, error: Exception, display: Display) -> None:
    """A line about a hand that is gone; ends a study that is asked to stop, or has lost too many."""
    if display.stopping:
        raise StoppedError(STOPPED) from None
    why = "was killed, since its node had no memory left" if no_memory(error) else "is gone"
    if lost > (most := study.config.train.max_failures):
        raise KmtrError(
            f"study: the process of a row {why}; {lost} were lost, expected at most train.max_failures={most}"
        ) from None
    display.line(f"[{asked.title}] lost: its process {why}; it goes on from its last checkpoint")


def _ended(running: Mapping[Any, Any], coming: dict[Any, Any], idle: list[Any], waiting: Sequence[Asked]) -> Any | None:
    """Reference of a row that ended; None: a hand has come, which is idle now, or nothing happened for a while.

    Args:
        running, coming: references of rows, or of answers of a hand that the cluster had no room for yet.
    """
    import ray

    expected = [*running, *(coming if waiting else ())]
    ended, _ = ray.wait(expected, timeout=LOOK_S if waiting and (idle or coming) else None)
    if ended and ended[0] in coming:
        idle.append(coming.pop(ended[0]))
        return None
    return ended[0] if ended else None
