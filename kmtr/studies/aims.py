"""Aims of the comparison, each with k-MTR's number, its interval, and whether it is met; and shares of the bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from kmtr.report.intervals import Column, Interval, IntervalTable, Value
from kmtr.studies.contenders import contender, names_of, title_of
from kmtr.studies.task_measures import ALL, LEVEL, MEASURES, interval_of, measures, rows_of
from kmtr.studies.task_rows import PRETRAINED, Asked

if TYPE_CHECKING:
    from kmtr.studies.paired import Drawn
    from kmtr.studies.task_study import Study

Rows = Mapping[Asked, Mapping[str, Any]]

BOUND_R, OF_BOUND = 8, 0.95
"""R, and the share of the converged bound that k-MTR should reach there."""
FAR_R, OF_ITSELF = 16, 0.90
"""R, and the share of its own score at `BOUND_R` that it should keep there."""
SHARED_MEASURES = ("r2", "dice")
"""Measures of which shares are aims."""
BEATEN = {"dice": ("unet-zerofilled", "unet-shared")}
"""Measure -> opponents that k-MTR should beat."""
TIED = dict.fromkeys(("r2", "auroc", "dice", "ssim"), ("tokens-zerofilled",))
"""Measure -> opponents that should not beat it."""
LVEF_R2 = 0.5
"""R2 of LVEF from masks that should be exceeded."""


class Aim(NamedTuple):
    """An aim: in words, its measure, R, k-MTR's number, and what it should exceed.

    Attributes:
        tie: it is enough that the interval reaches what is wanted.
        p: of the difference, corrected (Holm); 0: nothing is corrected.
        why: there is no number.
    """

    said: str
    measure: str
    r: str
    number: Interval | None
    wanted: float
    tie: bool = False
    p: float = 0.0
    why: str = ""


def aims_table(study: Study, rows: Rows, drawn: Drawn, compared: Sequence[Mapping[str, Any]]) -> IntervalTable:
    """A row per aim of the study's measures, and whether it is met: beyond the interval, within it, or not.

    Args:
        compared: `paired.gains` of k-MTR over each other contender.
    """
    aims = [
        aim
        for measure in measures(study.config)
        for aim in (
            *_of_bounds(study, rows, drawn, measure),
            *_of_itself(study, rows, drawn, measure),
            *_of_opponents(measure, compared),
            *_of_lvef(study, rows, drawn, measure),
        )
    ]
    cells: list[tuple[Value, ...]] = [
        (aim.said, MEASURES[aim.measure].title, aim.r, aim.number, f"{aim.wanted:g}", verdict(aim)) for aim in aims
    ]
    names = (Column("aim"), Column("measure"), Column("R"), Column("k-MTR"), Column("wanted"), Column("met"))
    note = (
        "Met: the whole 95 % interval over held-out subjects is beyond what is wanted; within the interval: the number "
        "is, the interval is not; tie: so is a difference that Holm's correction leaves undecided."
    )
    strong = frozenset((i, 5) for i, row in enumerate(cells) if row[5] in ("met", "missed"))
    return IntervalTable("aims", "Aims of the comparison", names, tuple(cells), note, strong)


def verdict(aim: Aim) -> str:
    """Words that say if an aim is met."""
    if aim.number is None:
        return aim.why
    value, low, high = aim.number
    if np.isnan(value):
        return "not defined"
    if aim.p >= LEVEL or (aim.tie and low <= aim.wanted <= high):
        return "tie"
    if low > aim.wanted:
        return "met"
    if high < aim.wanted:
        return "missed"
    return f"{'met' if value > aim.wanted else 'missed'}, within the interval"


def shares(
    study: Study, rows: Rows, drawn: Drawn, measure: str
) -> Iterator[tuple[str, bool, Float[np.ndarray, "acceleration draw"], Float[np.ndarray, "acceleration draw"]]]:
    """Bounds that have rows of seeds that k-MTR has too: name, whether all of them converged, k-MTR's measure and the
    bound's at each R, on the same draws, seeds averaged.
    """
    ours = rows_of(rows, PRETRAINED, measure)
    for name in names_of(rows):
        theirs = rows_of(rows, name, measure) if contender(name).bound else {}
        seeds = [seed for seed in theirs if seed in ours]
        both = [[one for seed in seeds if (one := drawn(of[seed], measure)) is not None] for of in (ours, theirs)]
        if seeds and min(map(len, both)) == len(seeds):
            converged = all(rows[theirs[seed]].get("converged") for seed in seeds)
            yield name, converged, np.mean(both[0], axis=0), np.mean(both[1], axis=0)


def bound_table(study: Study, rows: Rows, drawn: Drawn) -> IntervalTable:
    """Share of each bound that k-MTR reaches at each R, over the seeds that both have; of one that did not converge no
    share is taken, nor of a bound that is not above 0.
    """
    rs = study.config.evaluate.accelerations
    cells: list[tuple[Value, ...]] = []
    for measure in measures(study.config):
        for name, converged, mean, bound in shares(study, rows, drawn, measure):
            head = (MEASURES[measure].title, title_of(name))
            if converged:
                cells.append((*head, *(_share(m, b, 100) for m, b in zip(mean, bound, strict=True))))
            else:
                cells.append((*head, *("not converged" for _ in rs)))
    columns = (Column("measure"), Column("bound"), *(Column(f"R = {r}", 1) for r in rs))
    caption = "k-MTR as a share of the bound that sees the full image, %"
    return IntervalTable("bounds", caption, columns, tuple(cells), "95 % intervals of the paired ratio.")


def _share(part: Float[np.ndarray, " draw"], whole: Float[np.ndarray, " draw"], scale: float = 1.0) -> Interval | None:
    return interval_of(scale * part / whole) if whole[0] > 0 else None


def _of_bounds(study: Study, rows: Rows, drawn: Drawn, measure: str) -> Iterator[Aim]:
    rs = study.config.evaluate.accelerations
    if measure not in SHARED_MEASURES or BOUND_R not in rs or not rows_of(rows, PRETRAINED, measure):
        return
    at, said = rs.index(BOUND_R), f"{OF_BOUND:.0%} of the strongest bound"
    found = [(b[at, 0], name, told, m[at], b[at]) for name, told, m, b in shares(study, rows, drawn, measure)]
    if not found:
        yield Aim(said, measure, str(BOUND_R), None, OF_BOUND, why="open: no row of a bound")
        return
    # Not the strongest of those that converged: a share of a weaker one may be above 100 %.
    _, name, converged, mean, bound = max(found, key=lambda one: one[0])
    share, why = (_share(mean, bound), "bound below 0") if converged else (None, "open: it has not converged")
    yield Aim(f"{said}: {title_of(name)}", measure, str(BOUND_R), share, OF_BOUND, why=why)


def _of_itself(study: Study, rows: Rows, drawn: Drawn, measure: str) -> Iterator[Aim]:
    rs = study.config.evaluate.accelerations
    ours = [drawn(one, measure) for one in rows_of(rows, PRETRAINED, measure).values()]
    there = [one for one in ours if one is not None]
    if measure in SHARED_MEASURES and there and {BOUND_R, FAR_R} <= set(rs):
        mean = np.mean(there, axis=0)
        number = _share(mean[rs.index(FAR_R)], mean[rs.index(BOUND_R)])
        said = f"{OF_ITSELF:.0%} of its own at R = {BOUND_R}"
        yield Aim(said, measure, str(FAR_R), number, OF_ITSELF, why=f"at R = {BOUND_R} it is below 0")


def _of_opponents(measure: str, compared: Sequence[Mapping[str, Any]]) -> Iterator[Aim]:
    known = {one["b"]: one for one in compared if (one["measure"], one["R"]) == (measure, ALL)}
    for tie, of in ((False, BEATEN), (True, TIED)):
        for name in of.get(measure, ()):
            said = f"{'at least tied' if tie else 'beaten'} at equal seconds: {title_of(name)}"
            one, r = known.get(name), "mean over R"
            if one is None:
                yield Aim(said, measure, r, None, 0.0, tie, why="open: no row")
            else:
                yield Aim(said, measure, r, Interval(one["difference"], *one["interval"]), 0.0, tie, one["p_holm"])


def _of_lvef(study: Study, rows: Rows, drawn: Drawn, measure: str) -> Iterator[Aim]:
    ours = [drawn(one, measure) for one in rows_of(rows, PRETRAINED, measure).values()]
    there = [one for one in ours if one is not None]
    if measure == "areas_lvef_r2" and there:
        for r, values in zip(study.config.evaluate.accelerations, np.mean(there, axis=0), strict=True):
            yield Aim(f"LVEF from masks: R2 above {LVEF_R2:g}", measure, str(r), interval_of(values), LVEF_R2)
