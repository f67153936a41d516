"""The spool: all metrics reach MLflow exactly once, whatever dies, and training never waits for it."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from urllib3.connectionpool import HTTPConnectionPool

from kmtr.bench.mlflow_server import Server
from kmtr.config import RunConfig, override
from kmtr.tracking import Spool, open_run, replay, tracking_uri
from kmtr.tracking.store import client
from kmtr.types import InputError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return override(
        RunConfig(recipe="tiny"),
        {"storage.root": str(root := tmp_path_factory.mktemp("runs")), "tracking.uri": f"sqlite:///{root}/mlflow.db"},
    )


def points(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of every point that MLflow holds, in order of steps."""
    return sorted((m.step, m.value) for m in client(uri).get_metric_history(run_id, name))


def test_metrics_and_files_arrive(config: RunConfig, tmp_path: Path) -> None:
    uri, run_id = tracking_uri(config), open_run(config, name="arrive")
    (tmp_path / "note.txt").write_text("first")
    spool = Spool(tmp_path / "spool", uri, run_id)
    for step in range(3):
        spool.metrics(step, {"loss": 1.0 / (step + 1), "retrieval/top1": np.float32(0.5)})
    spool.artifact(tmp_path / "note.txt", "report")
    (tmp_path / "note.txt").write_text("changed later")
    assert spool.close(30.0) == 0
    assert points(uri, run_id, "loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert points(uri, run_id, "retrieval/top1") == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert Path(client(uri).download_artifacts(run_id, "report/note.txt")).read_text() == "first"
    assert not list((tmp_path / "spool" / "staged").iterdir())


def test_one_that_only_keeps_leaves_all_to_the_next(config: RunConfig, tmp_path: Path) -> None:
    uri, run_id = tracking_uri(config), open_run(config, name="kept")
    (tmp_path / "note.txt").write_text("first")
    spool = Spool(tmp_path / "spool", uri, run_id, ships=False)
    spool.metrics(0, {"loss": 1.0})
    spool.artifact(tmp_path / "note.txt")
    assert spool.close(30.0) == 2
    assert points(uri, run_id, "loss") == []
    assert Spool(tmp_path / "spool", uri, run_id).close(30.0) == 0
    assert points(uri, run_id, "loss") == [(0, 1.0)]
    assert Path(client(uri).download_artifacts(run_id, "note.txt")).read_text() == "first"


def test_shipped_twice_is_kept_once(config: RunConfig, tmp_path: Path) -> None:
    """What a process sent that died before it moved the cursor: the same points again, not finite ones too."""
    uri, run_id = tracking_uri(config), open_run(config, name="twice")
    spool = Spool(tmp_path, uri, run_id)
    for step, value in enumerate([1.0, math.nan, math.inf, -math.inf]):
        spool.metrics(step, {"loss": value})
    assert spool.close(30.0) == 0
    (tmp_path / "cursor.json").unlink()
    assert replay(tmp_path, uri) == 0
    assert [step for step, _ in points(uri, run_id, "loss")] == [0, 1, 2, 3]
    assert math.isnan(points(uri, run_id, "loss")[1][1])


def test_more_than_a_batch(config: RunConfig, tmp_path: Path) -> None:
    uri, run_id = tracking_uri(config), open_run(config, name="many")
    spool = Spool(tmp_path, uri, run_id)
    spool.metrics(0, {f"wide.{i}": i for i in range(1500)})
    for step in range(1200):
        spool.metrics(step, {"loss": step, "rate": -step})
    assert spool.close(60.0) == 0
    assert len(client(uri).get_run(run_id).data.metrics) == 1502
    assert points(uri, run_id, "rate") == sorted((step, -float(step)) for step in range(1200))


def test_a_restart_does_not_record_a_step_again(config: RunConfig, tmp_path: Path) -> None:
    uri, run_id = tracking_uri(config), open_run(config, name="restart")
    first = Spool(tmp_path, uri, run_id)
    for step in range(5):
        first.metrics(step, {"loss": float(step)})
    assert first.close(30.0) == 0
    second = Spool(tmp_path, uri, run_id)
    for step in range(3, 8):  # trained again from the checkpoint of step 3
        second.metrics(step, {"loss": float(step), "new": 1.0})
    assert second.close(30.0) == 0
    assert points(uri, run_id, "loss") == [(step, float(step)) for step in range(8)]
    assert [step for step, _ in points(uri, run_id, "new")] == [3, 4, 5, 6, 7]


def test_a_killed_process_loses_nothing_that_it_recorded(config: RunConfig, tmp_path: Path) -> None:
    uri, run_id = tracking_uri(config), open_run(config, name="killed")
    program = (
        "import os, signal, sys; from kmtr.tracking import Spool\n"
        "spool = Spool(*sys.argv[1:])\n"
        "for step in range(50): spool.metrics(step, {'loss': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path), uri, run_id], check=False)
    assert done.returncode == -signal.SIGKILL
    with (tmp_path / "spool.jsonl").open("a") as file:
        file.write('{"t": 1, "step": 50, "metr')  # a write that the kill cut
    assert replay(tmp_path, uri) == 0
    assert points(uri, run_id, "loss") == [(step, float(step)) for step in range(50)]
    spool = Spool(tmp_path, uri, run_id)
    spool.metrics(50, {"loss": 50.0})
    assert spool.close(30.0) == 0
    assert points(uri, run_id, "loss")[-1] == (50, 50.0)


def test_a_damaged_line_does_not_stop_the_rest(config: RunConfig, tmp_path: Path) -> None:
    uri, run_id = tracking_uri(config), open_run(config, name="damaged")
    record = json.dumps({"t": 1, "step": 1, "metrics": {"loss": 1.0}})
    (tmp_path / "spool.jsonl").write_text(f'{{"run_id": "{run_id}"}}\n{{"t": \x00\n[]\n{record}\n')
    assert replay(tmp_path, uri) == 0
    assert points(uri, run_id, "loss") == [(1, 1.0)]


def test_a_refused_file_does_not_hold_up_metrics(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri, run_id = tracking_uri(config), open_run(config, name="refused")
    (tmp_path / "x.txt").touch()
    spool = Spool(tmp_path / "spool", uri, run_id)
    with caplog.at_level(logging.WARNING, "kmtr"):
        spool.artifact(tmp_path / "x.txt", "../outside")  # MLflow refuses this path
        spool.metrics(0, {"loss": 1.0})
        assert spool.close(4.0) == 1
    assert points(uri, run_id, "loss") == [(0, 1.0)]
    assert len(caplog.messages) == 1
    assert "takes no files now" in caplog.text


def test_a_node_that_cannot_see_the_sqlite_file_makes_no_other(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", f"sqlite:///{tmp_path}/elsewhere/mlflow.db", "a" * 32)
    spool.metrics(0, {"loss": 1.0})
    assert spool.close(0.5) == 1
    assert not (tmp_path / "elsewhere").exists()


def test_a_full_disk_is_told_once_and_nothing_is_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = Spool(tmp_path, "http://127.0.0.1:9", "a" * 32)
    os.dup2(full := os.open("/dev/full", os.O_WRONLY), spool._file)  # every write to it fails with "no space left"
    os.close(full)
    for step in range(3):
        spool.metrics(step, {"loss": 1.0})
    assert spool.close(0.1) == 0
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "training goes on" in caplog.text


def test_bad_input_is_refused(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "http://127.0.0.1:9", "a" * 32)
    with pytest.raises(InputError, match="metric name"):
        spool.metrics(0, {"a,b": 1.0})
    with pytest.raises(InputError, match="expected a file"):
        spool.artifact(tmp_path / "missing")
    spool.close(0.0)
    with pytest.raises(InputError, match="expected that of run"):
        Spool(tmp_path, "http://127.0.0.1:9", "b" * 32)


def test_nothing_to_replay(tmp_path: Path) -> None:
    assert replay(tmp_path / "none", "http://127.0.0.1:9") == 0


@pytest.mark.slow
def test_a_server_killed_in_mid_run_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path)
    server.start()
    try:
        server.wait_until_up()
        config = override(RunConfig(), {"storage.root": str(tmp_path), "tracking.uri": server.uri})
        run_id = open_run(config, name="server")
        spool = Spool(tmp_path / "spool", server.uri, run_id)
        step, callers, request = 0, set(), HTTPConnectionPool.urlopen

        def urlopen(*args: Any, **kwargs: Any) -> Any:
            callers.add(threading.current_thread())
            return request(*args, **kwargs)

        def train_until(happened: Callable[[], bool]) -> None:
            nonlocal step
            began = step
            while step < began + 20 or not happened():
                spool.metrics(step, {"loss": float(step), "lr": math.nan if step == 5 else 1e-3})
                step += 1
                time.sleep(0.05)

        monkeypatch.setattr(HTTPConnectionPool, "urlopen", urlopen)
        train_until(lambda: spool._shipper.pending() < step)
        server.kill()
        train_until(lambda: any("training goes on" in message for message in caplog.messages))
        assert spool._shipper.pending() > 0
        server.start()
        train_until(lambda: True)
        (tmp_path / "note.txt").write_text("hello")
        spool.artifact(tmp_path / "note.txt", "report")
        assert len(callers) == 1
        assert threading.current_thread() not in callers, "training waits for no network"
        server.wait_until_up()
        assert spool.close(120.0) == 0
        assert [n for n, _ in points(server.uri, run_id, "loss")] == list(range(step))
        assert [n for n, _ in points(server.uri, run_id, "lr")] == list(range(step))
        (file,) = client(server.uri).list_artifacts(run_id, "report")
        assert file.path == "report/note.txt"
        told = [m for m in caplog.messages if m.startswith("MLflow at")]
        assert "training goes on" in told[0]
        assert "answers again" in told[-1]
    finally:
        server.kill()
