"""Tables of all metrics that the rows of a study hold: of every system, target and R, floors and ceilings too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kmtr.evaluate.probes import readers_of
from kmtr.evaluate.scores import MIN_KNOWN
from kmtr.metrics import resample, weighted_auroc, weighted_pearson
from kmtr.metrics.dense import DICE, DISTANCES, IMAGES, IN_BOX
from kmtr.report.intervals import Column, Interval, IntervalTable, Value
from kmtr.simulation.labels import RISK, risk
from kmtr.simulation.phantom import SOURCE
from kmtr.studies.contenders import title_of
from kmtr.studies.task_measures import AREAS, interval_of
from kmtr.studies.task_rows import FLOORS, Asked
from kmtr.types import PHENOTYPES

if TYPE_CHECKING:
    from kmtr.studies.task_study import Study

Rows = Mapping[Asked, Mapping[str, Any]]
AUROC, OF_RISK = "diseases-auroc", "the risk that diseases were drawn by"
BY = (", areas of masks", ", masks")
"""Parts of a system's name that say by what it answers, where not by a head."""


class _Kind(NamedTuple):
    """A table: its file, caption, metric, targets, and digits after the point."""

    name: str
    caption: str
    metric: str
    targets: Sequence[str]
    digits: int = 3
    note: str = ""


def metric_tables(study: Study, rows: Rows) -> list[IntervalTable]:
    """A table for each metric that any row has, a line per system and R.

    Args:
        rows: with all labels.
    """
    config = study.config
    tables = [*told(rows, config.task.targets, config.task.diseases), correlations(study, rows)]
    drawn = risks(study)
    if any(drawn.values()):
        line = (OF_RISK, "any", *(drawn.get(disease) for disease in config.task.diseases))
        tables = [replace(one, rows=(*one.rows, line)) if one.name == AUROC else one for one in tables]
    return [table for table in tables if table.rows]


def risks(study: Study) -> dict[str, Interval]:
    """AUROC of the simulation's own risk of each disease (`simulation.labels.risk`), which a system can beat by chance
    alone; nothing where held-out subjects come from elsewhere.
    """
    meta = readers_of(study.dataset, study.config, "study")["test"].samples(study.rows.places).meta
    if {*meta.column("source").to_pylist()} != {SOURCE}:
        return {}
    found = {}
    for disease in (one for one in study.config.task.diseases if one in study.truth.values and one in RISK):
        needed = ("male", *RISK[disease][1])
        known = zip(*(meta.column(label).to_pylist() for label in needed), strict=True)
        said = np.array([risk(disease, dict(zip(needed, one, strict=True))) for one in known])
        area = partial(weighted_auroc, study.truth.values[disease], said)
        found[disease] = interval_of(resample([area], len(said), study.config.evaluate.bootstrap)[:, 0])
    return found


def told(rows: Rows, targets: Sequence[str], diseases: Sequence[str]) -> list[IntervalTable]:
    """Tables of the metrics that rows hold."""
    hd95, missed, spurious = np.split(np.array(DISTANCES), 3)
    kinds = (
        _Kind("phenotypes-mae", "Mean absolute error of phenotypes, each in its unit", "mae", targets, 2),
        _Kind("phenotypes-r2", "R2 of phenotypes", "r2", targets),
        _Kind(AUROC, "AUROC of diseases", "auroc", diseases),
        _Kind(
            *("diseases-precision", "Average precision of diseases", "average_precision", diseases),
            note="That of the mean is the prevalence.",
        ),
        _Kind("masks-dice", "Dice of masks at end-diastole and end-systole", "score", DICE),
        _Kind("masks-hd95", "95 % Hausdorff distance of masks", "score", hd95.tolist(), 1),
        _Kind("masks-missed", "Slices of a subject in which a structure was missed", "score", missed.tolist(), 2),
        _Kind("masks-spurious", "Slices in which one was found that is not there", "score", spurious.tolist(), 2),
        _Kind("images", "Reconstructed images, and the heart's box of them", "score", (*IMAGES, *IN_BOX)),
    )
    return [table for kind in kinds if (table := _table(rows, kind)).rows]


def _table(rows: Rows, kind: _Kind) -> IntervalTable:
    found: dict[tuple[str, str], list[Mapping[str, Sequence[float]]]] = {}
    for asked in sorted(rows, key=lambda one: (one.start == FLOORS, one.seed)):
        for r, scored in rows[asked]["R"].items():
            for system, metrics in scored["metrics"].items():
                said = metrics.get(kind.metric, {})
                if any(target in said for target in kind.targets):
                    found.setdefault((_titled(asked.start, system), r), []).append(said)
    lines: list[tuple[Value, ...]] = []
    for (system, r), seeds in found.items():
        lines.append((system, r, *(_mean([one[target] for one in seeds if target in one]) for target in kind.targets)))
    names = [f"{target} ({PHENOTYPES[target]})" if kind.metric == "mae" else target for target in kind.targets]
    columns = (Column("system"), Column("R"), *(Column(name, kind.digits) for name in names))
    note = f"Values and 95 % bootstrap intervals over held-out subjects, mean over seeds. {kind.note}".strip()
    return IntervalTable(kind.name, kind.caption, columns, tuple(lines), note)


def correlations(study: Study, rows: Rows) -> IntervalTable:
    """Pearson's r of each system's phenotypes, by its head and by areas of its masks: of values that rows keep."""
    targets, truth, draws = study.config.task.targets, study.truth.values, study.config.evaluate.bootstrap
    found: dict[tuple[str, str], dict[str, list[np.ndarray]]] = {}
    for asked in sorted(rows, key=lambda one: (one.start == FLOORS, one.seed)):
        values = study.rows.values(asked)
        for by, prefix in (("", ""), (BY[0], AREAS)):
            for target in (one for one in targets if prefix + one in values):
                for r, said in zip(study.config.evaluate.accelerations, values[prefix + target], strict=True):
                    known = np.where(np.isfinite(said), truth[target], np.nan)
                    if np.isfinite(known).sum() >= MIN_KNOWN:
                        each = resample([partial(weighted_pearson, known, said)], len(known), draws)[:, 0]
                        cells = found.setdefault((title_of(asked.start) + by, str(r)), {})
                        cells.setdefault(target, []).append(each)
    lines: list[tuple[Value, ...]] = [
        (*head, *(interval_of(np.mean(cells[one], axis=0)) if one in cells else None for one in targets))
        for head, cells in found.items()
    ]
    columns = (Column("system"), Column("R"), *map(Column, targets))
    note = "Values and 95 % bootstrap intervals over held-out subjects, seeds averaged within each draw."
    return IntervalTable("phenotypes-r", "Pearson's r of phenotypes", columns, tuple(lines), note)


def _titled(start: str, system: str) -> str:
    """Title of a system of a row: the contender's, and by what it answers; floors have names of their own."""
    if start == FLOORS:
        return system
    return title_of(start) + next((part for part in BY if part in system), "")


def _mean(seeds: Sequence[Sequence[float | None]]) -> Interval | None:
    """Mean over seeds of values and of the ends of their intervals; None: no seed has it."""
    if not seeds:
        return None
    values = np.array(seeds, float)
    return Interval(*values.mean(0).tolist())
