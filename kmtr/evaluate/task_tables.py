"""Tables of a model of tasks beside its floors, with 95 % intervals, made of the rows of its predictions alone.

Subjects are drawn with replacement (`metrics.resampling`), the same draws for all systems. A difference is that to the
strongest floor: of all systems but the model, and ceilings, the one that is best at this target, on average over R, on
the very subjects that are compared, which favours the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float

from kmtr.evaluate import thresholds
from kmtr.evaluate.predictions import CEILINGS, MEAN, Name
from kmtr.evaluate.scores import MIN_KNOWN, Fit, Panel, panel
from kmtr.metrics import Comparison, Score, agreement, compare_pairs, score_table
from kmtr.metrics.dense import DICE, DISTANCES, IMAGES, IN_BOX, NAMES, PHASES
from kmtr.report.contact import title_of
from kmtr.report.intervals import Column, Interval, IntervalTable, Value
from kmtr.types import DISEASES, PHENOTYPES

Key = tuple[Name, int, str]
"""System, nominal R, target."""
Scored = dict[Key, Score]

DRAWS_PER_COMPARISON = 80
"""Bootstrap draws for each comparison of a family: twice what Holm's correction needs at a level of .05, since a metric
may be undefined on a draw.
"""
MEAN_DICE = tuple(f"dice_mean_{phase}" for phase in PHASES)
CONDITIONS = (Column("R"), Column("true R", 2), Column("system"))
FLOOR = "strongest floor"
GAIN = "_gain"
"""End of the name of a table of differences."""
_PAIRED = (
    "Differences: the model less its strongest floor, on the same draws of the same subjects; p by the bootstrap, "
    "corrected by Holm over all rows."
)


def tables_of(
    rows: pa.Table, ours: Collection[Name], resamples: int, validation: pa.Table | None = None
) -> list[IntervalTable]:
    """All tables that the rows have something for: of each task its scores, and the differences to its floors.

    Args:
        rows: of one seed and number of labels (`predictions.SCHEMA`).
        ours: names of the model; all other systems but `CEILINGS` are floors.
        resamples: bootstrap draws; where a family of comparisons needs more, its table has more.
        validation: rows of validation subjects, who choose the thresholds of F1; None: there are none.
    """
    found: list[IntervalTable] = []
    for targets, make in (
        (tuple(PHENOTYPES), phenotypes),
        (DISEASES, partial(diseases, validation=validation)),
        ((*DICE, *DISTANCES), segmentation),
        ((*IMAGES, *IN_BOX), images),
    ):
        there = set(pc.unique(rows.column("target")).to_pylist())
        if asked := tuple(target for target in targets if target in there):
            found += make(with_truth(panel(rows, targets=asked)), ours, resamples)
    return [one for one in found if one.rows]


def phenotypes(seen: Panel, ours: Collection[Name], resamples: int) -> list[IntervalTable]:
    """Agreement of each phenotype, those measured on masks as systems of their own, and differences of R2."""
    reference = {target: mean for i, target in enumerate(seen.targets) if np.isfinite(mean := _mean_of(seen, i))}
    seen = _only(seen, [target in reference for target in seen.targets])
    draws = draws_for(seen, ours, resamples)
    r2, mae, pearson = (scored(seen, metric, draws, reference) for metric in ("r2", "mae", "pearson"))
    bias = scored(_errors(seen), "score", draws)
    rows: list[tuple[Value, ...]] = []
    for name, r, target in _ordered(mae, seen):
        key = name, r, target
        whole = agreement(mae[key].truth, _values(seen, key, mae[key].subjects), reference[target])
        rows.append(
            (
                *(title_of(target), *_conditions(seen, key), whole.subjects, interval(mae[key]), whole.mae_sd),
                *(interval(r2[key]), interval(pearson[key]), interval(bias[key]), *whole.limits),
            )
        )
    columns: tuple[Column, ...] = (
        Column("phenotype"),
        *CONDITIONS,
        Column("subjects"),
        Column("MAE", 2),
        Column("SD of |error|", 2),
    )
    columns += (Column("R2"), Column("r"), Column("bias", 2, True))
    columns += (Column("lower limit", 2, True), Column("upper limit", 2, True))
    note = (
        "In the phenotype's unit. R2: against always answering the training mean. Bias and limits of agreement (bias "
        "∓ 1.96 SD): predicted − true. A system '..., masks' is measured on the predicted masks, and scored and "
        "compared on the subjects of whom it can be measured."
    )
    table = IntervalTable("phenotypes", _caption("Phenotypes", seen, draws), columns, tuple(rows), note)
    again = partial(scored, metric="r2", resamples=draws, means=reference)
    return [table, *differences("phenotypes", "R2", r2, seen, ours, again=again)]


def diseases(
    seen: Panel, ours: Collection[Name], resamples: int, validation: pa.Table | None = None
) -> list[IntervalTable]:
    """Detection of each disease, F1 at the threshold of validation subjects, and differences of AUROC."""
    draws, limits = draws_for(seen, ours, resamples), thresholds.choose(seen, validation)
    names = ("auroc", "average_precision", "sensitivity")
    auroc, precision, sensitivity = (scored(seen, metric, draws) for metric in names)
    f1 = scored(thresholds.called(seen, limits), "f1", draws)
    rows: list[tuple[Value, ...]] = []
    for key in _ordered(auroc, seen):
        known = auroc[key].truth[np.isfinite(auroc[key].truth)]
        rows.append(
            (
                *(title_of(key[2]), *_conditions(seen, key), len(known), int(known.sum()), interval(auroc[key])),
                *(interval(precision[key]), float(known.mean()), interval(sensitivity[key])),
                *((interval(f1[key]), limits.of(*key, seen)) if key in f1 else (None, None)),
            )
        )
    columns: tuple[Column, ...] = (
        Column("disease"),
        *CONDITIONS,
        Column("subjects"),
        Column("diseased"),
        Column("AUROC"),
    )
    columns += (Column("average precision"), Column("prevalence"), Column("sensitivity at 90 % specificity"))
    columns += (Column("F1"), Column("threshold"))
    note = f"A guess has an AUROC of .5 and the prevalence as its average precision. {limits.note()}"
    if any(fit.name in CEILINGS for fit in seen.values):
        note += (
            " The ceiling reads each disease off the subject's true phenotypes, which no input says: it is no floor."
        )
    table = IntervalTable("diseases", _caption("Diseases", seen, draws), columns, tuple(rows), note)
    again = partial(scored, metric="auroc", resamples=draws)
    return [table, *differences("diseases", "AUROC", auroc, seen, ours, again=again)]


def segmentation(seen: Panel, ours: Collection[Name], resamples: int) -> list[IntervalTable]:
    """Dice of each class, differences of it, and distances of contours."""
    overlap = with_mean_dice(_only(seen, [target in DICE for target in seen.targets]))
    draws = draws_for(overlap, ours, resamples)
    dice = scored(overlap, "score", draws)
    rows: list[tuple[Value, ...]] = []
    for number, r in enumerate(seen.accelerations):
        for name in _systems(seen):
            for phase in PHASES:
                found = [dice.get((name, r, f"dice_{kind}_{phase}")) for kind in (*NAMES, "mean")]
                if any(found):
                    true = seen.true_acceleration_at(number)
                    rows.append(
                        (r, true, name.title, phase.upper(), *(interval(one) if one else None for one in found))
                    )
    classes = tuple(Column(name.replace("_", " ")) for name in (*NAMES, "mean"))
    columns = (*CONDITIONS, Column("phase"), *classes)
    note = "At end-diastole and end-systole of the truth, over all slices and views; mean: over a subject's classes."
    made = [IntervalTable("dice", _caption("Dice of masks", seen, draws), columns, tuple(rows), note)]
    made += differences("dice", "Dice", dice, overlap, ours)
    return made + distances(_only(seen, [target in DISTANCES for target in seen.targets]), resamples)


def distances(seen: Panel, resamples: int) -> list[IntervalTable]:
    """95 % Hausdorff distances beside missed and spurious slices; empty where no size of a pixel is known."""
    found = scored(seen, "score", resamples)
    rows: list[tuple[Value, ...]] = []
    for number, r in enumerate(seen.accelerations):
        for name in _systems(seen):
            for kind in NAMES:
                cells: list[Value] = []
                for phase in PHASES:
                    asked = (f"hd95_{kind}_{phase}_mm", f"missed_{kind}_{phase}", f"spurious_{kind}_{phase}")
                    hd95, missed, spurious = (found.get((name, r, target)) for target in asked)
                    cells += [interval(hd95) if hd95 else None]
                    cells += [one.estimate.value if one else None for one in (missed, spurious)]
                if any(cell is not None for cell in cells):
                    true = seen.true_acceleration_at(number)
                    rows.append((kind.replace("_", " "), r, true, name.title, *cells))
    measured = [
        Column(f"{phase.upper()} {name}", digits)
        for phase in PHASES
        for name, digits in (("HD95 (mm)", 1), ("missed", 2), ("spurious", 2))
    ]
    note = (
        "HD95: 95 % Hausdorff distance in the plane of a slice, mean over slices that show the class in truth and "
        "prediction. Missed and spurious: slices per subject that show it in one only; no distance tells of them."
    )
    caption = _caption("Distance of contours", seen, resamples)
    columns = (Column("class"), *CONDITIONS, *measured)
    return [IntervalTable("distances", caption, columns, tuple(rows), note)] if rows else []


def images(seen: Panel, ours: Collection[Name], resamples: int) -> list[IntervalTable]:
    """PSNR, SSIM and NMSE on the field of view and in the heart's box, and differences of them."""
    draws = draws_for(seen, ours, resamples)
    found = scored(seen, "score", draws)
    rows: list[tuple[Value, ...]] = []
    for number, r in enumerate(seen.accelerations):
        for name in _systems(seen):
            cells = [found.get((name, r, target)) for target in (*IMAGES, *IN_BOX)]
            if any(cells):
                true = seen.true_acceleration_at(number)
                rows.append((r, true, name.title, *(interval(one) if one else None for one in cells)))
    measures = (("PSNR (dB)", 2), ("SSIM", 4), ("NMSE", 4))
    columns = (*CONDITIONS, *(Column(f"{n}{where}", digits) for where in ("", ", heart") for n, digits in measures))
    note = (
        "On the field of view, and in the box of the true masks ('heart'); mean over subjects. NMSE: lower is better."
    )
    made = [IntervalTable("images", _caption("Images", seen, draws), columns, tuple(rows), note)]
    return made + differences("images", "difference", found, seen, ours, lower=("nmse", "nmse_heart"))


# ------------------------------------------------------------------------------------------------ scores


def scored(seen: Panel, metric: str, resamples: int, means: dict[str, float] | None = None) -> Scored:
    """`metrics.score_table` of a panel, by system, R and target."""
    columns = columns_of(seen)
    if not len(columns["value"]):
        return {}
    scores = score_table(columns, metric, means, resamples)
    return {(Name(s.cell.system, s.cell.input), s.cell.acceleration, s.cell.target): s for s in scores}


def columns_of(seen: Panel) -> dict[str, np.ndarray]:
    """The long table of `metrics.tables`: all subjects, with NaN where a system is silent, of each system, R and target
    that the system says anything of; see `_counted`.
    """
    parts: list[dict[str, np.ndarray]] = []
    subjects, targets = np.array(seen.subjects, object), np.array(seen.targets, object)
    for fit, values in seen.values.items():
        r, s, t = np.nonzero(_counted(fit, values, seen.truth))
        same = {"system": fit.name.system, "input": fit.name.input, "labels": fit.labels, "seed": fit.seed}
        parts.append(
            {name: np.full(len(r), value, object) for name, value in same.items()}
            | {"subject": subjects[s], "target": targets[t], "R": np.array(seen.accelerations)[r]}
            | {"true_R": seen.true_acceleration[r, s], "truth": seen.truth[s, t], "value": values[r, s, t]}
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _counted(
    fit: Fit, values: Float[np.ndarray, "acceleration subject target"], truth: Float[np.ndarray, "subject target"]
) -> Bool[np.ndarray, "acceleration subject target"]:
    """Subjects that a system's score is of: all, where it says anything. What is measured on masks and lacks subjects
    whose truth is known is scored on those that it was measured of.
    """
    said = np.isfinite(values)
    every: np.ndarray = np.broadcast_to(said.any(1, keepdims=True), said.shape)
    if not fit.name.measured:
        return every
    lacks = (np.isfinite(truth) & ~said).any(1, keepdims=True)
    return said | (every & ~lacks)


class Gain(NamedTuple):
    """A difference to the strongest floor.

    Attributes:
        subjects: that it is of; of those with truth, where there is one.
    """

    comparison: Comparison
    floor: Name
    subjects: int


Among = Callable[[tuple[str, ...]], Scored]
"""Some subjects, ascending -> scores of all systems on them."""


def gains(found: Scored, ours: Collection[Name], lower: Collection[str] = (), among: Among | None = None) -> list[Gain]:
    """Differences of the model to the strongest floor of each target, one family; empty without floors.

    Args:
        lower: targets of which less is better.
        among: where scores of the model are not all of the same subjects: each is compared with floors on its own.
    """
    groups: dict[tuple[str, ...], list[Key]] = {}
    for key, score in found.items():
        if key[0] in ours:
            groups.setdefault(score.subjects, []).append(key)
    pairs: list[tuple[Score, Score]] = []
    floors: list[Name] = []
    for subjects, keys in groups.items():
        there = {k: s for k, s in (among(subjects) if among else found).items() if s.subjects == subjects}
        strongest = _strongest(there, ours, lower)
        for name, r, target in keys:
            floor = strongest.get(target)
            if floor is not None and (floor, r, target) in there:
                pairs.append((there[name, r, target], there[floor, r, target]))
                floors.append(floor)
    counts = [int(np.isfinite(one.truth).sum()) or len(one.subjects) for one, _ in pairs]
    return [Gain(*each) for each in zip(compare_pairs(pairs), floors, counts, strict=True)]


def _strongest(found: Scored, ours: Collection[Name], lower: Collection[str]) -> dict[str, Name]:
    """The floor that is best at each target, on average over R."""
    values: dict[str, dict[Name, list[float]]] = {}
    for (name, _, target), score in found.items():
        if name not in CEILINGS.union(ours) and np.isfinite(score.estimate.value):
            values.setdefault(target, {}).setdefault(name, []).append(score.estimate.value)
    means = {target: {name: float(np.mean(each)) for name, each in those.items()} for target, those in values.items()}
    return {target: (min if target in lower else max)(those, key=those.__getitem__) for target, those in means.items()}


def differences(
    name: str,
    metric: str,
    found: Scored,
    seen: Panel,
    ours: Collection[Name],
    lower: Collection[str] = (),
    again: Callable[[Panel], Scored] | None = None,
) -> list[IntervalTable]:
    """Table of `gains`; none without floors.

    Args:
        again: makes `found` of a panel of some of the subjects.
    """
    true = {r: seen.true_acceleration_at(number) for number, r in enumerate(seen.accelerations)}
    order = {target: place for place, target in enumerate(seen.targets)}
    every = tuple(sorted(seen.subjects))

    def among(subjects: tuple[str, ...]) -> Scored:
        return found if again is None or subjects == every else again(_of_subjects(seen, subjects))

    made = sorted(gains(found, ours, lower, among), key=lambda gain: order[gain.comparison.cell.target])
    rows: tuple[tuple[Value, ...], ...] = tuple(
        (
            target_title(cell.target),
            cell.acceleration,
            true[cell.acceleration],
            Name(cell.system, cell.input).title,
            gain.floor.title,
            gain.subjects,
            Interval(one.difference.value, one.difference.low, one.difference.high),
            one.difference.p,
            one.p_adjusted,
        )
        for gain in made
        for one, cell in ((gain.comparison, gain.comparison.cell),)
    )
    columns: tuple[Column, ...] = (
        Column("target"),
        *CONDITIONS,
        Column(FLOOR),
        Column("subjects"),
        Column(metric, 3, True),
        Column("p", 4),
    )
    columns += (Column("p, Holm", 4),)
    note = f"{_PAIRED} NMSE: below 0 the model wins." if lower else f"{_PAIRED} Above 0 the model wins."
    caption = f"{name.capitalize()}: gain over the strongest floor ({metric})"
    return [IntervalTable(f"{name}{GAIN}", caption, columns, rows, note)] if rows else []


def draws_for(seen: Panel, ours: Collection[Name], resamples: int) -> int:
    """Bootstrap draws: `resamples`, or more where the family of the model's comparisons needs them."""
    family = sum(int(np.isfinite(v).any(1).sum()) for fit, v in seen.values.items() if fit.name in ours)
    return max(resamples, DRAWS_PER_COMPARISON * family)


# ------------------------------------------------------------------------------------------------ panels


def with_truth(seen: Panel) -> Panel:
    """Without targets of which too few subjects are known; scores, which have no truth, stay."""
    known: list[int] = np.isfinite(seen.truth).sum(0).tolist()
    labels = {*PHENOTYPES, *DISEASES}
    return _only(
        seen, [count >= MIN_KNOWN or name not in labels for count, name in zip(known, seen.targets, strict=True)]
    )


def _only(seen: Panel, kept: Sequence[bool]) -> Panel:
    which = np.flatnonzero(kept)
    return replace(
        seen,
        targets=tuple(seen.targets[i] for i in which),
        truth=seen.truth[:, which],
        values={fit: values[..., which] for fit, values in seen.values.items()},
    )


def _of_subjects(seen: Panel, subjects: Sequence[str]) -> Panel:
    """The panel of these subjects alone."""
    which = np.flatnonzero(np.isin(seen.subjects, subjects))
    return replace(
        seen,
        subjects=tuple(seen.subjects[i] for i in which),
        true_acceleration=seen.true_acceleration[:, which],
        truth=seen.truth[which],
        values={fit: values[:, which] for fit, values in seen.values.items()},
    )


def _errors(seen: Panel) -> Panel:
    """Predicted - true, as scores."""
    return replace(seen, values={fit: values - seen.truth for fit, values in seen.values.items()})


def with_mean_dice(seen: Panel) -> Panel:
    """With `MEAN_DICE` of each subject over the classes that it has."""
    values = {}
    for fit, each in seen.values.items():
        known = np.isfinite(each)
        phases = [[target.endswith(f"_{phase}") for target in seen.targets] for phase in PHASES]
        total = np.stack([np.where(known, each, 0)[..., phase].sum(-1) for phase in phases], -1)
        count = np.stack([known[..., phase].sum(-1) for phase in phases], -1)
        mean = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
        values[fit] = np.concatenate([each, mean], -1)
    truth = np.concatenate([seen.truth, np.full((len(seen.subjects), len(MEAN_DICE)), np.nan)], 1)
    return replace(seen, targets=(*seen.targets, *MEAN_DICE), truth=truth, values=values)


def subject_means(seen: Panel, name: Name) -> np.ndarray:
    """Mean of a system's scores of each subject, ``subject``, over R and targets that it has; NaN: it has none."""
    (values,) = (values for fit, values in seen.values.items() if fit.name == name)
    known = np.isfinite(values)
    count = known.sum((0, 2))
    return np.divide(np.where(known, values, 0).sum((0, 2)), count, out=np.full(count.shape, np.nan), where=count > 0)


def of_systems(seen: Panel, names: Collection[Name]) -> Panel:
    """The panel of these systems alone."""
    return replace(seen, values={fit: values for fit, values in seen.values.items() if fit.name in names})


def target_title(target: str) -> str:
    """A target as a person reads it: ``dice_lv_cavity_ed`` -> ``lv cavity, ED``."""
    if target in (*DICE, *MEAN_DICE):
        name, _, phase = target.removeprefix("dice_").rpartition("_")
        return f"{name.replace('_', ' ')}, {phase.upper()}"
    measure = target.removesuffix("_heart")
    measures = dict(zip(IMAGES, ("PSNR (dB)", "SSIM", "NMSE"), strict=True))
    return title_of(target) if measure not in measures else measures[measure] + (", heart" if target in IN_BOX else "")


def _mean_of(seen: Panel, target: int) -> float:
    """The training mean of a target, as the system "mean" says it of every subject."""
    said = [
        values[..., target][np.isfinite(values[..., target])] for f, values in seen.values.items() if f.name == MEAN
    ]
    return float(said[0][0]) if said and len(said[0]) else float("nan")


def _values(seen: Panel, key: Key, subjects: Sequence[str]) -> np.ndarray:
    """A system's predictions of these subjects."""
    name, r, target = key
    (values,) = (values for fit, values in seen.values.items() if fit.name == name)
    place = {subject: number for number, subject in enumerate(seen.subjects)}
    which = [place[subject] for subject in subjects]
    found: np.ndarray = values[seen.accelerations.index(r), which, seen.targets.index(target)]
    return found


def _systems(seen: Panel) -> list[Name]:
    return list(dict.fromkeys(fit.name for fit in seen.values))


def _ordered(found: Scored, seen: Panel) -> list[Key]:
    """Keys by target, R and system, each in the order of the panel."""
    keys = [(name, r, target) for target in seen.targets for r in seen.accelerations for name in _systems(seen)]
    return [key for key in keys if key in found]


def _conditions(seen: Panel, key: Key) -> tuple[Value, ...]:
    name, r, _ = key
    return r, seen.true_acceleration_at(seen.accelerations.index(r)), name.title


def interval(score: Score) -> Interval:
    """A score's number with the ends of its 95 % interval."""
    return Interval(score.estimate.value, score.estimate.low, score.estimate.high)


def _caption(what: str, seen: Panel, draws: int) -> str:
    return f"{what} on {len(seen.subjects)} held-out subjects, 95 % bootstrap intervals ({draws:,} draws of subjects)"
