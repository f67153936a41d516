"""Metrics of continuous phenotypes, in the target's unit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from kmtr.metrics.resampling import labelled, sums, weighted_mean

LEAST_SUBJECTS = 3
"""Subjects below which nothing is said."""
MIN_LABELLED = 3
"""Labelled subjects below which nothing is regressed on them."""

_ROUNDING = 1e-12
"""Share of the mean square below which a variance is rounding."""


def r2(truth: np.ndarray, predicted: np.ndarray, reference: float | np.ndarray) -> float:
    """Share of variance explained on held-out subjects, against always answering `reference` (the training mean)."""
    return float(1 - np.sum((truth - predicted) ** 2) / np.sum((truth - reference) ** 2))


@dataclass(frozen=True)
class Agreement:
    """Predictions against truth; errors are predicted - truth, in the target's unit.

    Attributes:
        mae, mae_sd: mean of the absolute errors and their SD over subjects.
        r2: see `weighted_r2`; pearson: correlation; both without unit.
        bias: mean error.
        limits: 95 % limits of agreement, bias -+ 1.96 SD of the errors (Bland and Altman, Lancet 327:307, 1986).
        subjects: whose truth is known.
        unanswered: of these, without a finite prediction; where there is one all metrics are NaN, since leaving it out
            would reward a system for what it fails at.
    """

    mae: float
    mae_sd: float
    r2: float
    pearson: float
    bias: float
    limits: tuple[float, float]
    subjects: int
    unanswered: int


def agreement(
    truth: Float[np.ndarray, " subject"], predicted: Float[np.ndarray, " subject"], reference: float
) -> Agreement:
    """All metrics of a phenotype. SDs have n - 1 in the denominator.

    Args:
        truth: NaN where unknown: left out.
        predicted: in the same unit.
        reference: mean of the training labels, which R2 compares with.

    Returns:
        NaN in every metric with fewer than 3 subjects or with one unanswered; in `r2` where the truth is constant, in
        `pearson` where either is.
    """
    y, guess, one = _known(truth, predicted, np.ones((1, len(truth))))
    unanswered = int(np.count_nonzero(np.isnan(guess)))
    if len(y) < LEAST_SUBJECTS or unanswered:
        nan = float("nan")
        return Agreement(nan, nan, nan, nan, nan, (nan, nan), len(y), unanswered)
    error = guess - y
    bias, deviation = float(error.mean()), float(error.std(ddof=1))
    return Agreement(
        mae=float(np.abs(error).mean()),
        mae_sd=float(np.abs(error).std(ddof=1)),
        r2=float(weighted_r2(y, guess, reference, one)[0]),
        pearson=float(weighted_pearson(y, guess, one)[0]),
        bias=bias,
        limits=(bias - 1.96 * deviation, bias + 1.96 * deviation),
        subjects=len(y),
        unanswered=0,
    )


def weighted_mae(
    truth: Float[np.ndarray, " subject"],
    predicted: Float[np.ndarray, " subject"],
    weights: Float[np.ndarray, "draw subject"],
) -> Float[np.ndarray, " draw"]:
    """Mean absolute error of each draw; NaN where a subject with known truth has no prediction."""
    truth, predicted, weights = _known(truth, predicted, weights)
    if np.isnan(predicted).any():
        return np.full(len(weights), np.nan)
    return weighted_mean(np.abs(predicted - truth), weights)


def weighted_r2(
    truth: Float[np.ndarray, " subject"],
    predicted: Float[np.ndarray, " subject"],
    reference: float,
    weights: Float[np.ndarray, "draw subject"],
) -> Float[np.ndarray, " draw"]:
    """R2 of each draw, 1 - sum (predicted - truth)^2 / sum (truth - reference)^2: against always answering `reference`,
    the training mean. NaN where the truth is constant.
    """
    truth, predicted, weights = _known(truth, predicted, weights)
    error, total = sums(weights, (predicted - truth) ** 2, (truth - reference) ** 2)
    r2: np.ndarray = 1 - error / _positive(total, _variation(truth, weights))
    return r2


def weighted_pearson(
    truth: Float[np.ndarray, " subject"],
    predicted: Float[np.ndarray, " subject"],
    weights: Float[np.ndarray, "draw subject"],
) -> Float[np.ndarray, " draw"]:
    """Pearson's correlation of each draw; NaN where truth or prediction is constant."""
    truth, predicted, weights = _known(truth, predicted, weights)
    if not len(truth):
        return np.full(len(weights), np.nan)
    x, y = truth - truth.mean(), predicted - predicted.mean()  # so that products keep their digits
    both, of_x, of_y, count = sums(weights, x * y, x, y, np.ones_like(x))
    with np.errstate(invalid="ignore"):
        shared = both - of_x * of_y / count
    own = [_positive(spread, spread) for spread in (_variation(truth, weights), _variation(predicted, weights))]
    return np.clip(shared / np.sqrt(own[0] * own[1]), -1, 1)


def _known(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labelled subjects in float64; a prediction that is not finite is NaN, which all sums keep."""
    truth, predicted, weights = labelled(truth, predicted, weights)
    return truth.astype(np.float64), np.where(np.isfinite(predicted), predicted, np.nan).astype(np.float64), weights


def _variation(
    values: Float[np.ndarray, " subject"], weights: Float[np.ndarray, "draw subject"]
) -> Float[np.ndarray, " draw"]:
    """Sum of squared deviations from each draw's own mean; 0 where that is rounding."""
    if not len(values):
        return np.zeros(len(weights))
    centred = values - values.mean()
    square, total, whole, count = sums(weights, centred**2, centred, values**2, np.ones_like(values))
    with np.errstate(invalid="ignore"):
        spread = square - total**2 / count
    return np.where(spread > _ROUNDING * whole, spread, 0.0)


def _positive(divisor: Float[np.ndarray, " draw"], where: Float[np.ndarray, " draw"]) -> Float[np.ndarray, " draw"]:
    """A divisor, NaN where `where` is not above 0."""
    return np.where(where > 0, divisor, np.nan)
