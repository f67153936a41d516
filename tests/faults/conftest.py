"""A run that faults are planted in, what it must say without them, and the count of those that it survived."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked_workers import instead_of_ray_train

from kmtr.config import RunConfig, override
from kmtr.train import driver
from kmtr.train.folder import Outcome

STEPS = {
    "data.loader": "threads",
    "train.workers": 2,
    "train.threads": 1,
    "masked.steps": 10,
    "masked.warmup_steps": 2,
    "align.steps": 0,
    "stage": "masked",
    "train.checkpoint_every": 4,
    "train.eval_every": 5,
    "train.silent_s": 0.0,  # nothing is lost because the machine is busy; tests of these turn them on
    "train.hang_s": 0.0,
}


@pytest.fixture
def config(small: RunConfig, tmp_path: Path) -> RunConfig:
    return override(small, STEPS | {"storage.root": str(tmp_path / "runs")})


@pytest.fixture(scope="session")
def calm(small: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run to which nothing happens, on forked workers."""
    config = override(small, STEPS | {"storage.root": str(tmp_path_factory.mktemp("calm"))})
    with pytest.MonkeyPatch.context() as patch:
        instead_of_ray_train(patch)
        return driver.fit(config, quiet=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The last line of `make faults`."""
    passed = [r for r in terminalreporter.getreports("passed") if r.when == "call" and "faults/" in r.nodeid]
    failed = [r for r in terminalreporter.getreports("failed") if "faults/" in r.nodeid]
    if passed or failed:
        said = {"cases": len(passed) + len(failed), "survived": len(passed)}
        terminalreporter.write_line(json.dumps(said))
