"""Asked of a run that something happened to."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from kmtr import tracking
from kmtr.config import RunConfig
from kmtr.tracking.store import client
from kmtr.train import driver
from kmtr.train.folder import Outcome

T = TypeVar("T")
PATIENCE_S = 300.0


def run_of(config: RunConfig) -> tuple[str, str]:
    """Id and status of the only run in MLflow."""
    store = client(tracking.tracking_uri(config))
    (found,) = store.search_runs([store.get_experiment_by_name("kmtr").experiment_id])
    return found.info.run_id, found.info.status


def curve(config: RunConfig, run_id: str, name: str) -> list[tuple[int, float]]:
    points = client(tracking.tracking_uri(config)).get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


def check_survived(config: RunConfig, outcome: Outcome, calm: Outcome) -> None:
    """The run has the numbers of one to which nothing happened, each step once, and MLflow says FINISHED."""
    assert outcome.metrics == pytest.approx(calm.metrics, rel=1e-6)
    assert run_of(config) == (outcome.run_id, "FINISHED")
    losses = curve(config, outcome.run_id, "masked/loss")
    theirs = tracking.history(Path(calm.folder) / driver.SPOOL)["masked/loss"]
    assert [step for step, _ in losses] == [step for step, _ in theirs]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in theirs], rel=1e-6)
    artifacts = client(tracking.tracking_uri(config)).list_artifacts(outcome.run_id, "encoder")
    assert {file.path for file in artifacts} == {"encoder/encoder.safetensors", "encoder/encoder.json"}


def wait_for(what: str, found: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """What `found` returns as soon as that is something."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if result := found():
            return result
        time.sleep(0.05)
    raise TimeoutError(what)


def process_of(title: str) -> psutil.Process | None:
    """The newest process of this one's Ray with such a title: one of an earlier run may be about to end."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                found.append((process.create_time(), process))
    return max(found, key=lambda one: one[0])[1] if found else None
