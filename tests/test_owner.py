"""One owner of a folder: refused while it lives, taken over when it is dead, here and on another machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from kmtr import owner
from kmtr.owner import owned, owning
from kmtr.types import KmtrError

HOLD = """
import sys, time
from pathlib import Path
from kmtr.owner import owning
with owning(Path(sys.argv[1]), "run x"):
    print("mine", flush=True)
    time.sleep(600)
"""


def holding(folder: Path) -> subprocess.Popen[str]:
    """Another process that owns the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    return process


def elsewhere(folder: Path, **more: Any) -> Path:
    """Claim of a process on another machine."""
    place = folder / owner.FOLDER
    place.mkdir(parents=True)
    known = {"machine": "node7 boot 1", "host": "node7", "pid": 4, "born": 0.0, "since": "yesterday"} | more
    (place / "3.json").write_text(json.dumps(known))
    return place / "3.json"


def test_a_second_process_is_refused_while_the_first_lives_and_takes_over_when_it_is_killed(tmp_path: Path) -> None:
    first = holding(tmp_path)
    assert owned(tmp_path)
    for signaled in (None, signal.SIGSTOP):  # one that stands still lives
        if signaled:
            first.send_signal(signaled)
        with (
            pytest.raises(KmtrError, match=f"^run x: process {first.pid} on .* is at work on it since") as refused,
            owning(tmp_path, "run x"),
        ):
            pass
        assert "\n" not in str(refused.value)
    first.kill()
    first.wait()
    assert not owned(tmp_path)
    with owning(tmp_path, "run x"):
        assert owned(tmp_path)
        assert len(list((tmp_path / owner.FOLDER).iterdir())) == 1
    assert not owned(tmp_path)
    with owning(tmp_path, "run x"):
        pass


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with owning(tmp_path, "run x"), pytest.raises(KmtrError, match=f"process {os.getpid()} on"), owning(tmp_path, "x"):
        pass


def test_another_machine_s_owner_is_dead_without_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(owner, "LEASE_S", 0.5)
    claim = elsewhere(tmp_path)
    assert not owned(tmp_path)
    with owning(tmp_path, "run x"):
        assert not claim.exists()
    assert "node7 has had it since yesterday; waiting 0 s for a sign of life" in caplog.messages[0]
    assert "is dead; going on" in caplog.messages[1]


def test_another_machine_s_owner_that_beats_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "LEASE_S", 60.0)
    claim = elsewhere(tmp_path)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(claim)

    thread = threading.Thread(target=beat)
    thread.start()
    alive = pytest.raises(KmtrError, match="process 4 on node7 is at work on it since yesterday")
    with alive, owning(tmp_path, "run x"):
        pass
    ended.set()
    thread.join()


def test_a_damaged_claim_needs_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "LEASE_S", 0.5)
    elsewhere(tmp_path).write_text("{")
    with owning(tmp_path, "run x"):
        pass


def test_an_owner_whose_folder_was_taken_over_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT_S", 0.05)
    lost = threading.Event()
    with owning(tmp_path, "run x", lost.set):
        (claim,) = (tmp_path / owner.FOLDER).glob("*.json")
        claim.rename(claim.with_name("8.json"))
        assert lost.wait(30)


def take(folder: Path, began: Any, wins: Any, all_told: Any) -> None:
    began.wait()
    try:
        with owning(folder, "run x"):
            wins.put(os.getpid())
            assert all_told.wait(60)  # so that none comes so late that it may have it too
    except KmtrError:
        wins.put(None)


def test_of_many_that_come_at_once_one_wins(tmp_path: Path) -> None:
    dead = elsewhere(tmp_path)
    dead.with_suffix(".released").touch()
    context = multiprocessing.get_context("fork")
    began, wins, all_told = context.Event(), context.Queue(), context.Event()
    racers = [context.Process(target=take, args=(tmp_path, began, wins, all_told)) for _ in range(8)]
    for racer in racers:
        racer.start()
    began.set()
    found = [wins.get(timeout=60) for _ in racers]
    all_told.set()
    for racer in racers:
        racer.join()
    assert sum(pid is not None for pid in found) == 1
