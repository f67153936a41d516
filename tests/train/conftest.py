"""A run on two workers over the small dataset."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked_workers import instead_of_ray_train

from kmtr.config import RunConfig, override
from kmtr.train import driver
from kmtr.train.folder import Outcome

TRAINED = {
    "data.loader": "ray",
    "train.workers": 2,
    "masked.steps": 6,
    "masked.warmup_steps": 2,
    "align.steps": 4,
    "train.checkpoint_every": 3,
    "train.eval_every": 5,
}


@pytest.fixture
def config(small: RunConfig, tmp_path: Path) -> RunConfig:
    """A run of 6 + 4 steps, with storage and tracking of its own."""
    return override(small, TRAINED | {"storage.root": str(tmp_path / "runs")})


LONGER = {
    "masked.steps": 18,
    "align.steps": 4,
    "train.eval_every": 11,
    "train.checkpoint_every": 5,
    "optimizer.ema": 0.9,
}
"""Steps of a run that is long enough to be interrupted."""


@pytest.fixture
def longer(config: RunConfig) -> RunConfig:
    return override(config, LONGER)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are trained by forked processes in place of Ray Train's."""
    instead_of_ray_train(monkeypatch)


@pytest.fixture(scope="session")
def undisturbed(small: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Outcome]:
    """The run that nothing happens to, on two forked workers: what interrupted ones must have the numbers of."""
    here = {"storage.root": str(tmp_path_factory.mktemp("undisturbed")), "data.loader": "threads"}
    config = override(small, TRAINED | LONGER | here)
    with pytest.MonkeyPatch.context() as patch:
        instead_of_ray_train(patch)
        return driver.resolve(config)[0], driver.fit(config, quiet=True)
