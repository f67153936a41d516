"""The command, the controller of its workers or the MLflow server dies or is stopped: what becomes of the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import inject
import pytest
from inject import Fault, cases, meanwhile, plant
from survived import check_survived, curve, process_of, run_of, wait_for

from kmtr import tracking
from kmtr.bench.mlflow_server import Server
from kmtr.config import RunConfig, override, to_json
from kmtr.train import driver, watch
from kmtr.train.folder import Outcome
from kmtr.train.progress import Display
from kmtr.types import KmtrError

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("faults")]

SHORT = {("SIGTERM", inject.MIDDLE)}
"""Cases that run by default."""


@pytest.mark.full
@pytest.mark.parametrize("moment", [inject.START, inject.MIDDLE, inject.SAVING, inject.LAST])
def test_a_controller_that_is_killed_is_replaced(
    moment: str,
    cluster: None,
    config: RunConfig,
    calm: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault = Fault(moment, "outside", str(tmp_path))
    plant(monkeypatch, fault)

    def kill() -> None:
        wait_for("the controller", lambda: process_of("ray::TrainController")).kill()

    with meanwhile(fault, kill):
        outcome = driver.fit(config)
    check_survived(config, outcome, calm)
    assert "the controller of the workers; all start again" in capsys.readouterr().out


def command(fault: Fault, config: RunConfig, folder: Path) -> subprocess.Popen[str]:
    import ray

    files = folder / "fault.json", folder / "config.json"
    files[0].write_text(json.dumps(asdict(fault)))
    files[1].write_text(to_json(config))
    here = Path(__file__).parent
    return subprocess.Popen(
        [sys.executable, str(here / "planted_command.py"), *map(str, files)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]),
        },
    )


@cases(SHORT, ("SIGTERM", "SIGINT", "SIGKILL"), (inject.START, inject.MIDDLE, inject.VALIDATION, inject.SAVING))
def test_the_command_is_stopped_or_killed_and_the_same_goes_on(
    deed: str, moment: str, cluster: None, config: RunConfig, calm: Outcome, tmp_path: Path
) -> None:
    fault = Fault(moment, "outside", str(tmp_path))
    running = command(fault, config, tmp_path)
    wait_for(moment, lambda: fault.happened.exists() or running.poll() is not None)
    with pytest.raises(KmtrError, match=f"process {running.pid} on .* is at work on it"):
        driver.fit(config, quiet=True)  # one owner
    running.send_signal(getattr(signal, deed))
    if deed != "SIGKILL":
        assert running.stdout is not None
        line = ""
        while "stopping" not in line:
            line = running.stdout.readline()
            assert line, "it ended without a word"
        time.sleep(4 * watch.BEAT_S)  # a worker has heard of it; the steps that are left take less than a beat
    fault.done.touch()
    _, error = running.communicate(timeout=300)
    if deed != "SIGKILL":
        assert running.returncode == 1
        first = error.splitlines()[0]
        assert "which is saved; the same command goes on from there" in first
        assert run_of(config)[1] == "KILLED"
    check_survived(config, driver.fit(config, quiet=True), calm)


@pytest.mark.full
def test_a_second_signal_ends_a_command_whose_workers_do_not_answer(
    cluster: None, config: RunConfig, calm: Outcome, tmp_path: Path
) -> None:
    fault = Fault(inject.MIDDLE, "hangs", str(tmp_path))
    running = command(fault, config, tmp_path)
    wait_for("the fault", lambda: fault.happened.exists() or running.poll() is not None)
    assert running.stdout is not None
    running.send_signal(signal.SIGINT)
    while "stopping" not in running.stdout.readline():
        pass
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "interrupted; the same command goes on from its last checkpoint" in error
    assert run_of(config)[1] == "KILLED"
    check_survived(config, driver.fit(config, quiet=True), calm)


@pytest.mark.full
def test_a_preemption_notice_saves_and_training_goes_on(
    cluster: None, config: RunConfig, calm: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 6 is held when the notice comes; checkpoints are due behind steps 4 and 8."""
    fault = Fault(inject.MIDDLE, "outside", str(tmp_path))
    plant(monkeypatch, fault)
    displays: list[Display] = []

    class Seen(Display):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            displays.append(self)

    monkeypatch.setattr(driver, "Display", Seen)

    def notify() -> None:
        displays[0].mailbox.save.remote()
        time.sleep(3 * watch.BEAT_S)  # every worker has heard of it

    with meanwhile(fault, notify):
        outcome = driver.fit(config, quiet=True)
    check_survived(config, outcome, calm)
    saved = [step for step, _ in curve(config, outcome.run_id, "run/checkpoint_stall_s")]
    assert saved == [4, 7, 8, 10]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path)
    found.start()
    found.wait_until_up()
    yield found
    found.kill()


@pytest.mark.full
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("moment", [inject.START, inject.MIDDLE, inject.SAVING, inject.LAST])
def test_an_mlflow_server_that_is_killed_costs_no_record(
    moment: str,
    back: bool,
    cluster: None,
    server: Server,
    config: RunConfig,
    calm: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`back`: the server is there again before the run ends; else the same command sends what it lacks."""
    config = override(config, {"tracking.uri": server.uri})
    fault = Fault(moment, "outside", str(tmp_path))
    plant(monkeypatch, fault)
    if not back:
        monkeypatch.setattr(driver, "SEND_S", 2.0)

    def kill() -> None:
        server.kill()
        if back:
            server.start()

    with meanwhile(fault, kill):
        outcome = driver.fit(config, quiet=True)
    if not back:
        assert "and the end of this run" in caplog.text
        server.start()
        server.wait_until_up()
        assert run_of(config)[1] == "RUNNING", "MLflow does not have all of it yet"
        monkeypatch.setattr(driver, "SEND_S", 60.0)
        assert driver.fit(config, quiet=True).reused
        assert "MLflow has all of it now" in caplog.text
    check_survived(config, outcome, calm)


@pytest.mark.full
def test_a_run_goes_on_where_mlflow_is_away_from_the_start(
    cluster: None, server: Server, config: RunConfig, calm: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(config, {"tracking.uri": server.uri})
    fault = Fault(inject.MIDDLE, "raises", str(tmp_path))
    plant(monkeypatch, fault)
    with pytest.raises(KmtrError, match="planted"):
        driver.fit(config, quiet=True)
    server.kill()
    monkeypatch.setattr(driver, "SEND_S", 2.0)
    outcome = driver.fit(config, quiet=True)
    server.start()
    server.wait_until_up()
    assert tracking.replay(Path(outcome.folder) / driver.SPOOL, server.uri, 60.0) == 0
    check_survived(config, outcome, calm)
    assert len(curve(config, outcome.run_id, "masked/loss")) == 10
