"""Scores of predictions: pure functions of the rows of a file of predictions (`predictions.SCHEMA`).

Systems are compared on the same subjects: rows are joined by subject, and a system that lacks a subject whose truth is
known is refused. What is measured on masks (`Name.measured`) may lack some, such as those whose size of a pixel is
unknown: it is compared on the others, and their number is told. R2 compares with the rows of the system "mean" of the
same seed and number of labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from kmtr.evaluate.predictions import MEAN, Name
from kmtr.metrics import Probe
from kmtr.types import InputError

MIN_KNOWN = 3
"""Held-out subjects with a label, below which a target has no score."""


class Fit(NamedTuple):
    """One fitting of a system: which seed drew its labelled subjects, and how many they were."""

    name: Name
    seed: int
    labels: int


@dataclass(frozen=True)
class Panel:
    """Predictions of all systems for the same held-out subjects.

    Attributes:
        true_acceleration: NaN where unknown.
        truth: NaN where unknown.
        values: NaN where a system says nothing of a target.
    """

    subjects: tuple[str, ...]
    accelerations: tuple[int, ...]
    targets: tuple[str, ...]
    true_acceleration: Float[np.ndarray, "acceleration subject"]
    truth: Float[np.ndarray, "subject target"]
    values: dict[Fit, Float[np.ndarray, "acceleration subject target"]]

    def true_acceleration_at(self, number: int) -> float:
        """Lines that exist over lines acquired at an R, of subjects with as many lines each: their harmonic mean."""
        known = self.true_acceleration[number][np.isfinite(self.true_acceleration[number])]
        return float(len(known) / np.sum(1 / known)) if len(known) else float("nan")


def panel(table: pa.Table, accelerations: Sequence[int] = (), targets: Sequence[str] = ()) -> Panel:
    """Rows as arrays; accelerations and targets in the order of the rows, unless one is given; subjects, in that order,
    are those of whom there is a row of the targets (masks and images may be scored of fewer than numbers).

    Raises:
        InputError: a system lacks a subject whose truth is known, which only what is measured on masks may, or two rows
            differ in the truth of a subject.
    """
    rs = tuple(accelerations) or tuple(pc.unique(table.column("acceleration")).to_pylist())
    names = tuple(targets) or tuple(pc.unique(table.column("target")).to_pylist())
    r, t = _places(table, "acceleration", rs), _places(table, "target", names)
    subjects = tuple(pc.unique(table.column("subject").filter(pa.array(t >= 0))).to_pylist())
    s = _places(table, "subject", subjects)
    wanted = (r >= 0) & (t >= 0)
    truth = np.full((len(subjects), len(names)), np.nan)
    true = np.full((len(rs), len(subjects)), np.nan)
    given, kept = _floats(table, "truth"), _floats(table, "true_acceleration")
    known = wanted & np.isfinite(given)
    truth[s[known], t[known]] = given[known]
    if (truth[s[known], t[known]] != given[known]).any():
        raise InputError("predictions: expected one truth of each subject and target, got rows that differ in it")
    known = wanted & np.isfinite(kept)
    true[r[known], s[known]] = kept[known]
    value = _floats(table, "value")
    found: dict[Fit, np.ndarray] = {}
    for fit, members in _fits(table).items():
        mine = members[wanted[members]]
        values = found[fit] = np.full((len(rs), len(subjects), len(names)), np.nan)
        values[r[mine], s[mine], t[mine]] = value[mine]
        if not fit.name.measured:
            _check_complete(fit, values, np.isfinite(truth), rs, names)
    return Panel(subjects, rs, names, true, truth, found)


def _places(table: pa.Table, column: str, values: Sequence[str] | Sequence[int]) -> np.ndarray:
    """Place of every row's cell in `values`; -1: not in it."""
    among = pa.array(values, table.schema.field(column).type)
    places = pc.fill_null(pc.index_in(table.column(column), among), -1)
    return np.asarray(places.to_numpy(), np.int64)


def _floats(table: pa.Table, column: str) -> np.ndarray:
    """A column with NaN for null."""
    return np.asarray(pc.fill_null(table.column(column), float("nan")).to_numpy(), np.float64)


def _fits(table: pa.Table) -> dict[Fit, np.ndarray]:
    """Rows of every fit, in the order of their first."""
    columns = ("system", "input", "seed", "labels")
    codes = np.zeros(len(table), np.int64)
    for column in columns:
        each = table.column(column).combine_chunks().dictionary_encode()
        codes = codes * max(len(each.dictionary), 1) + each.indices.to_numpy()
    _, first, numbers = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(numbers, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(numbers))[:-1]) if len(table) else []
    found = {}
    for place in np.argsort(first):
        system, seen, seed, labels = (table.column(column)[int(first[place])].as_py() for column in columns)
        found[Fit(Name(system, seen), seed, labels)] = members[place]
    return found


def _check_complete(fit: Fit, values: np.ndarray, known: np.ndarray, rs: Sequence[int], names: Sequence[str]) -> None:
    """Refuse a system that says something of some subjects whose truth is known, and nothing of others."""
    said = (np.isfinite(values) & known).sum(1)
    partly = (said > 0) & (said < known.sum(0))
    if partly.any():
        r, t = (int(place[0]) for place in np.nonzero(partly))
        raise InputError(
            f"predictions: expected {fit.name.title} at R = {rs[r]} to say {names[t]} of the same "
            f"{known[:, t].sum()} subjects as the others, got {said[r, t]} of them"
        )


# ---------------------------------------------------------------------------------------- systems at one acceleration


@dataclass(frozen=True)
class Scores:
    """Systems at one nominal acceleration, target by target, and the R of what was really acquired."""

    acceleration: int
    true_acceleration: float
    probes: dict[Name, dict[str, Probe]]


def scores_of(table: pa.Table) -> list[Scores]:
    """Truth and prediction of each system at each R, of all targets that enough held-out subjects have; of what is
    measured on masks, of the subjects that it could be measured of.

    Raises:
        InputError: rows of several seeds or numbers of labels, or as `panel`.
    """
    seen = panel(table)
    targets = [(i, t) for i, t in enumerate(seen.targets) if np.isfinite(seen.truth[:, i]).sum() >= MIN_KNOWN]
    scored = [fit for fit, v in seen.values.items() if any(np.isfinite(v[..., i]).any() for i, _ in targets)]
    settings = {(fit.seed, fit.labels) for fit in scored}
    if len(settings) != 1 or Fit(MEAN, *next(iter(settings))) not in scored:
        raise InputError(
            f"predictions: expected rows of {MEAN.title!r} and other systems of one seed and number of labels, got "
            f"{', '.join(f'{fit.name.title} (seed {fit.seed}, {fit.labels} labels)' for fit in scored) or 'none'}"
        )
    reference = seen.values[Fit(MEAN, *next(iter(settings)))]
    found = []
    for number, r in enumerate(seen.accelerations):
        probes: dict[Name, dict[str, Probe]] = {}
        for fit in scored:
            for i, target in targets:
                known = np.isfinite(seen.truth[:, i])
                if fit.name.measured:
                    known &= np.isfinite(seen.values[fit][number, :, i])
                predicted, mean = seen.values[fit][number, known, i], reference[number, known, i]
                if known.sum() >= MIN_KNOWN and np.isfinite(predicted).all() and np.isfinite(mean).all():
                    probe = Probe(seen.truth[known, i], predicted, float(mean[0]))
                    probes.setdefault(fit.name, {})[target] = probe
        found.append(Scores(r, seen.true_acceleration_at(number), probes))
    return found


# ------------------------------------------------------------------------------ systems over seeds and accelerations


@dataclass(frozen=True)
class Result:
    """Predictions of one fit for the held-out subjects, in the targets' units.

    Attributes:
        predicted: NaN where a target has too few labels.
        mean: mean of the labels it learnt from, with which R2 compares.
    """

    predicted: Float[np.ndarray, "acceleration subject target"]
    mean: Float[np.ndarray, " target"]

    def r2(self, truth: Float[np.ndarray, "subject target"]) -> Float[np.ndarray, "acceleration target"]:
        """R2 of each target; NaN where it has too few labels."""
        error, spread = _squares(self, truth)
        with np.errstate(invalid="ignore"):
            return np.asarray(1 - error.sum(1) / spread.sum(0))


def results_of(seen: Panel) -> dict[tuple[str, int, int], Result]:
    """(system, seed, number of labels) -> result.

    Raises:
        InputError: a seed and number of labels without rows of the system "mean".
    """
    found = {}
    for fit, values in seen.values.items():
        reference = seen.values.get(fit._replace(name=MEAN))
        if reference is None:
            raise InputError(
                f"predictions: expected rows of {MEAN.title!r} with seed {fit.seed} and {fit.labels} labels, got none"
            )
        found[fit.name.system, fit.seed, fit.labels] = Result(values, reference[0, 0])
    return found


@dataclass(frozen=True)
class Difference:
    """Mean R2 of one method over another's, on the same held-out subjects.

    Attributes:
        value: mean over seeds, accelerations and targets.
        subjects: 95 % bootstrap interval over held-out subjects, the seeds as they are.
        both: the same over seeds too; where there is one seed, that of `subjects`.
        each: the value of every seed.
    """

    value: float
    subjects: tuple[float, float]
    both: tuple[float, float]
    each: tuple[float, ...]


def difference(
    a: Sequence[Result],
    b: Sequence[Result],
    truth: Float[np.ndarray, "subject target"],
    resamples: int,
    accelerations: Iterable[int] | None = None,
    targets: Iterable[int] | None = None,
) -> Difference:
    """R2(a) - R2(b), paired by held-out subject and by seed.

    Args:
        a, b: one result per seed, in the same order.
        accelerations, targets: indices whose mean is taken; None: all.

    Raises:
        ValueError: not as many results of both, or of other numbers of subjects than `truth`.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"difference: expected as many results of both, at least one, got {len(a)} and {len(b)}")
    which_r = slice(None) if accelerations is None else list(accelerations)
    which_t = slice(None) if targets is None else list(targets)
    rng = np.random.Generator(np.random.Philox(0))
    subjects = len(truth)
    counts = rng.multinomial(subjects, np.full(subjects, 1 / subjects), size=resamples).astype(np.float64)
    counts = np.concatenate([np.ones((1, subjects)), counts])  # the first is the cohort itself
    gains = []
    for one, other in zip(a, b, strict=True):
        missed = []  # 1 - R2
        for error, spread in (_squares(one, truth), _squares(other, truth)):
            with np.errstate(invalid="ignore"):
                total = np.einsum("ns,rst->nrt", counts, error[which_r][..., which_t])
                missed.append(total / (counts @ spread[:, which_t])[:, None])
        gains.append(np.nanmean(missed[1] - missed[0], axis=(1, 2)))
    each = np.stack(gains, axis=1)
    drawn = rng.integers(0, len(a), (resamples, len(a)))
    both = np.take_along_axis(each[1:], drawn, axis=1).mean(1)
    return Difference(float(each[0].mean()), _interval(each[1:].mean(1)), _interval(both), tuple(map(float, each[0])))


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def _squares(
    result: Result, truth: Float[np.ndarray, "subject target"]
) -> tuple[Float[np.ndarray, "acceleration subject target"], Float[np.ndarray, "subject target"]]:
    """Squared error of a result and of the mean; both zero where a label is unknown, so that nothing counts there."""
    known = np.isfinite(truth) & np.isfinite(result.mean)
    error = np.where(known, result.predicted - truth, 0.0) ** 2
    return error, np.where(known, truth - result.mean, 0.0) ** 2


def summary(
    results: Sequence[Result],
    truth: Float[np.ndarray, "subject target"],
    accelerations: Sequence[int],
    targets: Sequence[str],
) -> Mapping[str, Mapping[str, float]]:
    """Means over seeds of R2: R -> ``mean`` over targets, its ``sd`` between seeds, and each target -> its R2.

    Args:
        results: one of each seed.
    """
    each = np.stack([result.r2(truth) for result in results])
    mean = np.nanmean(each, axis=2)
    spread = mean.std(0, ddof=1) if len(results) > 1 else np.zeros(mean.shape[1])
    return {
        str(r): {
            "mean": float(mean[:, i].mean()),
            "sd": float(spread[i]),
            **{target: float(each[:, i, j].mean()) for j, target in enumerate(targets)},
        }
        for i, r in enumerate(accelerations)
    }
