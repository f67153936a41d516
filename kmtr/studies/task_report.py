"""Report of the study of tasks, made of the rows that are there: scores, paired differences, floors, cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmtr.evaluate.predictions import held_out_words
from kmtr.report import figures
from kmtr.report.html import Cell, Table
from kmtr.report.intervals import Column, Interval, IntervalTable, Value
from kmtr.studies.paired import Pair, gains
from kmtr.studies.running import publish
from kmtr.studies.task_measures import ALL, FLOOR_SAID, MEASURES, measures
from kmtr.studies.task_rows import FLOORS, PRETRAINED, SCRATCH, Asked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kmtr.studies.task_study import Study

KINDS = {
    "pretrained": "all tasks, pretrained",
    "scratch": "all tasks, from scratch",
    "alone": "each task alone, pretrained",
    "floor": "floor",
}
"""Kinds of rows in the order of the tables."""
STYLES = {
    "pretrained": (figures.COLOURS[0], "-"),
    "scratch": (figures.COLOURS[3], "-"),
    "alone": (figures.COLOURS[2], "--"),
    "floor": (figures.COLOURS[5], ":"),
}
PAIRS = (("pretrained", "scratch"), ("pretrained", "alone"), ("pretrained", "floor"))
"""Kinds that are compared: the first less the second."""
Rows = Mapping[Asked, Mapping[str, Any]]
Scores = Mapping[tuple[str, str, int], Mapping[str, Mapping[int, float]]]
"""(measure, kind, labels) -> R, or `ALL` -> seed -> score."""


def key_of(study: Study, kind: str, measure: str, seed: int, labels: int) -> Asked:
    """The row that a kind's score of a measure is of."""
    tasks = study.config.task.tasks
    if kind == "alone":
        return Asked(seed, PRETRAINED, (MEASURES[measure].task,), labels)
    return Asked(seed, {"scratch": SCRATCH, "floor": FLOORS}.get(kind, PRETRAINED), tasks, labels)


def report(study: Study, name: str, folder: Path, asked: Sequence[Asked], seconds: float) -> dict[str, Any]:
    """Publish tables, figure and numbers of the rows that are there; what the last line on stdout says."""
    rows = {one: row for one, row in study.rows.read().items() if one.start == FLOORS or one in asked}
    missing = [one.title for one in asked if one not in rows]
    scores = scores_of(study, rows)
    compared = differences(study, rows)
    tables: list[Table | IntervalTable] = [
        score_table(study, scores),
        difference_table(compared),
        floor_table(study, rows),
        cost_table(study, rows),
    ]
    said = {
        "digest": study.rows.digest,
        "rows": len(asked) - len(missing),
        "missing": missing,
        "scores": nested(scores),
        "differences": compared,
    }
    caption = f"Each task's measure against the number of labels, mean over R; bars: SD over seeds. {FLOOR_SAID}"
    about = summary_of(study, rows, len(asked), missing)
    figure, curves = figure_of(study, rows, scores), curves_of(study, rows, scores)
    last = publish(study.config, folder, name, study.run_id, tables, figure, caption, about, said, curves)
    print(f"study: {said['rows']} of {len(asked)} rows are reported; {len(missing)} are missing; {seconds:.0f} s")
    return last | {"rows": said["rows"], "missing": len(missing), "kept": str(study.rows.folder)}


def summary_of(study: Study, rows: Rows, wanted: int, missing: Sequence[str]) -> str:
    """Subjects, settings and what is missing, in words."""
    config, there = study.config, sum(one.start != FLOORS for one in rows)
    made_of = sorted({row["data"] for row in rows.values()})
    several = (
        f" The rows come from data that were written {len(made_of)} times, from the same settings and with the same "
        f"labels ({', '.join(made_of)})."
        if len(made_of) > 1
        else ""
    )
    best = config.task.keep == "best"
    chosen = ", chosen by labels of validation subjects, which come beside the budget" if best else ""
    absent = f" {len(missing)} of {wanted} rows are missing: {'; '.join(missing)}." if missing else ""
    return (
        f"Tasks: {', '.join(config.task.tasks)}; {there} rows. Data: {study.dataset.source}. Scored on "
        f"{held_out_words(config, len(study.truth.subjects))}, the same for all rows, at R = "
        f"{', '.join(map(str, config.evaluate.accelerations))}. Seeds {', '.join(map(str, config.study.seeds))} change "
        f"pretraining, weights, order and the labelled subjects. Pretraining: {config.masked_steps} steps of masked "
        f"pretraining, {config.align_steps} of alignment, on all training subjects. Training on labels: "
        f"{config.task.steps} steps, batch {config.data.global_batch}; the model kept is the {config.task.keep} one"
        f"{chosen}.{several}{absent}\n\nA task alone is given as many subjects as the model of all tasks; one whose "
        f"labels do not include a rare disease may have a few others of them. Floors need no trained network and are "
        f"fitted to the labelled subjects of the model of all tasks."
    )


# -------------------------------------------------------------------------------------------------------------- scores


def scores_of(study: Study, rows: Rows) -> Scores:
    """Scores of the rows that are there, kind by kind."""
    rs = [str(r) for r in study.config.evaluate.accelerations]
    found: dict[tuple[str, str, int], dict[str, dict[int, float]]] = {}
    for measure in measures(study.config):
        for kind in kinds(study):
            for labels in study.config.study.task_labels:
                for seed in study.config.study.seeds:
                    row = rows.get(key_of(study, kind, measure, seed, labels))
                    values = [_score(row, r, measure) for r in rs] if row else []
                    if values and all(map(math.isfinite, values)):
                        by_r = found.setdefault((measure, kind, labels), {})
                        for r, value in (*zip(rs, values, strict=True), (ALL, statistics.fmean(values))):
                            by_r.setdefault(r, {})[seed] = value
    return found


def _score(row: Mapping[str, Any], r: str, measure: str) -> float:
    """A measure of a row; of floors that of `Measure.floor`. NaN: it has none."""
    systems = row["R"][r]["measures"]
    names = [name.title for name in MEASURES[measure].floor] if row["start"] == FLOORS else list(systems)
    known = [systems[name][measure][0] for name in names if measure in systems.get(name, {})]
    return float("nan") if not known or known[0] is None else float(known[0])


def kinds(study: Study) -> list[str]:
    """Kinds of rows that the study has."""
    alone = len(study.config.task.tasks) > 1 and bool(study.config.study.single_labels)
    return [kind for kind in KINDS if kind != "alone" or alone]


def budgets(study: Study) -> list[int]:
    """Numbers of labelled subjects, ascending, all (0) last."""
    return sorted(study.config.study.task_labels, key=lambda labels: labels or math.inf)


def score_table(study: Study, scores: Scores) -> Table:
    """Mean and SD over seeds: a row per measure, R and kind."""
    columns = budgets(study)
    cells: list[tuple[Cell, ...]] = []
    for measure in measures(study.config):
        for r in (*map(str, study.config.evaluate.accelerations), ALL):
            for kind in kinds(study):
                some = [scores.get((measure, kind, labels), {}).get(r, {}) for labels in columns]
                if any(some):
                    cells.append((MEASURES[measure].title, r, KINDS[kind], *(_mean_sd(one) for one in some)))
    return Table(
        f"Measures of all tasks on {len(study.truth.subjects)} held-out subjects, mean over seeds ± SD (seeds)",
        ("measure", "R", "model", *(_labels(labels) for labels in columns)),
        tuple(cells),
        note="R2: against always answering the training mean. Mean Dice: over a subject's classes, end-diastole and "
        "end-systole. R mean: the mean over R of each seed.",
    )


def _mean_sd(of_seeds: Mapping[int, float]) -> str | None:
    values = list(of_seeds.values())
    if not values:
        return None
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread} ({len(values)})"


def _labels(labels: int) -> str:
    return f"{labels:,} labels" if labels else "all labels"


def floor_table(study: Study, rows: Rows) -> Table:
    """All floors, mean over seeds: a row per number of labels, floor and R."""
    shown = measures(study.config)
    cells: list[tuple[Cell, ...]] = []
    for labels in budgets(study):
        some = [row for one, row in rows.items() if one.start == FLOORS and one.labels == labels]
        for r in map(str, study.config.evaluate.accelerations):
            of_seeds = [row["R"][r]["measures"] for row in some]
            for system in dict.fromkeys(name for systems in of_seeds for name, found in systems.items() if found):
                values = [[s.get(system, {}).get(measure, [None])[0] for s in of_seeds] for measure in shown]
                known = [[value for value in each if value is not None] for each in values]
                cells.append((_labels(labels), int(r), system, *(statistics.fmean(k) if k else None for k in known)))
    columns = ("labels", "R", "floor", *(MEASURES[measure].title for measure in shown))
    return Table("Floors, mean over seeds", columns, tuple(cells))


def cost_table(study: Study, rows: Rows) -> Table:
    """Weights and seconds of trainings, mean over seeds; of pretraining apart."""
    cells: list[tuple[Cell, ...]] = []
    for tasks in dict.fromkeys(one.tasks for one in rows):
        for begun in (PRETRAINED, SCRATCH):
            for labels in budgets(study):
                some = [
                    row for one, row in rows.items() if (one.tasks, one.start, one.labels) == (tasks, begun, labels)
                ]
                if some:
                    means = [_mean_of(some, key) for key in ("training_s", "pretraining_s")]
                    where = ", ".join(sorted({row["device"] for row in some}))
                    head = ("+".join(tasks), begun, _labels(labels), len(some))
                    cells.append((*head, some[0]["parameters"], *means, where))
    columns = ("tasks", "start", "labels", "seeds", "weights", "training (s)", "pretraining (s)", "device")
    return Table("Cost of a row: seconds of its steps, mean over seeds", columns, tuple(cells), digits=0)


def _mean_of(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.fmean(values) if values else None


# --------------------------------------------------------------------------------------------------------- differences


def differences(study: Study, rows: Rows) -> list[dict[str, Any]]:
    """`paired.gains` of `PAIRS`, of the seeds that both have: of every measure and number of labels."""
    pairs = []
    for first, second in PAIRS:
        for measure in measures(study.config):
            for labels in budgets(study):
                both = {
                    seed: tuple(key_of(study, kind, measure, seed, labels) for kind in (first, second))
                    for seed in study.config.study.seeds
                }
                there = {s: (a, b) for s, (a, b) in both.items() if a != b and a in rows and b in rows}
                if there:
                    pairs.append(Pair({"a": first, "b": second, "labels": labels}, measure, there))
    return gains(study, pairs)


def difference_table(compared: Sequence[Mapping[str, Any]]) -> IntervalTable:
    """A row per pair, measure, number of labels and R."""
    rows: list[tuple[Value, ...]] = []
    for one in compared:
        pair = f"{KINDS[one['a']]} less {KINDS[one['b']]}"
        head = (pair, MEASURES[one["measure"]].title, _labels(one["labels"]), str(one["R"]))
        gain = Interval(one["difference"], *one["interval"])
        each = " ".join(f"{value:+.3f}" if math.isfinite(value) else "–" for value in one["of_seeds"])
        rows.append((*head, gain, each, one.get("p_holm")))
    columns = (
        Column("gain"),
        Column("measure"),
        Column("labels"),
        Column("R"),
        Column("difference", 3, True),
        Column("each seed", 3),
        Column("p, Holm", 4),
    )
    draws = max((one["draws"] for one in compared), default=0)
    return IntervalTable(
        "differences",
        f"Paired differences on the same held-out subjects, 95 % bootstrap intervals ({draws:,} draws of subjects)",
        columns,
        tuple(rows),
        note="Seeds are averaged, then subjects drawn. p by the bootstrap, corrected by Holm over all means over R; "
        "single R have their intervals alone.",
    )


# ------------------------------------------------------------------------------------------------------------- numbers


def figure_of(study: Study, rows: Rows, scores: Scores) -> Figure:
    """Measures against the number of labels, mean over R: a panel per measure."""
    panels: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for (measure, kind, labels), by_r in scores.items():
        values = list(by_r[ALL].values())
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        point = (subjects_of(study, rows, labels), statistics.fmean(values), spread)
        panels.setdefault(MEASURES[measure].title, {}).setdefault(KINDS[kind], []).append(point)
    return figures.label_curves(panels, {KINDS[kind]: style for kind, style in STYLES.items()}, "")


def subjects_of(study: Study, rows: Rows, labels: int) -> int:
    """Labelled subjects of a budget."""
    return labels or next(row["subjects"] for one, row in rows.items() if one.labels == 0)


def curves_of(study: Study, rows: Rows, scores: Scores) -> dict[int, dict[str, float]]:
    """Number of labelled subjects -> metrics of the study's MLflow run, mean over seeds."""
    curves: dict[int, dict[str, float]] = {}
    for (measure, kind, labels), by_r in scores.items():
        some = {f"{measure}_R{r}/{kind}": statistics.fmean(of_seeds.values()) for r, of_seeds in by_r.items()}
        curves.setdefault(subjects_of(study, rows, labels), {}).update(some)
    return curves


def nested(scores: Scores) -> dict[str, Any]:
    """Measure -> kind -> number of labels -> R -> mean, SD over seeds and each seed's, for JSON."""
    found: dict[str, Any] = {}
    for (measure, kind, labels), by_r in scores.items():
        said = {
            r: {
                "mean": statistics.fmean(of_seeds.values()),
                "sd": statistics.stdev(of_seeds.values()) if len(of_seeds) > 1 else None,
                "seeds": {str(seed): value for seed, value in of_seeds.items()},
            }
            for r, of_seeds in by_r.items()
        }
        found.setdefault(measure, {}).setdefault(kind, {})[str(labels)] = said
    return found
