"""Bootstrap over subjects of any metric, for several seeds and systems on the same draws; Holm's correction.

A statistic maps weights ``draw subject`` (how often each subject is in each draw) to one value per draw. The functions
`weighted_...` of this package become one when their other arguments are bound (functools.partial). All draws are worked
on at once; a subject is drawn with its predictions by every seed and system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float

from kmtr.types import InputError

Statistic = Callable[[Float[np.ndarray, "draw subject"]], Float[np.ndarray, " draw"]]

RESAMPLES = 2000
_CELLS = 4_000_000
"""Weights worked on at once, draws times subjects: 32 MB."""
_KEPT = 8_000_000
"""Weights kept for the next call at most: 64 MB."""


def labelled(
    truth: Float[np.ndarray, " subject"],
    predicted: Float[np.ndarray, " subject"],
    weights: Float[np.ndarray, "draw subject"],
) -> tuple[Float[np.ndarray, " known"], Float[np.ndarray, " known"], Float[np.ndarray, "draw known"]]:
    """The subjects whose truth is known: where it is NaN nothing is counted."""
    known = np.isfinite(truth)
    if known.all():
        return truth, predicted, weights
    return truth[known], predicted[known], weights[:, known]


def weighted_mean(
    scores: Float[np.ndarray, " subject"], weights: Float[np.ndarray, "draw subject"]
) -> Float[np.ndarray, " draw"]:
    """Mean score of each draw; subjects whose score is NaN (a class that nobody shows) are left out."""
    known = ~np.isnan(scores)
    total, count = sums(weights, np.where(known, scores, 0.0), known)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = total / count
    return mean


def sums(
    weights: Float[np.ndarray, "draw subject"], *values: Float[np.ndarray, " subject"] | Bool[np.ndarray, " subject"]
) -> Float[np.ndarray, "value draw"]:
    """Weighted sums of each draw, all in one pass over the weights, which are far more than the values."""
    found: np.ndarray = (weights @ np.stack(values, axis=1, dtype=np.float64)).T
    return found


def resample(
    statistics: Sequence[Statistic], subjects: int, resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "draw statistic"]:
    """Values of statistics on the cohort as it is (the first draw) and on `resamples` bootstrap draws of its subjects.

    The draws follow from (`subjects`, `resamples`, `seed`) alone: two calls with the same three are paired.

    Args:
        statistics: one per seed of a system, say; each is asked with weights of `subjects` columns.

    Returns:
        ``1 + resamples`` rows; NaN where a statistic is undefined on a draw, and everywhere without subjects.
    """
    rows = [np.stack([statistic(np.ones((1, subjects))) for statistic in statistics], axis=1)]
    for weights in _draws(subjects, resamples, seed):
        rows.append(np.stack([statistic(weights) for statistic in statistics], axis=1))
    return np.concatenate(rows)


def _draws(subjects: int, resamples: int, seed: int) -> Iterable[Float[np.ndarray, "draw subject"]]:
    """Weights of all draws, in parts; those of the last call are at hand where they are few: a table asks again and
    again.
    """
    few = subjects * resamples <= _KEPT
    return (_kept_draws if few else _new_draws)(subjects, resamples, seed, max(1, _CELLS // max(subjects, 1)))


@lru_cache(maxsize=1)
def _kept_draws(subjects: int, resamples: int, seed: int, step: int) -> tuple[Float[np.ndarray, "draw subject"], ...]:
    parts = tuple(_new_draws(subjects, resamples, seed, step))
    for weights in parts:
        weights.flags.writeable = False
    return parts


def _new_draws(subjects: int, resamples: int, seed: int, step: int) -> Iterator[Float[np.ndarray, "draw subject"]]:
    rng = np.random.Generator(np.random.Philox(seed))
    for first in range(0, resamples, step):
        yield _weights(rng, min(step, resamples - first), subjects)


def _weights(rng: np.random.Generator, draws: int, subjects: int) -> Float[np.ndarray, "draw subject"]:
    """Counts of each subject among as many drawn with replacement."""
    picked = rng.integers(0, max(subjects, 1), (draws, subjects)) + subjects * np.arange(draws)[:, None]
    counts = np.bincount(picked.ravel(), minlength=draws * subjects)
    return counts.reshape(draws, subjects).astype(np.float64)


@dataclass(frozen=True)
class Estimate:
    """A metric of one system.

    Attributes:
        value: mean over seeds of the metric of each seed.
        low, high: percentile 95 % interval of that mean over bootstrap draws of subjects, the seeds as they are.
        seed_sd: SD over seeds (n - 1) of the metric on the cohort as it is; NaN with one seed.
        seeds: number of them.
        draws: bootstrap draws on which the metric is defined; the interval is over these.
    """

    value: float
    low: float
    high: float
    seed_sd: float
    seeds: int
    draws: int


def estimate(replicates: Float[np.ndarray, "draw seed"]) -> Estimate:
    """A metric with its interval, from `resample` of one statistic per seed.

    Seeds are averaged within each draw, before the interval is taken. For metrics that are sums over subjects (R2, MAE,
    Dice) this is the mean over seeds of every subject's error or score, then the bootstrap over subjects. Predictions
    are never averaged: their mean is an ensemble, another and better system.
    """
    mean = replicates.mean(1)
    low, high, draws = _interval(mean)
    seeds = replicates.shape[1]
    deviation = float(replicates[0].std(ddof=1)) if seeds > 1 else float("nan")
    return Estimate(float(mean[0]), low, high, deviation, seeds, draws)


@dataclass(frozen=True)
class Difference:
    """A metric of one system less that of another on the same subjects.

    Attributes:
        value, low, high: as of an `Estimate`, of the difference.
        p: two-sided p-value 2 (k + 1) / (n + 1), at most 1: k of n draws are zero or on the other side of zero from
            most. Never 0: at least 2 / (n + 1).
        draws: n.
    """

    value: float
    low: float
    high: float
    p: float
    draws: int


def difference(a: Float[np.ndarray, "draw seed"], b: Float[np.ndarray, "draw other_seed"]) -> Difference:
    """Paired difference a - b from `resample` of both systems on the same draws.

    Each system's seeds are averaged within a draw. A score that is NaN for one of the systems alone is left out of that
    system's mean only, so that the difference is that of the two values in a table.

    Raises:
        InputError: numbers of draws differ: the two are not paired.
    """
    if len(a) != len(b):
        raise InputError(f"difference: expected both systems on the same draws, got {len(a)} and {len(b)}")
    gain = a.mean(1) - b.mean(1)
    low, high, draws = _interval(gain)
    if not draws:
        return Difference(float(gain[0]), low, high, float("nan"), 0)
    others = gain[1:]
    fewer = min(np.count_nonzero(others <= 0), np.count_nonzero(others >= 0))
    return Difference(float(gain[0]), low, high, min(1.0, 2 * (fewer + 1) / (draws + 1)), draws)


def holm(p: Float[np.ndarray, " comparison"]) -> Float[np.ndarray, " comparison"]:
    """Adjusted p-values of one family of comparisons (Holm, Scand J Stat 6:65, 1979): controls the chance of any false
    claim whatever the dependence.

    The i-th smallest of m is multiplied by m - i + 1; none becomes less than a smaller one's, nor more than 1. NaN, a
    comparison that could not be made, stays NaN and does not count in m.
    """
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p, kind="stable")[: np.count_nonzero(~np.isnan(p))]  # NaN sorts last
    factor = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factor), 1)
    return adjusted


def _interval(values: Float[np.ndarray, " draw"]) -> tuple[float, float, int]:
    """Percentile 95 % interval over the draws on which a value is defined, and their number; the first is the cohort's
    own.
    """
    defined = values[1:][~np.isnan(values[1:])]
    if np.isnan(values[0]) or not len(defined):
        return float("nan"), float("nan"), 0
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high), len(defined)
