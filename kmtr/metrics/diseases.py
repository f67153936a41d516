"""Metrics of diseases: how well a score (probability or logit, higher = more likely) finds those who have one.

All of them follow from one table: how many of the diseased and of the healthy have a score at or above each distinct
score. Subjects with equal scores pass a threshold together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from kmtr.metrics.resampling import labelled
from kmtr.types import InputError

SPECIFICITY = 0.9
"""Share of the healthy that are called healthy, at which the sensitivity is given."""


@dataclass(frozen=True)
class Detection:
    """Metrics of a score that finds a disease.

    Attributes:
        auroc: chance that a diseased subject's score is above a healthy one's, ties counting one half.
        average_precision: see `weighted_average_precision`; of a score without information it is the prevalence.
        prevalence: share of the diseased among the known.
        f1: at the threshold given.
        sensitivity: at 90 % specificity, see `weighted_sensitivity`.
        positives, negatives: diseased and healthy subjects; where one is 0 the metrics are NaN.
        unanswered: known subjects whose score is NaN; where there is one the metrics are NaN.
    """

    auroc: float
    average_precision: float
    prevalence: float
    f1: float
    sensitivity: float
    positives: int
    negatives: int
    unanswered: int


def detection(
    truth: Float[np.ndarray, " subject"], score: Float[np.ndarray, " subject"], threshold: float
) -> Detection:
    """All metrics of a disease.

    Args:
        truth: 1 diseased, 0 healthy, NaN unknown: left out.
        score: any scale; only its order counts, and `threshold` is on the same scale.
        threshold: for F1, from `best_f1_threshold` on validation subjects; NaN where there was none.

    Raises:
        InputError: a truth that is neither 0, 1 nor NaN.
    """
    y, s, one = labelled(truth, score, np.ones((1, len(truth))))
    positives = int(np.count_nonzero(y))
    return Detection(
        auroc=float(weighted_auroc(y, s, one)[0]),
        average_precision=float(weighted_average_precision(y, s, one)[0]),
        prevalence=positives / len(y) if len(y) else float("nan"),
        f1=float(weighted_f1(y, s, threshold, one)[0]),
        sensitivity=float(weighted_sensitivity(y, s, one)[0]),
        positives=positives,
        negatives=len(y) - positives,
        unanswered=int(np.count_nonzero(np.isnan(s))),
    )


def best_f1_threshold(truth: Float[np.ndarray, " subject"], score: Float[np.ndarray, " subject"]) -> float:
    """Score at or above which calling a subject diseased has the highest F1; of several the lowest.

    Chosen on validation subjects, never on those whose F1 is reported. NaN where only one class is there.
    """
    found = _table(truth, score, np.ones((1, len(truth))))
    f1 = _f1(found.positives, found.negatives, found.all_positives[:, None])[0]
    if np.isnan(f1).any() or not len(f1):
        return float("nan")
    return float(found.thresholds[np.flatnonzero(f1 == f1.max())[-1]])  # thresholds fall


def weighted_auroc(
    truth: Float[np.ndarray, " subject"],
    score: Float[np.ndarray, " subject"],
    weights: Float[np.ndarray, "draw subject"],
) -> Float[np.ndarray, " draw"]:
    """Area under the receiver operating characteristic of each draw, by trapezoids; NaN where one class is absent."""
    found = _table(truth, score, weights)
    above, healthy = _steps(found.positives), _steps(found.negatives)
    area = ((found.positives - above / 2) * healthy).sum(1)
    return area / (found.all_positives * found.all_negatives)


def roc(
    truth: Float[np.ndarray, " subject"], score: Float[np.ndarray, " subject"]
) -> tuple[Float[np.ndarray, " point"], Float[np.ndarray, " point"]]:
    """Receiver operating characteristic: share of the healthy and of the diseased that are called diseased, from (0, 0)
    to (1, 1), a point per distinct score; the area below is `weighted_auroc`. NaN where one class is absent.
    """
    found = _table(truth, score, np.ones((1, len(truth))))
    with np.errstate(invalid="ignore"):
        shares = found.negatives[0] / found.all_negatives[0], found.positives[0] / found.all_positives[0]
    false, true = (np.concatenate([[0.0], share]) for share in shares)
    return false, true


def weighted_average_precision(
    truth: Float[np.ndarray, " subject"],
    score: Float[np.ndarray, " subject"],
    weights: Float[np.ndarray, "draw subject"],
) -> Float[np.ndarray, " draw"]:
    """Average precision of each draw: the sum over falling thresholds of the gain in recall times the precision there,
    without interpolation. NaN where one class is absent.
    """
    found = _table(truth, score, weights)
    called = found.positives + found.negatives
    precision = np.divide(found.positives, called, out=np.zeros_like(called), where=called > 0)
    return (_steps(found.positives) * precision).sum(1) / found.all_positives


def weighted_sensitivity(
    truth: Float[np.ndarray, " subject"],
    score: Float[np.ndarray, " subject"],
    weights: Float[np.ndarray, "draw subject"],
    specificity: float = SPECIFICITY,
) -> Float[np.ndarray, " draw"]:
    """Highest sensitivity of each draw among thresholds whose specificity is at least this; nothing is interpolated
    between thresholds. NaN where one class is absent.
    """
    found = _table(truth, score, weights)
    allowed = (1 - specificity) * found.all_negatives[:, None]
    passed = found.negatives <= allowed * (1 + 1e-9)
    return np.where(passed, found.positives, 0).max(1, initial=0) / found.all_positives


def weighted_f1(
    truth: Float[np.ndarray, " subject"],
    score: Float[np.ndarray, " subject"],
    threshold: float,
    weights: Float[np.ndarray, "draw subject"],
) -> Float[np.ndarray, " draw"]:
    """F1 of each draw, 2 TP / (2 TP + FP + FN); a score at or above `threshold` calls a subject diseased. NaN where one
    class is absent or the threshold is NaN.
    """
    truth, score, weights = labelled(truth, score, weights)
    positives, _ = _totals(truth, score, weights)
    if np.isnan(threshold):
        return np.full(len(weights), np.nan)
    called = (score >= threshold).astype(np.float64)
    return _f1(weights @ (called * truth), weights @ (called * (1 - truth)), positives)


@dataclass(frozen=True)
class _Table:
    """Weight of the diseased and of the healthy at or above each distinct score, in falling order; all of either."""

    thresholds: Float[np.ndarray, " threshold"]
    positives: Float[np.ndarray, "draw threshold"]
    negatives: Float[np.ndarray, "draw threshold"]
    all_positives: Float[np.ndarray, " draw"]
    all_negatives: Float[np.ndarray, " draw"]


def _table(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> _Table:
    truth, score, weights = labelled(truth, score, weights)
    totals = _totals(truth, score, weights)
    order = np.argsort(-score, kind="stable")
    truth, score, weights = truth[order].astype(np.float64), score[order], weights[:, order]
    last = np.append(score[1:] != score[:-1], True)[: len(score)]  # of those with an equal score
    diseased = np.cumsum(weights * truth, axis=1)[:, last]
    return _Table(score[last], diseased, np.cumsum(weights, axis=1)[:, last] - diseased, *totals)


def _totals(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of all diseased and of all healthy, ``draw``; both NaN where one is 0 or a score is NaN."""
    wrong = truth[(truth != 0) & (truth != 1)]
    if len(wrong):
        raise InputError(f"disease: expected labels 0, 1 or NaN, got {wrong[0]:g}")
    positives = weights @ truth.astype(np.float64)
    negatives = weights.sum(1) - positives
    undefined = (positives <= 0) | (negatives <= 0) | np.isnan(score).any()
    return np.where(undefined, np.nan, positives), np.where(undefined, np.nan, negatives)


def _steps(total: Float[np.ndarray, "draw threshold"]) -> Float[np.ndarray, "draw threshold"]:
    """Increments at each threshold."""
    return np.diff(total, axis=1, prepend=0)


def _f1(true_positives: np.ndarray, false_positives: np.ndarray, positives: np.ndarray) -> np.ndarray:
    return 2 * true_positives / (true_positives + false_positives + positives)
