"""The space of a search: domains checked against the configuration, draws that nothing else changes; and its ledger."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from kmtr.config import RunConfig, override
from kmtr.config.recipes import tiny
from kmtr.types import InputError
from tune import space
from tune.ledger import RECIPE, STATE, Ledger
from tune.space import Choice, Range

TEMPERATURE, RATIO, R = "align.temperature", "masked.mask_ratio", "sampling.accelerations"


def space_of(**changes: object) -> space.Space:
    return space.of(override(tiny(), dict(changes)))


def config_of(**changes: object) -> RunConfig:
    return override(tiny(), changes)


def drawn(of: space.Space, count: int = 64) -> list[dict[str, object]]:
    return [of.random(number) for number in range(count)]


def test_trials_are_a_pure_function_of_seed_key_and_number() -> None:
    np.random.seed(1)  # noqa: NPY002  the global state must not matter
    first = drawn(space_of())
    np.random.seed(2)  # noqa: NPY002
    assert drawn(space_of()) == first
    assert drawn(space_of(seed=1)) != first
    assert len({str(values) for values in first}) == len(first)


def test_another_key_changes_no_value_of_the_others() -> None:
    one = {f"search.space.{RATIO}": "uniform(0.2,0.8)"}
    two = {"search.space.model.drop_path": "uniform(0,0.3)", **one}
    assert [v[RATIO] for v in drawn(space_of(**two))] == [v[RATIO] for v in drawn(space_of(**one))]
    assert list(space_of(**two).random(0)) == ["model.drop_path", RATIO]  # in the order of the command


def test_every_draw_is_in_its_domain_and_a_valid_configuration() -> None:
    searched = space_of()
    assert list(searched.domains) == [TEMPERATURE, RATIO, R]
    for values in drawn(searched):
        trial = searched.check(values)
        assert 0.03 <= trial.align.temperature <= 0.3
        assert 0.3 <= trial.masked.mask_ratio <= 0.9
        assert trial.sampling.accelerations in ((4,), (8,), (12,))


def test_draws_cover_every_key_evenly() -> None:
    values = drawn(space_of())
    temperature = np.log([v[TEMPERATURE] for v in values])  # type: ignore[arg-type]
    for u in (
        (temperature - np.log(0.03)) / (np.log(0.3) - np.log(0.03)),
        (np.array([v[RATIO] for v in values], float) - 0.3) / 0.6,
    ):
        for start in range(0, 64, space.BLOCK):
            assert sorted((u[start : start + space.BLOCK] * space.BLOCK).astype(int)) == list(range(space.BLOCK))
    for start in range(0, 63, 3):
        assert sorted(v[R] for v in values[start : start + 3]) == [(4,), (8,), (12,)]  # type: ignore[type-var]


def test_integers_are_drawn_whole_and_from_end_to_end() -> None:
    searched = space_of(**{"search.space.model.depth": "uniform(1,4)"})
    values = [v["model.depth"] for v in drawn(searched)]
    assert {type(value) for value in values} == {int}
    assert [values.count(n) for n in (1, 2, 3, 4)] == [16, 16, 16, 16]


def test_a_narrow_range_has_as_many_digits_as_it_needs() -> None:
    searched = space_of(**{"search.space.optimizer.ema": "uniform(0.9995,0.9999)"})
    values = [v["optimizer.ema"] for v in searched.drawn(24)]
    assert len(set(values)) == 24
    assert all(0.9995 <= value <= 0.9999 for value in values)  # type: ignore[operator]


def test_grids_are_crossed_and_others_drawn_beside_them() -> None:
    grids = {f"search.space.{R}": "grid(4|8|4,8)", "search.space.model.drop_path": "grid(0,0.1)"}
    searched = space_of(**grids)
    assert searched.size(trials=3) == 6
    points = [tuple(searched.random(n).values()) for n in range(6)]
    assert points == [((4,), 0.0), ((4,), 0.1), ((8,), 0.0), ((8,), 0.1), ((4, 8), 0.0), ((4, 8), 0.1)]
    mixed = space_of(**grids, **{f"search.space.{RATIO}": "uniform(0.3,0.9)"})
    assert mixed.size(trials=7) == 7
    assert [mixed.random(n)[R] for n in range(7)] == [(4,), (4,), (8,), (8,), (4, 8), (4, 8), (4,)]


def test_the_default_is_what_the_stages_use() -> None:
    assert list(space_of(stage="masked").domains) == [RATIO, R]
    assert space_of().domains[TEMPERATURE] == Range(0.03, 0.3, log=True, whole=False)
    assert space_of().domains[R] == Choice(((4,), (8,), (12,)), grid=False)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"search.space.align.temprature": "uniform(0.1,1)"}, "unknown key 'align.temprature'; .*'align.temperature'"),
        ({f"search.space.{TEMPERATURE}": "loguniform(0.3,0.03)"}, "expected 0 < LOW <= HIGH"),
        ({f"search.space.{TEMPERATURE}": "loguniform(0,0.3)"}, "expected 0 < LOW <= HIGH"),
        ({f"search.space.{TEMPERATURE}": "uniform(0.3,nan)"}, "expected LOW <= HIGH"),
        ({f"search.space.{TEMPERATURE}": "uniform(-1,0.3)"}, "align.temperature: .*greater than 0, got '-1'"),
        ({f"search.space.{TEMPERATURE}": "uniform(0.1,warm)"}, "expected two numbers"),
        ({f"search.space.{TEMPERATURE}": "uniform(0.1)"}, "expected two numbers"),
        ({f"search.space.{TEMPERATURE}": "normal(0,1)"}, r"expected uniform\(LOW,HIGH\)"),
        ({f"search.space.{TEMPERATURE}": "0.1"}, r"expected uniform\(LOW,HIGH\)"),
        ({f"search.space.{TEMPERATURE}": "choice(0.1,,0.2)"}, "values between the commas"),
        ({f"search.space.{TEMPERATURE}": "choice(0.1,0.10)"}, "different values"),
        ({f"search.space.{RATIO}": "uniform(0.5,1.0)"}, "masked.mask_ratio: .*less than 1"),
        ({"search.space.model.readout": "uniform(0,1)"}, "model.readout is no number"),
        ({"search.space.model.readout": "choice(kspace,ky)"}, "model.readout: .*got 'ky'"),
        ({"search.space.model.depth": "uniform(1.5,4)"}, "model.depth: .*integer"),
        ({f"search.space.{R}": "grid(4,32)"}, "R = 32 leaves 2 of 64 lines"),
        ({f"search.space.{R}": "grid(8)"}, "a key with more than one value"),
        ({"search.space.seed": "choice(0,1)"}, "is not searched: search.confirm"),
        ({"search.space.masked.steps": "choice(100,200)"}, "the same budget"),
        ({"search.space.train.workers": "choice(1,2)"}, "changes what a run of stage=both learns"),
        ({"search.space.task.learning_rate": "choice(1e-4,1e-3)"}, "changes what a run of stage=both learns"),
        ({"stage": "masked", f"search.space.{TEMPERATURE}": "choice(0.1,0.2)"}, "stage=masked learns"),
        ({"stage": "task", "task.tasks": "phenotypes"}, "expected domains for training on labels"),
        ({"search.space.model.coils": "grid(1,2)"}, "at most data.coils=1"),
        ({"search.space.sampling.family": "grid(gaussian,equispaced)"}, "it decides what the score is"),
    ],
)
def test_impossible_spaces_are_refused_in_one_line(changes: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says) as refused:
        space.of(config_of(**changes))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("typed", ["2", "2x", "x", "2x1", "0x3", "-1x3", "2x3x4"])
def test_a_confirmation_is_trials_by_seeds(typed: str) -> None:
    with pytest.raises(InputError, match=r"^search\.confirm: expected"):
        config_of(**{"search.confirm": typed})


def test_a_ledger_goes_on_where_it_was(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "search", "s")
    first, second = (ledger.add(number, {RATIO: 0.1 * number, R: (4,)}) for number in (0, 1))
    again = ledger.add(1, second.values, seed=5)
    own = ledger.add(RECIPE, {}, seed=5)
    assert not (tmp_path / "search").exists()  # looking writes nothing
    ledger.update(first.name, reports=((2, 0.5), (4, 0.25)), status="finished", result=0.5)
    ledger.update(second.name, reports=((2, 0.75),), status="stopped")
    ledger.update(again.name, reports=((4, 0.6),), status="finished", result=0.6)
    ledger.update(own.name, status="failed", reason="lost")

    known = Ledger(tmp_path / "search", "s")
    assert known.runs == ledger.runs
    assert [path.name for path in (tmp_path / "search").iterdir()] == [STATE]
    assert [(t.number, t.step, t.score) for t in known.trials] == [(0, 4, 0.5), (1, 2, 0.75)]
    assert [t.number for t in known.ranked()] == [0]  # one that was stopped is never the best
    assert [run.name for run in known.repeats(1)] == ["s-001-seed5"]
    assert [run.name for run in known.repeats(RECIPE)] == ["s-recipe-seed5"]
    assert math.isnan(known.repeats(RECIPE)[0].score)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"name": "a"}]'])
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE).write_text(content)
    if content == "{}":
        assert not Ledger(tmp_path, "s").runs
        return
    with pytest.raises(InputError, match="expected runs of a search"):
        Ledger(tmp_path, "s")
