"""Scores of rows: R2 against the mean's rows, joined by subject whatever the order, and nothing else is compared."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from kmtr.config import override
from kmtr.config.recipes import tiny
from kmtr.evaluate import tables
from kmtr.evaluate.predictions import MEAN, RIDGE, HeldOut, from_masks, joined, rows
from kmtr.evaluate.scores import Fit, difference, panel, results_of, scores_of, summary
from kmtr.metrics import bootstrap_r2, r2
from kmtr.types import InputError

SUBJECTS, TARGETS = tuple(f"p-{i}" for i in range(20)), ("lvedv_ml", "lvm_g")
RNG = np.random.default_rng(3)
TRUTH = RNG.normal(size=(20, 2)) * 10 + 100
TRUTH[4, 1] = np.nan
HELD_OUT = HeldOut(SUBJECTS, TARGETS, TRUTH)
PREDICTED = {r: TRUTH + r * RNG.normal(size=TRUTH.shape) for r in (2, 4)}
for values in PREDICTED.values():
    values[4, 1] = 77.0  # said of a subject whose truth is unknown
MEANS = np.array([98.0, 103.0])


def table(seed: int = 0, labels: int = 50) -> pa.Table:
    parts = []
    for r, values in PREDICTED.items():
        about = {"acceleration": r, "seed": seed, "labels": labels, "true_acceleration": np.tile([r, r * 0.5], 10)}
        parts += [rows(RIDGE, HELD_OUT, values + seed, **about)]
        parts += [rows(MEAN, HELD_OUT, np.broadcast_to(MEANS, TRUTH.shape), **about)]
    return joined(parts)


def test_scores_are_those_of_the_arrays() -> None:
    two, four = scores_of(table())
    assert (two.acceleration, four.acceleration) == (2, 4)
    assert four.true_acceleration == pytest.approx(20 / (10 / 4 + 10 / 2))
    assert list(four.probes) == [RIDGE, MEAN]
    known = np.isfinite(TRUTH[:, 1])
    found = four.probes[RIDGE]["lvm_g"]
    assert found.r2 == r2(TRUTH[known, 1], PREDICTED[4][known, 1], 103.0)
    assert found.mae == np.abs(TRUTH - PREDICTED[4])[known, 1].mean()
    low, high = bootstrap_r2(found, 200)
    assert low < found.r2 < high
    assert four.probes[MEAN]["lvedv_ml"].r2 == 0.0


def test_rows_are_joined_by_subject_in_whatever_order_they_come() -> None:
    mixed = table().take(pa.array(RNG.permutation(len(table()))))
    straight, seen = panel(table()), panel(mixed)
    order = [seen.subjects.index(subject) for subject in SUBJECTS]
    for fit, values in straight.values.items():
        back = seen.values[fit][[seen.accelerations.index(r) for r in (2, 4)]][:, order]
        np.testing.assert_array_equal(back[..., [seen.targets.index(t) for t in TARGETS]], values)
    assert r2_of(mixed) == pytest.approx(r2_of(table()))


def r2_of(rows: pa.Table) -> dict[tuple[int, str, str], float]:
    return {
        (s.acceleration, name.title, target): probe.r2
        for s in scores_of(rows)
        for name, probes in s.probes.items()
        for target, probe in probes.items()
    }


def test_a_system_without_some_of_the_subjects_is_refused() -> None:
    found = table().to_pylist()
    where = next(i for i, row in enumerate(found) if row["system"] == "ridge" and row["acceleration"] == 4)
    fewer = pa.Table.from_pylist(found[:where] + found[where + 1 :], schema=table().schema)
    with pytest.raises(
        InputError, match="ridge on low-res image at R = 4 to say lvedv_ml of the same 20 subjects"
    ) as e:
        panel(fewer)
    assert str(e.value).endswith("got 19 of them")
    unknown = next(i for i, row in enumerate(found) if row["truth"] is None)
    panel(pa.Table.from_pylist(found[:unknown] + found[unknown + 1 :], schema=table().schema))  # it counts nowhere
    found[where]["truth"] += 1
    with pytest.raises(InputError, match="one truth of each subject and target"):
        panel(pa.Table.from_pylist(found, schema=table().schema))


def test_what_is_measured_on_masks_is_scored_on_the_subjects_that_it_was_measured_of() -> None:
    """Volumes need the size of a pixel, which is known of the last 8 subjects."""
    some = PREDICTED[4].copy()
    some[:12] = np.nan
    measured = from_masks(RIDGE)
    added = rows(measured, HELD_OUT, some, acceleration=4, seed=0, labels=50)
    _, four = scores_of(joined([table(), added]))
    found = four.probes[measured]["lvm_g"]
    assert found.r2 == r2(TRUTH[12:, 1], PREDICTED[4][12:, 1], 103.0)
    assert len(four.probes[RIDGE]["lvm_g"].truth) == 19
    config = override(tiny(), {"evaluate.bootstrap": 20})
    r2s, errors = (make for make in (tables.r2_table([four], config), tables.error_table([four])))
    for shown in (r2s, errors):
        cells = {row[-3]: row[-2:] for row in shown.rows}
        assert all(str(cell).endswith(" (n = 8)") for cell in cells[measured.title])
        assert not any("n =" in str(cell) for name in (RIDGE, MEAN) for cell in cells[name.title])
    few = np.where(np.arange(20)[:, None] < 18, np.nan, some)
    two = rows(measured, HELD_OUT, few, acceleration=4, seed=0, labels=50)
    assert measured not in scores_of(joined([table(), two]))[1].probes, "too few for a score"


def test_scores_need_the_mean_and_one_fit() -> None:
    with pytest.raises(InputError, match=r"one seed and number of labels, got .*seed 0, 50 labels.*seed 1, 50 labels"):
        scores_of(joined([table(), table(seed=1)]))
    alone = pa.Table.from_pylist(
        [row for row in table().to_pylist() if row["system"] == "ridge"], schema=table().schema
    )
    with pytest.raises(InputError, match="expected rows of 'mean' and other systems"):
        scores_of(alone)
    with pytest.raises(InputError, match="expected rows of 'mean' with seed 0 and 50 labels, got none"):
        results_of(panel(alone))
    with pytest.raises(InputError, match="got none"):
        scores_of(joined([]))


def test_results_of_all_fits_keep_seeds_and_labels_apart() -> None:
    seen = panel(joined([table(), table(seed=1), table(labels=9)]), accelerations=(4, 2), targets=("lvm_g", "lvedv_ml"))
    found = results_of(seen)
    assert set(found) == {(name, *of) for name in ("ridge", "mean") for of in ((0, 50), (1, 50), (0, 9))}
    ridge = found["ridge", 1, 50]
    np.testing.assert_array_equal(ridge.predicted[0, :, 1], PREDICTED[4][:, 0] + 1)
    np.testing.assert_array_equal(ridge.mean, MEANS[::-1])
    assert seen.values[Fit(RIDGE, 1, 50)] is ridge.predicted
    said = summary([found["ridge", 0, 50], ridge], seen.truth, seen.accelerations, seen.targets)
    both = [one.r2(seen.truth) for one in (found["ridge", 0, 50], ridge)]
    assert said["4"]["lvm_g"] == pytest.approx(np.mean([one[0, 0] for one in both]))
    assert said["2"]["sd"] == pytest.approx(np.std([one[1].mean() for one in both], ddof=1))
    gain = difference([found["ridge", 0, 50]], [ridge], seen.truth, 50)
    assert gain.value == pytest.approx((both[0] - both[1]).mean())
