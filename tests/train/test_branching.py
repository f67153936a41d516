"""A run that pauses and goes on, and one that branches off another's checkpoint with other settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import content, history, written
from forked_workers import instead_of_ray_train
from safetensors.torch import load_file

from kmtr import tracking
from kmtr.config import RunConfig, override
from kmtr.tracking.store import client
from kmtr.train import driver
from kmtr.types import InputError

STEPS = {
    "masked.steps": 8,
    "masked.warmup_steps": 2,
    "align.steps": 0,
    "train.checkpoint_every": 3,
    "train.eval_every": 4,
}


@pytest.fixture
def config(small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    instead_of_ray_train(monkeypatch)
    changes = {"stage": "masked", "train.workers": 2, "train.log_every": 1, "storage.root": str(tmp_path)}
    return override(small, {**STEPS, **changes})


@pytest.mark.full
def test_a_run_that_pauses_is_the_run(config: RunConfig, tmp_path: Path) -> None:
    config = override(config, {"train.workers": 1})
    whole = driver.fit(override(config, {"run.name": "whole"}), quiet=True)
    parts = []
    for until in (5, 0):
        parts.append(driver.fit(override(config, {"run.name": "parts", "train.until": until}), quiet=True))
        ended = client(tracking.tracking_uri(config)).get_run(parts[-1].run_id).info.status
        assert ended == ("FINISHED" if until == 0 else "RUNNING")
    assert [int(part.metrics["step"]) for part in parts] == [5, 8]
    assert [bool(part.encoder) for part in parts] == [False, True]
    assert len({part.run_id for part in parts}) == 1
    assert history(tmp_path / "parts") == history(tmp_path / "whole")
    assert parts[-1].metrics == whole.metrics
    of_whole, of_parts = (load_file(Path(one.encoder) / "encoder.safetensors") for one in (whole, parts[-1]))
    for name, value in of_whole.items():
        np.testing.assert_array_equal(of_parts[name].numpy(), value.numpy())


full = pytest.mark.full


@pytest.mark.parametrize(
    ("donor", "child"),
    [(1, 2), pytest.param(0, 0, marks=full), pytest.param(2, 3, marks=full), pytest.param(3, 1, marks=full)],
    ids=lambda stage: f"zero{stage}",
)
def test_a_branch_begins_as_its_donor_and_goes_its_own_way(
    config: RunConfig, tmp_path: Path, donor: int, child: int
) -> None:
    """At every ZeRO stage, also another one than the donor's; the changed key alters the learning rate's schedule."""
    asked = override(config, {"run.name": "donor", "train.zero_stage": donor, "train.until": 4})
    driver.fit(asked, quiet=True)
    begin = written(tmp_path / "donor")[-1]
    changes = {"run.begin": str(begin), "train.zero_stage": child, "train.until": 0, "masked.learning_rate": 3e-4}
    branch = override(asked, changes | {"run.name": "child"})

    outcome = driver.fit(branch, quiet=True)
    of_child, of_donor = content(written(tmp_path / "child")[0]), content(begin)
    assert of_child.keys() == of_donor.keys()
    assert sum(bool(np.any(value)) for value in of_donor.values()) > 100
    for name, value in of_donor.items():
        np.testing.assert_array_equal(of_child[name], value)

    assert int(outcome.metrics["step"]) == 8
    assert sorted(history(tmp_path / "child")) == [5, 6, 7, 8]

    same = driver.fit(
        override(branch, {"run.name": "same", "masked.learning_rate": asked.masked.learning_rate}), quiet=True
    )
    rest = driver.fit(override(asked, {"train.until": 0}), quiet=True)
    assert same.metrics == pytest.approx(rest.metrics, rel=1e-4)
    own, donors = history(tmp_path / "child"), history(tmp_path / "donor")
    assert own[5] == pytest.approx(donors[5], rel=1e-5)  # the loss before the first step: the donor's weights
    assert own[6] != pytest.approx(donors[6], rel=1e-5)  # another rate took that step
    rates = history(tmp_path / "child", "masked/learning_rate")
    whole = history(tmp_path / "donor", "masked/learning_rate")
    for step in (5, 6, 7):
        assert rates[step] / whole[step] == pytest.approx(3e-4 / asked.masked.learning_rate)


def test_a_branch_that_can_not_be_is_refused(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.begin: expected a run\.name beside it"):
        override(config, {"run.begin": "/somewhere"})
    named = override(config, {"run.name": "child", "run.begin": str(tmp_path / "nowhere")})
    with pytest.raises(InputError, match=r"run\.begin: expected a run's checkpoint"):
        driver.fit(named, quiet=True)
    driver.fit(override(config, {"run.name": "donor", "train.until": 2}), quiet=True)
    begin = written(tmp_path / "donor")[-1]
    other = override(config, {"run.name": "child", "run.begin": str(begin), "model.depth": config.model.depth + 1})
    with pytest.raises(Exception, match="it is another model's"):
        driver.fit(other, quiet=True)
    (begin / "checkpoint.json").write_text(json.dumps({}))
    with pytest.raises(Exception, match="checkpoint"):
        driver.fit(override(config, {"run.name": "second", "run.begin": str(begin)}), quiet=True)
