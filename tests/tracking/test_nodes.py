"""Readings of a node in a real SQLite store: one chart of each quantity, and steps that go on after a restart."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kmtr.config import RunConfig, override
from kmtr.tracking import history, nodes, open_run, readings, send_rest, tracking_uri, unsent
from kmtr.tracking.store import client

CPU = "system/node3/cpu_utilization_percentage"


def read_until(folder: Path, uri: str, run_id: str, count: int) -> list[tuple[int, float]]:
    """Readings of node 3 on disk, at least so many."""
    deadline = time.monotonic() + 60
    with readings(folder, uri, run_id, 3, 0.05):
        while len(found := history(folder / "spool-node3").get(CPU, [])) < count and time.monotonic() < deadline:
            time.sleep(0.05)
    return found


def test_every_quantity_once_and_steps_go_on(small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = override(small, {"storage.root": str(tmp_path)})
    uri = tracking_uri(config)
    run_id = open_run(config, name="read")
    first = read_until(tmp_path / "read", uri, run_id, 2)
    again = read_until(tmp_path / "read", uri, run_id, len(first) + 2)
    assert [step for step, _ in again] == list(range(len(again)))
    assert again[: len(first)] == first
    assert send_rest(tmp_path / "read", uri, 30.0) == 0
    kept = client(uri).get_run(run_id).data.metrics
    names = {name.removeprefix("system/node3/") for name in kept if not name.startswith("system/node3/gpu")}
    assert names == {
        "cpu_utilization_percentage",
        "system_memory_usage_megabytes",
        "network_receive_megabytes",
        "network_transmit_megabytes",
    }
    assert kept["system/node3/system_memory_usage_megabytes"] > 10


def test_a_store_that_is_away_keeps_the_readings_for_later(
    small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(nodes, "LEAVE_S", 0.1)
    config = override(small, {"storage.root": str(tmp_path)})
    uri = tracking_uri(config)
    run_id = open_run(config, name="away")
    read_until(tmp_path / "away", "http://127.0.0.1:9", run_id, 2)
    spool = tmp_path / "away" / "spool-node3"
    assert unsent(spool) >= 2
    assert send_rest(tmp_path / "away", uri, 30.0) == 0
    assert len(client(uri).get_metric_history(run_id, CPU)) == len(history(spool)[CPU])


def test_a_collector_that_fails_costs_training_nothing(
    small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ValueError("a driver of another version")

    monkeypatch.setattr(nodes, "_collectors", broken)
    with readings(tmp_path / "broken", f"sqlite:///{tmp_path / 'm.db'}", "0" * 32, 0, 0.05):
        pass
    assert "no readings of node 0 any more: ValueError: a driver of another version" in caplog.text
