"""Tables of tasks, made of rows whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from kmtr.evaluate import looks, task_tables
from kmtr.evaluate.predictions import (
    FINETUNED,
    MASK_RIDGE,
    MEAN,
    MEAN_MASK,
    RIDGE,
    SHARED,
    ZEROFILLED,
    HeldOut,
    Name,
    from_masks,
    joined,
    rows,
)
from kmtr.metrics import agreement
from kmtr.metrics.dense import DICE, IMAGES
from kmtr.report.intervals import Interval, IntervalTable

SUBJECTS = tuple(f"pseudonym-{n:02d}" for n in range(30))
RNG = np.random.default_rng(5)
TRUTH = RNG.normal([150.0, 60.0], [30.0, 8.0], (30, 2))
TRUTH[4, 1] = np.nan
SICK = (np.arange(30) % 3 == 0).astype(float)[:, None]
OURS = {FINETUNED, from_masks(FINETUNED)}


def said(name: Name, targets: tuple[str, ...], truth: np.ndarray, values: np.ndarray, r: int) -> pa.Table:
    held_out = HeldOut(SUBJECTS, targets, truth)
    true = np.full(30, 0.9 * r)
    return rows(name, held_out, values, acceleration=r, seed=1, labels=20, true_acceleration=true)


def scores(name: Name, targets: tuple[str, ...], mean: float, r: int, sd: float = 0.02) -> pa.Table:
    nothing = np.full((30, len(targets)), np.nan)
    return said(name, targets, nothing, np.random.default_rng(r).normal(mean, sd, nothing.shape), r)


@pytest.fixture(scope="module")
def predicted() -> pa.Table:
    """Two R; the model is off by 5 or so, the ridge by 20, and the mask ridge knows of one class alone."""
    parts = []
    both, known = ("lvedv_ml", "lvef_pct"), np.where(np.isfinite(TRUTH), TRUTH, 60.0)
    for r in (4, 8):
        noise = np.random.default_rng(r).standard_normal((30, 2))
        parts += [
            said(FINETUNED, both, TRUTH, known + 5 * noise, r),
            said(from_masks(FINETUNED), both[:1], TRUTH[:, :1], known[:, :1] + 3 + 2 * noise[:, :1], r),
            said(RIDGE, both, TRUTH, known + 20 * noise[::-1], r),
            said(MEAN, both, TRUTH, np.broadcast_to([150.0, 60.0], (30, 2)), r),
            said(FINETUNED, ("dcm",), SICK, SICK + 0.1 * noise[:, :1], r),
            said(RIDGE, ("dcm",), SICK, noise[:, :1], r),
            said(MEAN, ("dcm",), SICK, np.full((30, 1), 0.3), r),
            scores(FINETUNED, DICE, 0.8, r),
            scores(MEAN_MASK, DICE, 0.4, r),
            scores(MASK_RIDGE, DICE[:1], 0.6, r),
            scores(FINETUNED, ("hd95_lv_cavity_ed_mm", "missed_lv_cavity_ed", "spurious_lv_cavity_ed"), 4.0, r),
            scores(FINETUNED, IMAGES[2:], 0.1, r),
            scores(ZEROFILLED, IMAGES[2:], 0.5, r),
            scores(SHARED, IMAGES[2:], 0.2, r),
        ]
    return joined(parts)


@pytest.fixture(scope="module")
def tables(predicted: pa.Table) -> dict[str, IntervalTable]:
    return {one.name: one for one in task_tables.tables_of(predicted, OURS, 200)}


def row_of(table: IntervalTable, **asked: object) -> dict[str, object]:
    names = [column.name for column in table.columns]
    (found,) = (row for row in table.json()["rows"] if all(row[key] == value for key, value in asked.items()))
    assert list(found) == names
    return found


def test_each_task_has_its_table_and_its_gains(tables: dict[str, IntervalTable]) -> None:
    assert list(tables) == [
        *("phenotypes", "phenotypes_gain", "diseases", "diseases_gain", "dice", "dice_gain", "distances"),
        *("images", "images_gain"),
    ]


def test_every_interval_holds_its_estimate_and_no_cell_names_a_subject(tables: dict[str, IntervalTable]) -> None:
    cells = [cell for table in tables.values() for row in table.rows for cell in row]
    intervals = [cell for cell in cells if isinstance(cell, Interval) and math.isfinite(cell.value)]
    assert len(intervals) > 50
    rounding = 1e-9
    assert not [cell for cell in intervals if not cell.low - rounding <= cell.value <= cell.high + rounding]
    assert not any("pseudonym" in table.csv() + str(table.json()) for table in tables.values())


def test_phenotypes_are_those_of_the_metrics(tables: dict[str, IntervalTable]) -> None:
    found = row_of(tables["phenotypes"], phenotype="lvef (%)", R=8, system=FINETUNED.title)
    noise = np.random.default_rng(8).standard_normal((30, 2))[:, 1]
    expected = agreement(TRUTH[:, 1], TRUTH[:, 1] + 5 * noise, 60.0)
    assert found["true R"] == pytest.approx(7.2)
    assert found["subjects"] == 29
    for column, value in (("MAE", expected.mae), ("R2", expected.r2), ("r", expected.pearson), ("bias", expected.bias)):
        assert found[column]["value"] == pytest.approx(value)  # type: ignore[index]
    assert found["SD of |error|"] == pytest.approx(expected.mae_sd)
    assert (found["lower limit"], found["upper limit"]) == pytest.approx(expected.limits)
    measured = row_of(tables["phenotypes"], phenotype="lvedv (mL)", R=4, system="k-MTR fine-tuned, masks")
    assert measured["bias"]["value"] == pytest.approx(3, abs=1.5)  # type: ignore[index]
    mean = row_of(tables["phenotypes"], phenotype="lvedv (mL)", R=4, system="mean")
    assert mean["R2"]["value"] == pytest.approx(0)  # type: ignore[index]
    assert mean["r"]["value"] is None  # type: ignore[index]


def test_gains_are_over_the_strongest_floor(tables: dict[str, IntervalTable]) -> None:
    """A ridge that is off by 20 mL of a spread of 30 is better than the mean; of a spread of 8 % it is worse."""
    volume = row_of(tables["phenotypes_gain"], target="lvedv (mL)", R=4, system=FINETUNED.title)
    fraction = row_of(tables["phenotypes_gain"], target="lvef (%)", R=4, system=FINETUNED.title)
    assert volume["strongest floor"] == RIDGE.title
    assert fraction["strongest floor"] == MEAN.title
    assert volume["R2"]["value"] > 0  # type: ignore[index]
    assert volume["p"] <= volume["p, Holm"] < 0.05  # type: ignore[operator]
    first = row_of(tables["dice_gain"], target="lv cavity, ED", R=4)
    assert first["strongest floor"] == MASK_RIDGE.title
    assert row_of(tables["dice_gain"], target="rv, ES", R=4)["strongest floor"] == MEAN_MASK.title
    error = row_of(tables["images_gain"], target="NMSE", R=8)
    assert error["strongest floor"] == SHARED.title
    assert error["difference"]["value"] == pytest.approx(-0.1, abs=1e-6)  # type: ignore[index]


def test_what_is_measured_on_some_is_compared_with_floors_on_the_same() -> None:
    """Of 12 subjects volumes could be measured. Among all 30 the ridge is the best floor, among those 12 it is not."""
    truth, some = TRUTH[:, :1], np.arange(30) < 12
    noise = np.random.default_rng(0).standard_normal((30, 1))
    measured = np.where(some[:, None], truth + 4 * noise, np.nan)
    ridge = truth + np.where(some[:, None], 35.0, 1.0) * noise[::-1]
    other = truth + np.where(some[:, None], 10.0, 90.0) * noise[::-1]
    asked = ("lvedv_ml",)
    predicted = joined(
        [
            said(name, asked, truth, values, 4)
            for name, values in (
                (FINETUNED, truth + 5 * noise),
                (from_masks(FINETUNED), measured),
                (RIDGE, ridge),
                (from_masks(MASK_RIDGE), np.where(some[::-1, None], truth, np.nan)),
                (Name("other", "nothing"), other),
                (MEAN, np.full((30, 1), 150.0)),
            )
        ]
    )
    found = {one.name: one for one in task_tables.tables_of(predicted, OURS, 400)}
    row = row_of(found["phenotypes"], system=from_masks(FINETUNED).title)
    expected = agreement(truth[some, 0], measured[some, 0], 150.0)
    assert row["subjects"] == 12
    for column, value in (("MAE", expected.mae), ("R2", expected.r2), ("r", expected.pearson), ("bias", expected.bias)):
        assert row[column]["value"] == pytest.approx(value)  # type: ignore[index]
    assert (row["lower limit"], row["upper limit"]) == pytest.approx(expected.limits)
    floor = agreement(truth[some, 0], other[some, 0], 150.0)
    gain = row_of(found["phenotypes_gain"], system=from_masks(FINETUNED).title)
    assert (gain["subjects"], gain["strongest floor"]) == (12, "other")
    assert gain["R2"]["value"] == pytest.approx(expected.r2 - floor.r2)  # type: ignore[index]
    whole = row_of(found["phenotypes_gain"], system=FINETUNED.title)
    assert (whole["subjects"], whole["strongest floor"]) == (30, RIDGE.title)


def test_diseases_stand_beside_their_prevalence(tables: dict[str, IntervalTable]) -> None:
    ours = row_of(tables["diseases"], R=4, system=FINETUNED.title)
    assert (ours["subjects"], ours["diseased"], ours["prevalence"]) == (30, 10, pytest.approx(1 / 3))
    assert ours["AUROC"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    mean = row_of(tables["diseases"], R=4, system="mean")
    assert mean["AUROC"]["value"] == pytest.approx(0.5)  # type: ignore[index]
    assert mean["average precision"]["value"] == pytest.approx(1 / 3)  # type: ignore[index]
    assert (ours["F1"], ours["threshold"]) == (None, None)
    assert "No F1: its threshold is chosen on validation subjects" in tables["diseases"].note


def test_what_a_system_does_not_say_is_missing(tables: dict[str, IntervalTable]) -> None:
    ridge = row_of(tables["dice"], R=4, system=MASK_RIDGE.title, phase="ED")
    assert ridge["rv"] is None
    assert ridge["lv cavity"]["value"] == ridge["mean"]["value"]  # type: ignore[index]
    found = row_of(tables["distances"], R=4, **{"class": "lv cavity"})
    assert found["ED HD95 (mm)"]["value"] == pytest.approx(4, abs=0.1)  # type: ignore[index]
    assert found["ED missed"] == pytest.approx(4, abs=0.1)
    assert found["ES HD95 (mm)"] is None


def test_a_model_without_floors_has_no_gains() -> None:
    alone = scores(FINETUNED, DICE, 0.8, 4)
    assert [one.name for one in task_tables.tables_of(alone, OURS, 100)] == ["dice"]


def test_figures_show_the_subjects_at_percentiles_of_dice(predicted: pa.Table) -> None:
    assert looks.at_percentiles(np.array([0.5, np.nan, *np.arange(10, 0, -1)])) == [11, 7, 3]
    chosen = looks.choose(predicted, FINETUNED)
    assert chosen is not None
    assert chosen.score == "mean Dice"
    assert list(chosen.values) == sorted(chosen.values)
    assert len(set(chosen.subjects)) == 3
    assert looks.choose(said(FINETUNED, ("dcm",), SICK, SICK, 4), FINETUNED) is None
