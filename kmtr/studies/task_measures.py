"""Measures of the study of tasks: one number per task, of a system's values of the held-out subjects."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from kmtr.config import RunConfig
from kmtr.evaluate.predictions import (
    LOWRANK,
    MASK_RIDGE,
    MEAN_MASK,
    READ_OFF,
    RIDGE,
    SHARED,
    Name,
    by_areas,
    from_masks,
)
from kmtr.evaluate.scores import MIN_KNOWN, panel
from kmtr.evaluate.task_tables import MEAN_DICE, scored, with_mean_dice, with_truth
from kmtr.metrics import Estimate, estimate, resample, weighted_auroc, weighted_mean, weighted_r2
from kmtr.metrics.dense import DICE, DISTANCES, IMAGES, IN_BOX, masks_phenotypes
from kmtr.metrics.resampling import Statistic
from kmtr.report.intervals import Interval
from kmtr.studies.task_rows import Asked, Values
from kmtr.types import DISEASES, PHENOTYPES

ALL = "mean"
"""Stands for the mean over R."""
LEVEL = 0.05
"""Level of p after Holm's correction, below which a mean over R counts as won."""
MASKS = "masks_"
"""Prefix of phenotypes that are measured on masks."""
MASKS_LVEF = f"{MASKS}lvef_pct"
AREAS = "areas_"
"""Prefix of phenotypes that a linear map makes of the areas of masks (`kmtr.metrics.areas`)."""
AREAS_LVEF = f"{AREAS}lvef_pct"
MEAN = "mean_"
"""Prefix of the mean mask's Dice among the values of floors."""


class Measure(NamedTuple):
    """A number that stands for a task, the mean over its targets; more is better.

    Attributes:
        gain: what a difference of it is called.
        floor: systems that stand for the floors, the first that there is.
        nothing: what it is of an answer that does not look at the subject; NaN: nothing fixed.
    """

    title: str
    task: str
    gain: str
    floor: tuple[Name, ...]
    nothing: float = float("nan")


MEASURES = {
    "r2": Measure("mean R2 of phenotypes", "phenotypes", "R2", (RIDGE,), 0.0),
    "masks_lvef_r2": Measure("R2 of LVEF from masks", "segmentation", "R2", (MASK_RIDGE, MEAN_MASK), 0.0),
    "areas_lvef_r2": Measure("R2 of LVEF by areas of masks", "segmentation", "R2", (MASK_RIDGE, MEAN_MASK), 0.0),
    "areas_r2": Measure("mean R2 by areas of masks", "segmentation", "R2", (MASK_RIDGE, MEAN_MASK), 0.0),
    "auroc": Measure("macro AUROC of diseases", "diseases", "AUROC", (READ_OFF, RIDGE), 0.5),
    "dice": Measure("mean Dice", "segmentation", "Dice", (MASK_RIDGE, MEAN_MASK)),
    "ssim": Measure("SSIM", "reconstruction", "SSIM", (LOWRANK, SHARED)),
}
"""Measures of tables, figure and comparisons, in their order."""
FLOOR_SAID = (
    "Floor: a ridge on the low-resolution image (phenotypes), diseases read off what it says, a linear map from the "
    "temporally shared image (masks), low-rank + sparse (images)."
)
"""The first of `Measure.floor`."""


def rows_of(rows: Iterable[Asked], name: str, measure: str) -> dict[int, Asked]:
    """Seed -> row of a contender that learns the measure's task."""
    return {one.seed: one for one in sorted(rows) if one.start == name and MEASURES[measure].task in one.tasks}


def interval_of(values: Float[np.ndarray, " draw"]) -> Interval:
    """A number with its interval, from its values on the held-out subjects (first) and on draws of them."""
    one = estimate(values[:, None])
    return Interval(one.value, one.low, one.high)


def measures(config: RunConfig) -> list[str]:
    """Measures of the tasks of a study."""
    return [name for name, measure in MEASURES.items() if measure.task in config.task.tasks]


@dataclass(frozen=True)
class Truth:
    """Truth of the held-out subjects.

    Attributes:
        subjects: pseudonyms, ascending in their places in the test split.
        values: label -> ``subject``, NaN where unknown.
    """

    subjects: tuple[str, ...]
    values: Mapping[str, Float[np.ndarray, " subject"]]


def targets_of(measure: str, config: RunConfig) -> tuple[str, ...]:
    """Targets whose mean a measure is."""
    return {
        "r2": config.task.targets,
        "masks_lvef_r2": (MASKS_LVEF,),
        "areas_lvef_r2": (AREAS_LVEF,),
        "areas_r2": tuple(f"{AREAS}{target}" for target in mappable(config)),
        "auroc": config.task.diseases,
        "dice": MEAN_DICE,
        "ssim": ("ssim",),
    }[measure]


def mappable(config: RunConfig) -> tuple[str, ...]:
    """Phenotypes of the study that masks can say: the same for systems that learn nothing but masks."""
    return tuple(target for target in config.task.targets if target in masks_phenotypes({}))


def kept(config: RunConfig) -> tuple[str, ...]:
    """Targets whose values a row keeps for each subject."""
    return (*(target for measure in MEASURES for target in targets_of(measure, config)), "psnr_db")


def values_of(rows: pa.Table, truth: Truth) -> dict[Name, dict[str, np.ndarray]]:
    """Values of each system: target -> ``acceleration subject``, all held-out subjects in the order of `truth`, NaN
    where it says nothing. Phenotypes from its masks are its own, under the prefixes `MASKS` and `AREAS`; so are
    `MEAN_DICE`.

    Args:
        rows: predictions (`predictions.SCHEMA`) of one seed and number of labels.
    """
    there = set(pc.unique(rows.column("target")).to_pylist())
    seen = [
        panel(rows, targets=tuple(target for target in some if target in there)) for some in _KINDS if there & {*some}
    ]
    seen = [with_mean_dice(one) if set(DICE) & set(one.targets) else one for one in seen]
    systems = dict.fromkeys(fit.name for one in seen for fit in one.values)
    parents = {from_masks(name): (name, MASKS) for name in systems} | {by_areas(n): (n, AREAS) for n in systems}
    found: dict[Name, dict[str, np.ndarray]] = {}
    for one in seen:
        place = {name: i for i, name in enumerate(one.subjects)}
        order = np.array([place.get(name, -1) for name in truth.subjects])
        for fit, values in one.values.items():
            owner, prefix = parents.get(fit.name, (fit.name, ""))
            for target, value in zip(one.targets, np.moveaxis(values, -1, 0), strict=True):
                if np.isfinite(value).any():
                    own = found.setdefault(owner, {})
                    own[prefix + target] = np.where(order >= 0, value[:, order], np.nan)
    return found


_KINDS = (tuple(PHENOTYPES), DISEASES, DICE, DISTANCES, (*IMAGES, *IN_BOX))
"""Targets that make a panel together."""


def statistics(
    measure: str, config: RunConfig, values: Values, r: int, truth: Truth, means: Mapping[str, float]
) -> dict[str, Statistic]:
    """Statistic of each target that a system says something of, at the R of this number; empty: none.

    Args:
        means: of the labelled training subjects, against which R2 compares.
    """
    found: dict[str, Statistic] = {}
    for target in targets_of(measure, config):
        if target not in values or not np.isfinite(values[target][r]).any():
            continue
        label, said = target.removeprefix(MASKS).removeprefix(AREAS), values[target][r]
        if measure in ("dice", "ssim"):
            found[target] = partial(weighted_mean, said)
            continue
        true = truth.values[label]
        if label != target:  # of a mask: subjects whose masks were scored (`evaluate.dense`)
            dice = [values[one][r] for one in MEAN_DICE if one in values]
            true = np.where(np.isfinite(dice).any(0), true, np.nan) if dice else true
        if np.isfinite(true).sum() >= MIN_KNOWN:
            if measure == "auroc":
                found[target] = partial(weighted_auroc, true, said)
            else:
                found[target] = partial(weighted_r2, true, said, means[label])
    return found


def replicates(
    measure: str,
    config: RunConfig,
    values: Values,
    r: int,
    truth: Truth,
    means: Mapping[str, float],
    resamples: int,
) -> dict[str, Float[np.ndarray, " draw"]]:
    """Each target of a measure, whose value is their mean, on the held-out subjects (first) and on bootstrap draws of
    them; empty: the system has nothing of it.

    All systems, seeds and R share the draws: their differences are paired.
    """
    each = statistics(measure, config, values, r, truth, means)
    return dict(zip(each, resample([*each.values()], len(truth.subjects), resamples).T, strict=True)) if each else {}


def headline(
    config: RunConfig, values: Values, truth: Truth, means: Mapping[str, float], r: int
) -> dict[str, list[float]]:
    """Measures with their 95 % intervals, at the R of this number."""
    found = {}
    for measure in MEASURES:
        drawn = replicates(measure, config, values, r, truth, means, config.evaluate.bootstrap)
        if drawn:
            found[measure] = _told(estimate(np.mean([*drawn.values()], axis=0)[:, None]))
    return found


def scores_of(
    rows: pa.Table, config: RunConfig, means: Mapping[str, float], names: Collection[Name]
) -> dict[int, dict[str, dict[str, dict[str, list[float]]]]]:
    """All metrics of all targets: R -> title of the system -> metric -> target -> number and ends of its 95 % interval.

    Args:
        names: systems that are asked, with what is measured on their masks.
    """
    asked = {*names, *map(from_masks, names), *map(by_areas, names)}
    there = set(pc.unique(rows.column("target")).to_pylist())
    found: dict[int, dict[str, dict[str, dict[str, list[float]]]]] = {}
    for metrics, targets in _METRICS:
        some = tuple(target for target in targets if target in there and ("r2" not in metrics or target in means))
        if not some:
            continue
        seen = with_truth(panel(rows, targets=some))
        for metric in metrics:
            for (name, r, target), score in scored(seen, metric, config.evaluate.bootstrap, dict(means)).items():
                if name in asked and np.isfinite(score.estimate.value):
                    of_system = found.setdefault(int(r), {}).setdefault(name.title, {})
                    of_system.setdefault(metric, {})[target] = _told(score.estimate)
    return found


_METRICS: Sequence[tuple[tuple[str, ...], tuple[str, ...]]] = (
    (("r2", "mae"), tuple(PHENOTYPES)),
    (("auroc", "average_precision"), DISEASES),
    (("score",), (*DICE, *DISTANCES)),
    (("score",), (*IMAGES, *IN_BOX)),
)
"""Metrics, and targets that they suit."""


def _told(one: Estimate) -> list[Any]:
    """Number and ends of its interval in five digits, None where undefined."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in (one.value, one.low, one.high)]
