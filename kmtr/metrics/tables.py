"""Scores and paired comparisons of systems from a long table of predictions: one row per subject, system, seed, target.

Columns, each a numpy array of the same length:

    subject                 pseudonym
    system, input, labels   what was fitted, what it sees, number of labelled training subjects
    seed                    of the training
    R, true_R               nominal acceleration, and all samples over acquired samples
    target                  name of the phenotype, disease or score
    truth, value            NaN = unknown; the prediction, or a subject's own score (Dice, PSNR)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from kmtr.metrics.diseases import weighted_auroc, weighted_average_precision, weighted_f1, weighted_sensitivity
from kmtr.metrics.phenotypes import weighted_mae, weighted_pearson, weighted_r2
from kmtr.metrics.resampling import (
    RESAMPLES,
    Difference,
    Estimate,
    Statistic,
    difference,
    estimate,
    holm,
    resample,
    weighted_mean,
)
from kmtr.types import InputError

Columns = Mapping[str, np.ndarray]

COLUMNS = ("subject", "system", "input", "labels", "seed", "R", "true_R", "target", "truth", "value")
CALLED = 0.5
"""Between the values 0 and 1 of `f1`."""
LEVEL = 0.05
"""Adjusted p-value below which a difference is claimed."""

_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], Statistic]] = {
    "mae": lambda truth, value: partial(weighted_mae, truth, value),
    "pearson": lambda truth, value: partial(weighted_pearson, truth, value),
    "auroc": lambda truth, value: partial(weighted_auroc, truth, value),
    "average_precision": lambda truth, value: partial(weighted_average_precision, truth, value),
    "sensitivity": lambda truth, value: partial(weighted_sensitivity, truth, value),
    "f1": lambda truth, value: partial(weighted_f1, truth, value, CALLED),
    "score": lambda _, value: partial(weighted_mean, value),
}

METRICS = ("r2", *_METRICS)
"""`r2` needs the training mean of each target; `score` is the mean of values that are scores, NaN left out; values of
`f1` say who is called diseased: 1 at or above the threshold, else 0.
"""


class Cell(NamedTuple):
    """Key of one score."""

    system: str
    input: str
    labels: Any
    acceleration: Any
    target: str


@dataclass(frozen=True)
class Score:
    """A metric of one system, input, label budget, acceleration and target.

    Attributes:
        true_acceleration: mean over subjects and seeds.
        subjects: pseudonyms, ascending; those without truth included.
        truth: of each subject, NaN where unknown.
        replicates: the metric on the cohort (first row) and on each bootstrap draw, see `resampling.resample`.
    """

    cell: Cell
    metric: str
    true_acceleration: float
    subjects: tuple[str, ...]
    truth: Float[np.ndarray, " subject"]
    estimate: Estimate
    replicates: Float[np.ndarray, "draw seed"]


@dataclass(frozen=True)
class Comparison:
    """A score less that of the reference system.

    Attributes:
        p_adjusted: by Holm over all comparisons made together.
    """

    cell: Cell
    metric: str
    difference: Difference
    p_adjusted: float


def score_table(
    columns: Columns,
    metric: str,
    training_means: Mapping[str, float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Score]:
    """Scores with intervals, in the order of their cells. The order of rows changes nothing.

    Args:
        columns: the table; only rows of targets that this metric suits.
        metric: one of METRICS.
        training_means: of each target, for `r2`.

    Raises:
        InputError: columns are missing or differ in length; an unknown metric; a target without training mean; a
            subject twice for one seed, or absent for some seeds only; truths of one subject that differ.
    """
    _check(columns, metric)
    scores = []
    for cell, rows in _cells(columns):
        subjects, truth, values = _by_seed(columns, cell, rows)
        if metric == "r2":
            if cell.target not in (training_means or {}):
                raise InputError(f"score_table: expected the training mean of {cell.target} for r2, got none")
            mean = float((training_means or {})[cell.target])
            statistics: list[Statistic] = [partial(weighted_r2, truth, value, mean) for value in values]
        else:
            statistics = [_METRICS[metric](truth, value) for value in values]
        replicates = resample(statistics, len(subjects), resamples, seed)
        true_r = float(np.mean(columns["true_R"][rows]))
        scores.append(Score(cell, metric, true_r, subjects, truth, estimate(replicates), replicates))
    return scores


def compare(scores: Sequence[Score], system: str, input: str) -> list[Comparison]:
    """Every score less that of a reference system on its input, at the same labels, acceleration and target.

    All comparisons made in one call are one family of Holm's correction. Scores that have no counterpart, and the
    reference's own, are left out.

    Raises:
        InputError: the reference has no scores; two that are compared differ in metric, subjects or truth; or the draws
            are too few for any adjusted p-value of the family to be below .05.
    """
    reference = {s.cell[2:]: s for s in scores if s.cell[:2] == (system, input)}
    if not reference:
        known = ", ".join(sorted({f"{s.cell.system} on {s.cell.input}" for s in scores})) or "none"
        raise InputError(f"compare: expected scores of {system} on {input}, got those of {known}")
    others = [s for s in scores if s.cell[:2] != (system, input) and s.cell[2:] in reference]
    return compare_pairs([(s, reference[s.cell[2:]]) for s in others])


def compare_pairs(pairs: Sequence[tuple[Score, Score]]) -> list[Comparison]:
    """The first score of each pair less the second, all of them one family of Holm's correction.

    Raises:
        InputError: two that are compared differ in metric, subjects or truth; or the draws are too few for any adjusted
            p-value of the family to be below .05.
    """
    made = [_difference(one, other) for one, other in pairs]
    draws, least = max((d.draws for d in made), default=0), round(2 * len(made) / LEVEL)
    if 0 < draws < least:
        raise InputError(
            f"compare: expected at least {least} resamples for {len(made)} comparisons, got {draws}: no adjusted "
            f"p-value could be below {LEVEL}"
        )
    adjusted = holm(np.array([d.p for d in made]))
    return [Comparison(s.cell, s.metric, d, float(p)) for (s, _), d, p in zip(pairs, made, adjusted, strict=True)]


def _difference(one: Score, other: Score) -> Difference:
    same = one.subjects == other.subjects and np.array_equal(one.truth, other.truth, equal_nan=True)
    if not same or one.metric != other.metric:
        raise InputError(
            f"compare: expected one metric of the same subjects and truths for {one.cell.target}, got {one.metric} of "
            f"{len(one.subjects)} by {one.cell.system} and {other.metric} of {len(other.subjects)} by "
            f"{other.cell.system}, which differ"
        )
    return difference(one.replicates, other.replicates)


def _check(columns: Columns, metric: str) -> None:
    if metric not in METRICS:
        raise InputError(f"score_table: expected a metric of {', '.join(METRICS)}, got {metric!r}")
    if missing := [name for name in COLUMNS if name not in columns]:
        raise InputError(f"score_table: expected the columns {', '.join(COLUMNS)}, {missing[0]} is missing")
    if len({len(columns[name]) for name in COLUMNS}) > 1:
        lengths = ", ".join(f"{name} {len(columns[name])}" for name in COLUMNS)
        raise InputError(f"score_table: expected columns of one length, got {lengths}")


def _cells(columns: Columns) -> Iterator[tuple[Cell, np.ndarray]]:
    """Each cell and its rows."""
    codes = [np.unique(columns[name], return_inverse=True)[1] for name in ("system", "input", "labels", "R", "target")]
    _, first, group = np.unique(np.stack(codes, axis=1), axis=0, return_index=True, return_inverse=True)
    order = np.argsort(group, kind="stable")
    for row, rows in zip(first, np.split(order, np.cumsum(np.bincount(group))[:-1]), strict=True):
        values = (columns[name][row] for name in ("system", "input", "labels", "R", "target"))
        yield Cell(*(value.item() if isinstance(value, np.generic) else value for value in values)), rows


def _by_seed(
    columns: Columns, cell: Cell, rows: np.ndarray
) -> tuple[tuple[str, ...], Float[np.ndarray, " subject"], Float[np.ndarray, "seed subject"]]:
    """Subjects in ascending order, their truth, and their values by every seed."""
    names, subject = np.unique(columns["subject"][rows], return_inverse=True)
    seeds, seed = np.unique(columns["seed"][rows], return_inverse=True)
    count = np.zeros((len(seeds), len(names)), dtype=np.int64)
    np.add.at(count, (seed, subject), 1)
    where = f"{cell.target} by {cell.system} on {cell.input} at R = {cell.acceleration}"
    if (count != 1).any():
        raise InputError(
            f"score_table: expected every subject once for each seed, got {count.min()} to {count.max()} rows of one "
            f"for {where}"
        )
    truth, values = np.empty(count.shape), np.empty(count.shape)
    truth[seed, subject] = columns["truth"][rows]
    values[seed, subject] = columns["value"][rows]
    if not np.array_equal(truth, np.broadcast_to(truth[:1], truth.shape), equal_nan=True):
        raise InputError(f"score_table: expected one truth of each subject, got several for {where}")
    return tuple(map(str, names)), truth[0], values
