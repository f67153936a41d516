"""When workers count as lost or stuck, by their signs of life alone; times are made up."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kmtr.train import progress, watch
from kmtr.train.agreed import NOTHING, SAVE, STOP
from kmtr.train.progress import Mailbox
from kmtr.train.watch import Pulse, Watch, lost_peer, where


def watched(silent_s: float = 30.0, hang_s: float = 100.0) -> Watch:
    return Watch(silent_s, hang_s)


def test_a_silent_worker_is_lost_and_the_others_are_told_of() -> None:
    seen = watched()
    seen.beat("a", 0, 1, "waiting for the others at x.py:1 (f)", 0.0)
    seen.beat("a", 1, 1, "at y.py:2 (g)", 0.0)
    for now in map(float, range(1, 31)):
        seen.beat("a", 0, 1, "waiting for the others at x.py:1 (f)", now)
        assert seen.judge(now) == ("", ())
    line, ranks = seen.judge(31.0)
    assert ranks == (1,)
    assert line == (
        "no sign of life of worker 1 for 30 s: worker 0 is waiting for the others at x.py:1 (f); worker 1 was last at "
        "y.py:2 (g)"
    )
    assert seen.judge(32.0) == ("", ()), "it is said once"


def test_nobody_hangs_as_long_as_one_worker_moves() -> None:
    seen = watched()
    for now in map(float, range(300)):
        seen.beat("a", 0, 0, "waiting", now)
        seen.beat("a", 1, int(now) // 90, "at work", now)
        assert seen.judge(now) == ("", ())
    for now in map(float, range(300, 371)):  # it moved last at 270
        assert seen.judge(now) == ("", ())
        seen.beat("a", 0, 0, "waiting", now)
        seen.beat("a", 1, 3, "at work", now)
    line, ranks = seen.judge(371.0)
    assert ranks == (0, 1)
    assert line.startswith("no worker has finished anything for 100 s: worker 0 is waiting; worker 1 is at work")


def test_a_machine_that_slept_loses_nobody() -> None:
    seen = watched()
    for rank in range(2):
        seen.beat("a", rank, 1, "there", 0.0)
    assert seen.judge(1.0) == ("", ())
    assert seen.judge(5000.0) == ("", ())
    for now in map(float, range(5001, 5035)):
        seen.beat("a", 0, 1, "there", now)
        if now == 5002:
            assert seen.judge(now) == ("", ())
    found = [seen.judge(now)[1] for now in map(float, range(5003, 5050))]
    assert (1,) in found, "one that stays silent afterwards is lost all the same"


def test_workers_of_an_earlier_group_and_those_that_left_are_not_waited_for() -> None:
    seen = watched()
    for rank in range(4):
        seen.beat("a", rank, 1, "there", 0.0)
    seen.beat("b", 0, 0, "there", 1.0)
    seen.beat("b", 1, 0, "there", 1.0)
    seen.leave(1)
    for now in map(float, range(2, 60)):
        seen.beat("b", 0, int(now), "there", now)
        assert seen.judge(now) == ("", ())


def test_silence_and_standstill_may_each_be_allowed() -> None:
    silence, standstill = watched(silent_s=0.0), watched(hang_s=0.0)
    for now in map(float, range(100)):
        silence.beat("a", 0, int(now), "there", now)
        if not now:
            silence.beat("a", 1, 0, "there", now)
        standstill.beat("a", 0, 0, "there", now)
        assert silence.judge(now) == standstill.judge(now) == ("", ())
    for now in map(float, range(100, 300)):
        standstill.beat("a", 0, 0, "there", now)
        assert standstill.judge(now) == ("", ())


def test_a_pulse_tells_where_its_thread_is_and_hears_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BEAT_S", 0.02)
    monkeypatch.setattr(watch, "LEAVE_S", 0.2)
    told: list[tuple[int, str]] = []
    orders: dict[str, Any] = {}
    left, ended = threading.Event(), threading.Event()

    def tell(moves: int, place: str) -> dict[str, Any]:
        told.append((moves, place))
        return orders

    pulse = Pulse(tell, left.set, ended.set)
    until(lambda: len(told) > 1)
    pulse.moved()
    until(lambda: told[-1][0] == 1)
    assert pulse.wish == NOTHING
    orders["saves"] = 1
    until(lambda: pulse.wish == SAVE)
    pulse.answered()
    assert pulse.wish == NOTHING, "once"
    orders["saves"] = 2
    until(lambda: pulse.wish == SAVE)
    orders["stop"] = True
    until(lambda: pulse.wish == STOP)
    assert not left.is_set()
    orders["failure"] = "another worker's error"
    assert left.wait(30)
    assert ended.wait(30)
    pulse.close()


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_while_python_looks_at_its_threads(
    collects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a finalizer that lets another thread run can make the process wait for ever."""
    seen, frames = [], sys._current_frames

    def collections() -> int:
        return sum(int(one["collections"]) for one in gc.get_stats())

    def counted() -> dict[int, Any]:
        before = collections()
        found = frames()
        seen.append(collections() - before)
        return found

    monkeypatch.setattr(sys, "_current_frames", counted)
    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        if not collects:
            gc.disable()
        for _ in range(50):
            where(threading.get_ident())
        assert gc.isenabled() is collects, "as it was"
    finally:
        gc.enable()
        gc.set_threshold(*threshold)
    assert seen == [0] * 50


def test_the_place_of_a_thread_is_its_innermost_line_of_ours() -> None:
    threads: list[int] = []
    stop = threading.Event()

    def tell(_: int, __: str) -> dict[str, Any]:
        threads.append(threading.get_ident())
        if len(threads) == 2:
            stop.wait(60)
        return {}

    pulse = Pulse(tell, stop.set, stop.set)
    until(lambda: len(threads) == 2)
    assert threads[0] == threading.get_ident(), "the first sign is given before anything else"
    place = where(threads[1])
    assert place.startswith("at kmtr/train/watch.py:")
    assert place.endswith("(_beat)")
    assert where(-1) == "outside our code"
    stop.set()
    pulse.close()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:7894"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1."), True),
        (torch.distributed.DistBackendError("any"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("gloo"), False),
    ],
)
def test_an_error_that_only_says_that_another_worker_left(error: Exception, expected: bool) -> None:
    assert lost_peer(error) is expected


def test_a_collective_operation_without_its_group_says_nothing_of_its_own() -> None:
    """Ray ends the groups of workers whose controller has failed, which then has the reason."""
    from deepspeed import comm

    for operation in (torch.distributed.barrier, comm.barrier, comm.get_rank):
        with pytest.raises((AssertionError, AttributeError, ValueError)) as caught:
            operation()
        assert lost_peer(caught.value)


def test_workers_of_a_group_that_was_given_up_are_not_listened_to() -> None:
    """They live on for a moment when their controller has died, and fail then since it is gone."""
    mailbox = Mailbox(30.0, 100.0)
    mailbox.beat("a", 0, 1, "there", None)
    mailbox.restarted()
    mailbox.fail("a", "ActorDiedError: the controller's")
    mailbox.settle("a")
    assert mailbox.beat("a", 0, 2, "there", None) == {}
    mailbox.beat("b", 0, 0, "there", None)
    assert mailbox.beat("b", 0, 1, "there", None) == {"stop": False, "saves": 0, "failure": ""}
    assert (mailbox.first_failure(), mailbox.settled()) == ("", "")


def test_a_failure_for_which_others_had_to_be_ended_stays_the_reason() -> None:
    mailbox = Mailbox(30.0, 100.0)
    for rank in range(2):
        mailbox.beat("a", rank, 1, "there", None)
    mailbox.fail("a", "connection closed by peer", lost_peer=True)
    assert mailbox.beat("a", 0, 1, "there", None)["failure"] == "connection closed by peer", "the others leave too"
    mailbox.settle("a")
    assert mailbox.settled() == "", "but it is no reason not to start again"
    mailbox.fail("a", "out of memory")
    assert mailbox.beat("a", 0, 1, "there", None)["failure"] == "out of memory"
    assert mailbox.first_failure() == "out of memory"
    mailbox.settle("a")
    mailbox.restarted()
    assert mailbox.settled() == "out of memory"


def test_what_workers_said_of_a_loss_that_is_survived_is_forgotten() -> None:
    mailbox = Mailbox(30.0, 100.0)
    mailbox.beat("a", 0, 1, "there", None)
    mailbox.fail("a", "connection closed by peer", lost_peer=True)
    mailbox.restarted()
    assert mailbox.first_failure() == ""
    assert mailbox.settled() == ""


def test_a_silent_worker_is_ended_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    ended: list[str] = []
    now = [0.0]
    monkeypatch.setattr(ray, "kill", ended.append)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    mailbox = Mailbox(3.0, 0.0)
    mailbox.beat("a", 0, 1, "there", "first")
    mailbox.beat("a", 1, 1, "elsewhere", "second")
    for second in range(1, 6):
        now[0] = float(second)
        mailbox.beat("a", 0, second, "there", "first")
    assert ended == ["second"]
    (line,) = mailbox.drain()
    assert "no sign of life of worker 1 for 3 s" in line
    assert mailbox.drain() == []
