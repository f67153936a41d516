"""Metrics of diseases: scikit-learn's values, ties, weights, one class only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmtr.metrics import (
    best_f1_threshold,
    detection,
    roc,
    weighted_auroc,
    weighted_average_precision,
    weighted_f1,
    weighted_sensitivity,
)
from kmtr.types import InputError


def draw(seed: int, subjects: int = 80, levels: int = 0, prevalence: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores; with `levels` the scores are few values, so that many are tied."""
    rng = np.random.default_rng(seed)
    truth = (rng.random(subjects) < prevalence).astype(float)
    truth[:2] = 0, 1
    score = rng.standard_normal(subjects) + truth
    return truth, np.round(score * levels / 4) if levels else score


def reference(name: str, *arguments: Any, **options: Any) -> Any:
    """That function of scikit-learn, which takes seconds to import and is imported by none but these tests."""
    from sklearn import metrics

    return getattr(metrics, name)(*arguments, **options)


def best_sensitivity(truth: np.ndarray, score: np.ndarray, weights: np.ndarray | None = None) -> float:
    fpr, tpr, _ = reference("roc_curve", truth, score, sample_weight=weights, drop_intermediate=False)
    return float(tpr[fpr <= 0.1 + 1e-9].max())


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([0, 1, 3, 8]))
def test_values_are_those_of_scikit_learn_also_with_ties(seed: int, levels: int) -> None:
    truth, score = draw(seed, levels=levels)
    found = detection(truth, score, threshold=0.5)
    assert found.auroc == pytest.approx(reference("roc_auc_score", truth, score))
    assert found.average_precision == pytest.approx(reference("average_precision_score", truth, score))
    assert found.f1 == pytest.approx(reference("f1_score", truth, score >= 0.5, zero_division=0))
    assert found.sensitivity == pytest.approx(best_sensitivity(truth, score))
    assert found.prevalence == truth.mean()
    assert (found.positives, found.negatives) == (truth.sum(), (1 - truth).sum())


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.sampled_from([0, 3]))
def test_weighted_values_are_those_of_scikit_learn(seed: int, levels: int) -> None:
    truth, score = draw(seed, levels=levels)
    weights = np.random.default_rng(seed).integers(0, 4, (4, len(truth))).astype(float)
    weights[:, :2] = 1  # both classes
    for function, name in (
        (weighted_auroc, "roc_auc_score"),
        (weighted_average_precision, "average_precision_score"),
    ):
        expected = [reference(name, truth, score, sample_weight=row) for row in weights]
        np.testing.assert_allclose(function(truth, score, weights), expected, rtol=1e-9)
    expected = [reference("f1_score", truth, score >= 0.3, sample_weight=row, zero_division=0) for row in weights]
    np.testing.assert_allclose(weighted_f1(truth, score, 0.3, weights), expected)
    expected = [best_sensitivity(truth, score, row) for row in weights]
    np.testing.assert_allclose(weighted_sensitivity(truth, score, weights), expected)


def test_ties_count_one_half_and_infinite_logits_are_tied() -> None:
    truth = np.array([1.0, 0.0, 1.0, 0.0])
    assert detection(truth, np.zeros(4), 0.0).auroc == 0.5
    assert detection(truth, np.zeros(4), 0.0).average_precision == 0.5
    assert detection(truth, np.array([np.inf, np.inf, 0.0, -np.inf]), 0.0).auroc == pytest.approx(2.5 / 4)


@given(st.integers(0, 2**31))
def test_order_scale_and_unknown_labels_change_nothing(seed: int) -> None:
    truth, score = draw(seed)
    expected = detection(truth, score, 0.4)
    order = np.random.default_rng(seed).permutation(len(truth))
    assert detection(truth[order], score[order], 0.4) == expected
    assert detection(truth, np.exp(score), float(np.exp(0.4))) == expected
    more = np.append(truth, [np.nan] * 3), np.append(score, [9, -9, np.nan])
    assert detection(*more, 0.4) == expected


@pytest.mark.parametrize("truth", [[1.0] * 5, [0.0] * 5, [np.nan] * 5, [np.nan, 1, 1, 1, 1]])
def test_one_class_only_is_undefined_and_counted(truth: list[float]) -> None:
    labels, score = np.array(truth), np.arange(5.0)
    found = detection(labels, score, 2.0)
    values = (found.auroc, found.average_precision, found.f1, found.sensitivity, best_f1_threshold(labels, score))
    assert all(map(math.isnan, values))
    assert (found.positives, found.negatives) == (np.sum(labels == 1), np.sum(labels == 0))
    assert math.isnan(detection(np.zeros(0), np.zeros(0), 0.0).auroc)


def test_a_draw_without_one_class_is_undefined_alone() -> None:
    truth, score = np.array([1.0, 0.0, 0.0]), np.array([2.0, 1.0, 3.0])
    weights = np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 1.0], [2.0, 1.0, 0.0]])
    np.testing.assert_array_equal(weighted_auroc(truth, score, weights), [0.5, np.nan, 1.0])


def test_a_subject_without_a_score_is_not_left_out() -> None:
    truth, score = draw(5)
    score[4] = np.nan
    found = detection(truth, score, 0.5)
    assert math.isnan(found.auroc)
    assert math.isnan(found.f1)
    assert found.unanswered == 1


def test_the_threshold_is_the_best_on_validation() -> None:
    truth, score = draw(6, levels=6)
    threshold = best_f1_threshold(truth, score)
    best = reference("f1_score", truth, score >= threshold)
    others = [reference("f1_score", truth, score >= other) for other in np.unique(score)]
    assert best == max(others)
    assert threshold == min(t for t, f in zip(np.unique(score), others, strict=True) if f == best)
    assert detection(truth, score, threshold).f1 == pytest.approx(best)
    assert math.isnan(detection(truth, score, math.nan).f1)


def test_of_equally_good_thresholds_the_lowest_is_taken() -> None:
    """F1 is 2/3 with 2 of 4 diseased among 2 called, and with 3 among 5; elsewhere it is less."""
    truth, score = np.array([1, 1, 0, 0, 1, 0, 0, 0, 1.0]), np.arange(9.0, 0, -1)
    assert best_f1_threshold(truth, score) == 5
    assert detection(truth, score, 5.0).f1 == detection(truth, score, 8.0).f1 == 2 / 3


def test_nobody_called_diseased_is_f1_zero() -> None:
    truth, score = draw(7)
    assert detection(truth, score, score.max() + 1).f1 == 0


def test_sensitivity_at_ninety_percent_specificity_in_closed_form() -> None:
    truth = np.repeat([0.0, 1.0], [10, 4])
    score = np.append(np.arange(10.0), [9.5, 8.5, 7.5, 0.0])
    assert detection(truth, score, 0.0).sensitivity == 0.5  # one of ten healthy passes at 8.5, two at 7.5
    worst = np.append(np.arange(10.0) + 5, [0.0] * 4)
    assert detection(truth, worst, 0.0).sensitivity == 0


def test_labels_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match="expected labels 0, 1 or NaN, got 2"):
        detection(np.array([0.0, 1.0, 2.0]), np.zeros(3), 0.0)


@pytest.mark.parametrize("levels", [0, 5])
def test_the_roc_is_scikit_learns_and_auroc_is_the_area_below_it(levels: int) -> None:
    truth, score = draw(3, levels=levels)
    false, true = roc(truth, score)
    expected = reference("roc_curve", truth, score, drop_intermediate=False)
    np.testing.assert_allclose((false, true), expected[:2])
    assert np.trapezoid(true, false) == pytest.approx(weighted_auroc(truth, score, np.ones((1, len(truth))))[0])
    assert np.isnan(roc(np.ones(3), np.arange(3.0))[0][1:]).all()
