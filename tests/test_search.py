"""Trials of a search: pure, within their ranges, valid, and the start of a longer search; the ledger keeps them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from kmtr.config import RunConfig, override
from kmtr.config.recipes import tiny
from kmtr.types import InputError
from tune import space
from tune.ledger import STATE, Ledger


def config_of(**changes: object) -> RunConfig:
    return override(tiny(), {"search.trials": 60, **changes})


def test_trials_are_a_pure_function_of_seed_and_number() -> None:
    np.random.seed(1)  # noqa: NPY002  the global state must not matter
    first = space.trials(config_of())
    np.random.seed(2)  # noqa: NPY002
    assert space.trials(config_of()) == first
    assert space.trials(config_of(**{"search.trials": 7})) == first[:7]
    assert space.trials(config_of(seed=1)) != first


def test_every_trial_is_within_its_ranges_and_a_valid_configuration() -> None:
    config = config_of()
    for values in space.trials(config):
        trial = override(config, values)
        assert config.search.temperature[0] <= trial.align.temperature <= config.search.temperature[1]
        assert config.search.mask_ratio[0] <= trial.masked.mask_ratio <= config.search.mask_ratio[1]
        assert len(trial.sampling.accelerations) == 1
        assert trial.sampling.accelerations[0] in config.search.accelerations


def test_trials_differ_and_cover_the_space_evenly() -> None:
    config = config_of()
    drawn = space.trials(config)
    assert len({str(values) for values in drawn}) == len(drawn)
    low, high = np.log(config.search.temperature)
    for u in (
        (np.log([values["align.temperature"] for values in drawn]) - low) / (high - low),  # log-uniform
        (np.array([values["masked.mask_ratio"] for values in drawn]) - 0.3) / 0.6,
    ):
        # Kolmogorov's distance to the uniform distribution; 60 independent draws have 0.11 on average
        assert np.abs(np.sort(u) - (np.arange(60) + 0.5) / 60).max() < 0.06
    for start in range(0, 60, 3):
        block = [values["sampling.accelerations"] for values in drawn[start : start + 3]]
        assert sorted(block) == [(4,), (8,), (12,)]


def test_a_temperature_is_searched_only_where_a_step_aligns() -> None:
    drawn = space.trials(config_of(stage="masked"))
    assert set(drawn[0]) == {"masked.mask_ratio", "sampling.accelerations"}
    assert [v["masked.mask_ratio"] for v in drawn] == [v["masked.mask_ratio"] for v in space.trials(config_of())]


def test_a_fixed_value_is_a_range_of_one() -> None:
    drawn = space.trials(config_of(**{"search.temperature": "0.1,0.1", "search.accelerations": "8"}))
    assert {values["align.temperature"] for values in drawn} == {0.1}
    assert {values["sampling.accelerations"] for values in drawn} == {(8,)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"search.temperature": "0.3,0.03"}, "search.temperature"),
        ({"search.temperature": "0,0.3"}, "search.temperature"),
        ({"search.mask_ratio": "0.5,1.0"}, "search.mask_ratio"),
        ({"search.accelerations": ""}, "search.accelerations"),
        ({"search.accelerations": "4,32"}, "R = 32 leaves 2 of 64 lines"),
    ],
)
def test_impossible_spaces_are_refused_before_a_trial_starts(changes: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        space.trials(config_of(**changes))


def test_a_ledger_goes_on_where_it_was_and_is_done_when_all_ended(tmp_path: Path) -> None:
    drawn = [{"masked.mask_ratio": 0.1 * n, "sampling.accelerations": (4,)} for n in range(1, 4)]
    ledger = Ledger(tmp_path / "search", "s", drawn[:2])
    assert not (tmp_path / "search").exists()  # looking writes nothing
    ledger.update(0, reports=((2, 0.5), (4, 0.25)), status="finished")
    assert not ledger.done
    ledger.update(1, reports=((2, 0.75),), status="stopped")

    again = Ledger(tmp_path / "search", "s", drawn[:2])
    assert again.trials == ledger.trials
    assert again.done
    assert [(t.step, t.score) for t in again.trials] == [(4, 0.25), (2, 0.75)]
    best = again.best()
    assert best is not None
    assert best.number == 0  # a trial that was stopped is never the best

    longer = Ledger(tmp_path / "search", "s", drawn)
    assert not longer.done
    assert longer.trials[:2] == again.trials
    assert longer.trials[2].name == "s-02"
    assert math.isnan(longer.trials[2].score)
    longer.update(2, status="failed", reason="lost")
    assert not longer.done  # the next command tries it again
    assert Ledger(tmp_path / "search", "s", drawn[:1]).trials == again.trials[:1]
    assert [path.name for path in (tmp_path / "search").iterdir()] == [STATE]
