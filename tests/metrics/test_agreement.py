"""Metrics of phenotypes: closed forms, unknown labels, constants, few subjects, units."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmtr.metrics import Agreement, agreement, r2, weighted_mae, weighted_pearson, weighted_r2

METRICS = ("mae", "mae_sd", "r2", "pearson", "bias")


def draw(seed: int, subjects: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = 60 + 6 * rng.standard_normal(subjects)
    return truth, truth + 2 + 4 * rng.standard_normal(subjects)


def test_closed_forms() -> None:
    found = agreement(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.0, 5.0, 3.0]), reference=2.0)
    errors = np.array([1.0, 0.0, 2.0, -1.0])
    assert found.mae == pytest.approx(1)
    assert found.mae_sd == pytest.approx(math.sqrt(2 / 3))
    assert found.bias == pytest.approx(0.5)
    assert found.limits == pytest.approx((0.5 - 1.96 * errors.std(ddof=1), 0.5 + 1.96 * errors.std(ddof=1)))
    assert found.r2 == pytest.approx(1 - 6 / (1 + 0 + 1 + 4))
    assert found.pearson == pytest.approx(np.corrcoef([1, 2, 3, 4], [2, 2, 5, 3])[0, 1])
    assert (found.subjects, found.unanswered) == (4, 0)


def test_a_shift_is_bias_and_a_perfect_answer_is_perfect() -> None:
    truth, _ = draw(0)
    perfect = agreement(truth, truth, truth.mean())
    assert (perfect.mae, perfect.bias, perfect.r2, perfect.pearson) == (0, 0, 1, pytest.approx(1))
    shifted = agreement(truth, truth - 3, truth.mean())
    assert (shifted.mae, shifted.bias, shifted.pearson) == (pytest.approx(3), pytest.approx(-3), pytest.approx(1))
    assert shifted.limits == pytest.approx((-3, -3))
    assert shifted.r2 == pytest.approx(r2(truth, truth - 3, truth.mean()))


def test_errors_are_in_the_targets_unit() -> None:
    truth, predicted = draw(1)
    ml, litre = (agreement(truth * unit, predicted * unit, 60.0 * unit) for unit in (1, 1e-3))
    for name in ("mae", "mae_sd", "bias"):
        assert getattr(litre, name) == pytest.approx(1e-3 * getattr(ml, name))
    assert (litre.r2, litre.pearson) == pytest.approx((ml.r2, ml.pearson))


@given(st.integers(0, 2**31), st.lists(st.booleans(), min_size=10, max_size=30))
def test_unknown_labels_and_the_order_of_subjects_change_nothing(seed: int, known: list[bool]) -> None:
    truth, predicted = draw(seed, len(known))
    kept = np.array(known)
    holes = np.where(kept, truth, np.nan)
    wild = np.where(kept, predicted, np.where(np.arange(len(known)) % 2, np.nan, np.inf))
    order = np.random.default_rng(seed).permutation(len(known))
    expected = agreement(truth[kept], predicted[kept], 60.0)
    for found in (agreement(holes, wild, 60.0), agreement(holes[order], wild[order], 60.0)):
        assert (found.subjects, found.unanswered) == (kept.sum(), 0)
        np.testing.assert_allclose([getattr(found, m) for m in METRICS], [getattr(expected, m) for m in METRICS])


def all_nan(found: Agreement) -> bool:
    return all(math.isnan(getattr(found, name)) for name in METRICS) and all(map(math.isnan, found.limits))


@pytest.mark.parametrize("subjects", [0, 1, 2])
def test_too_few_subjects_say_nothing(subjects: int) -> None:
    truth, predicted = draw(2, subjects)
    assert all_nan(agreement(truth, predicted, 60.0))
    assert all_nan(agreement(np.append(truth, np.nan), np.append(predicted, 1.0), 60.0))


def test_constants_have_no_correlation() -> None:
    truth, predicted = draw(3)
    flat = np.full_like(truth, 61.3)
    of_truth, of_answer = agreement(flat, predicted, 60.0), agreement(truth, flat, 60.0)
    assert math.isnan(of_truth.r2)
    assert math.isnan(of_truth.pearson)
    assert of_truth.mae == pytest.approx(np.abs(predicted - 61.3).mean())
    assert math.isnan(of_answer.pearson)
    assert of_answer.r2 == pytest.approx(r2(truth, flat, 60.0))


@pytest.mark.parametrize("nothing", [np.nan, np.inf])
def test_a_subject_without_an_answer_is_not_left_out(nothing: float) -> None:
    truth, predicted = draw(4)
    predicted[7] = nothing
    found = agreement(truth, predicted, 60.0)
    assert all_nan(found)
    assert (found.subjects, found.unanswered) == (60, 1)
    one = np.ones((3, 60))
    for values in (
        weighted_mae(truth, predicted, one),
        weighted_r2(truth, predicted, 60.0, one),
        weighted_pearson(truth, predicted, one),
    ):
        assert np.isnan(values).all()


@given(st.integers(0, 2**31))
def test_weights_are_repeats(seed: int) -> None:
    truth, predicted = draw(seed, 20)
    truth[3] = np.nan
    times = np.random.default_rng(seed).integers(0, 4, (5, 20))
    repeated = [agreement(np.repeat(truth, row), np.repeat(predicted, row), 59.0) for row in times]
    weights = times.astype(float)
    for name, values in (
        ("mae", weighted_mae(truth, predicted, weights)),
        ("r2", weighted_r2(truth, predicted, 59.0, weights)),
        ("pearson", weighted_pearson(truth, predicted, weights)),
    ):
        np.testing.assert_allclose(values, [getattr(one, name) for one in repeated], rtol=1e-9, atol=1e-12)
