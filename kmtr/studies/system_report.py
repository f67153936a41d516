"""Report of the study of systems, made of the rows that are there: scores, differences to k-MTR, bounds, cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kmtr.evaluate.predictions import held_out_words
from kmtr.report import figures
from kmtr.report.html import Cell, Table
from kmtr.report.intervals import Column, Interval, IntervalTable, Value
from kmtr.studies import pictures, system_figures
from kmtr.studies.aims import aims_table, bound_table
from kmtr.studies.contenders import contender, names_of, title_of
from kmtr.studies.metric_tables import metric_tables
from kmtr.studies.paired import Drawn, Pair, gains
from kmtr.studies.running import publish
from kmtr.studies.task_measures import (
    ALL,
    FLOOR_SAID,
    LEVEL,
    MEAN,
    MEASURES,
    interval_of,
    measures,
    replicates,
    rows_of,
    targets_of,
)
from kmtr.studies.task_rows import FLOORS, PRETRAINED, Asked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kmtr.studies.task_study import Study

Rows = Mapping[Asked, Mapping[str, Any]]
Scores = Mapping[tuple[str, str], Mapping[Any, Interval]]
"""(measure, name of the contender) -> R, or `ALL` -> score."""


def report(study: Study, name: str, folder: Path, asked: Sequence[Asked], seconds: float) -> dict[str, Any]:
    """Publish tables, figure and numbers of the rows that are there; what the last line on stdout says."""
    rows = {one: row for one, row in study.rows.read().items() if one.labels == 0 and one in _wanted(study, asked)}
    missing = [one.title for one in asked if one not in rows]
    drawn = Drawn(study, study.config.evaluate.bootstrap)
    scores, compared = scores_of(study, rows, drawn), differences(study, rows)
    tables: list[Table | IntervalTable] = [
        *(score_table(study, rows, scores, measure) for measure in measures(study.config)),
        *(target_table(study, rows, drawn, measure) for measure in _of_several(study)),
        difference_table(compared),
        aims_table(study, rows, drawn, compared),
        bound_table(study, rows, drawn),
        cost_table(rows),
    ]
    numbers = {f"{m}/{name}": {str(r): v._asdict() for r, v in by_r.items()} for (m, name), by_r in scores.items()}
    said = {
        "digest": study.rows.digest,
        "rows": len(asked) - len(missing),
        "missing": missing,
        "scores": numbers,
        "differences": compared,
    }
    caption = (
        "Each task's measure against R, seeds averaged; bars: 95 % intervals over held-out subjects. Circled in red: "
        "the interval reaches what an answer has that does not look at the subject (R2 of 0, AUROC of .5; of Dice that "
        "of the mean mask, paired, of the first seed)."
    )
    about = summary_of(study, rows, len(asked), missing)
    figure, curves = figure_of(study, scores, worthless_masks(study, rows)), curves_of(scores)
    seen, who = pictures.seen_by(study, study.config, None), [*pictures.chosen(study.truth).values()]
    more = system_figures.pictures_of(study, rows, seen, who)
    turned = system_figures.write_interactive(study, rows, folder)
    files = [turned] if turned else []
    details = metric_tables(study, rows)
    last = publish(
        *(study.config, folder, name, study.run_id, tables, figure, caption, about, said, curves, more, files),
        details=details,
    )
    print(f"study: {said['rows']} of {len(asked)} rows are reported; {len(missing)} are missing; {seconds:.0f} s")
    return last | {"rows": said["rows"], "missing": len(missing), "kept": str(study.rows.folder)}


def _wanted(study: Study, asked: Sequence[Asked]) -> set[Asked]:
    """The rows that are asked for, and the floors of their seeds."""
    return {*asked, *(Asked(seed, FLOORS, study.config.task.tasks, 0) for seed in study.config.study.seeds)}


def summary_of(study: Study, rows: Rows, wanted: int, missing: Sequence[str]) -> str:
    """Subjects, settings, how budgets are shared, and what is missing, in words."""
    config = study.config
    there = sum(one.start != FLOORS for one in rows)
    few = len(config.study.seeds) < 3
    banner = "**Fewer than three seeds: this shows that each row runs, not who wins.** " if few else ""
    absent = f" {len(missing)} of {wanted} rows are missing: {'; '.join(missing)}." if missing else ""
    return (
        f"{banner}Systems: {there} rows. Data: {study.dataset.source}. Scored on "
        f"{held_out_words(config, len(study.truth.subjects))}, the same for all rows and with the same patterns, at "
        f"R = {', '.join(map(str, config.evaluate.accelerations))} (nominal, family {config.sampling.family}). Seeds "
        f"{', '.join(map(str, config.study.seeds))}. All have the same labels, augmentation, validation subjects and "
        f"start at the training split's mean mask. k-MTR trains {config.task.steps} steps of all tasks at once; each "
        f"opponent as many seconds (on CPUs of the processor), by the speed of both on this machine, for its own tasks "
        f"alone. Patches in place of lines change nothing else: the low-resolution image and the decoder's temporally "
        f"shared one stay. A bound sees what was not acquired; it trains at one rate, with an average of its weights, "
        f"until validation has not improved {config.study.bound_patience} times, at most {config.study.bound_steps} "
        f"steps. Reconstruct, then analyse: the network of that title as trained on full images, on reconstructions, "
        f"with nothing more trained. Pretraining is not counted in those seconds and "
        f"told apart. R2 by areas of masks: phenotypes by a linear map fitted on a system's own masks of labelled "
        f"training subjects. {FLOOR_SAID}{absent}"
    )


# -------------------------------------------------------------------------------------------------------------- scores


def scores_of(study: Study, rows: Rows, drawn: Drawn) -> Scores:
    """Scores with 95 % bootstrap intervals over held-out subjects, seeds averaged within each draw."""
    found: dict[tuple[str, str], dict[Any, Interval]] = {}
    for measure in measures(study.config):
        for name in names_of(rows):
            each = [drawn(asked, measure) for asked in rows_of(rows, name, measure).values()]
            there = [one for one in each if one is not None]
            if not there:
                continue
            mean = np.mean(there, axis=0)
            of = zip((*study.config.evaluate.accelerations, ALL), (*mean, mean.mean(0)), strict=True)
            found[measure, name] = {r: interval_of(values) for r, values in of}
    return found


def score_table(study: Study, rows: Rows, scores: Scores, measure: str) -> IntervalTable:
    """A row per system: its score at each R."""
    rs = (*study.config.evaluate.accelerations, ALL)
    cells: list[tuple[Value, ...]] = []
    for name in names_of(rows):
        if (measure, name) in scores:
            by_r = scores[measure, name]
            cells.append((title_of(name), str(len(rows_of(rows, name, measure))), *(by_r[r] for r in rs)))
    columns = (Column("system"), Column("seeds"), *(Column(f"R = {r}" if r != ALL else "mean over R") for r in rs))
    caption = f"{MEASURES[measure].title[0].upper()}{MEASURES[measure].title[1:]}, 95 % bootstrap intervals"
    return IntervalTable(f"scores-{measure}", caption, columns, tuple(cells), note=_true_r(study, rows))


def _of_several(study: Study) -> list[str]:
    """Measures of more than one target."""
    return [measure for measure in measures(study.config) if len(targets_of(measure, study.config)) > 1]


def target_table(study: Study, rows: Rows, drawn: Drawn, measure: str) -> IntervalTable:
    """A row per system and R: each target by itself, seeds averaged within each draw."""
    targets = targets_of(measure, study.config)
    cells: list[tuple[Value, ...]] = []
    for name in names_of(rows):
        each = [drawn.targets(asked, measure) for asked in rows_of(rows, name, measure).values()]
        there = [one for one in each if one]
        for i, r in enumerate(study.config.evaluate.accelerations if there else ()):
            known = [[one[target][i] for one in there if target in one] for target in targets]
            cells.append(
                (title_of(name), str(r), *(interval_of(np.mean(some, axis=0)) if some else None for some in known))
            )
    nothing = MEASURES[measure].nothing
    caption = f"{MEASURES[measure].title[0].upper()}{MEASURES[measure].title[1:]}, each target by itself"
    note = f"An answer that does not look at the subject has {nothing:g}." if np.isfinite(nothing) else ""
    columns = (Column("system"), Column("R"), *map(Column, targets))
    return IntervalTable(f"targets-{measure}", caption, columns, tuple(cells), note=note)


def _true_r(study: Study, rows: Rows) -> str:
    """True R of each nominal one, as measured."""
    row = next(iter(rows.values()), None)
    if row is None:
        return ""
    said = (f"{r}: {row['R'][str(r)]['true_R']:.2f}" for r in study.config.evaluate.accelerations)
    return f"True R (all lines over acquired ones) of nominal R: {', '.join(said)}."


def cost_table(rows: Rows) -> Table:
    """Weights, steps and seconds, mean over seeds; devices."""
    cells: list[tuple[Cell, ...]] = []
    for name in names_of(rows):
        some = [row for one, row in rows.items() if one.start == name]
        if name == FLOORS:
            continue
        means = [_mean([row.get(key) for row in some]) for key in ("steps", "training_s", "pretraining_s", "best_step")]
        converged = "" if "converged" not in some[0] else "yes" if all(row["converged"] for row in some) else "no"
        where, clocks = (", ".join(sorted({row[key] for row in some if key in row})) for key in ("device", "clock"))
        cells.append((title_of(name), len(some), some[0]["parameters"], *means, clocks, converged, where))
    names = (
        "system",
        "seeds",
        "weights",
        "steps",
        "training (s)",
        "pretraining (s)",
        "best step",
        "clock",
        "converged",
    )
    return Table(
        "Cost of a row: seconds of its steps, by the clock that is named, mean over seeds",
        (*names, "device"),
        tuple(cells),
        digits=0,
    )


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


# --------------------------------------------------------------------------------------------------------- differences


def differences(study: Study, rows: Rows) -> list[dict[str, Any]]:
    """`paired.gains` of k-MTR over each other one, of the seeds that both have."""
    pairs = []
    for measure in measures(study.config):
        ours = rows_of(rows, PRETRAINED, measure)
        for name in names_of(rows):
            if name != PRETRAINED:
                both = {
                    seed: (ours[seed], other) for seed, other in rows_of(rows, name, measure).items() if seed in ours
                }
                pairs.append(Pair({"a": PRETRAINED, "b": name}, measure, both))
    return gains(study, pairs)


def difference_table(compared: Sequence[Mapping[str, Any]]) -> IntervalTable:
    """A row per opponent, measure and R, and who wins beyond the interval."""
    rows: list[tuple[Value, ...]] = []
    for one in compared:
        low, high = one["interval"]
        wins = "k-MTR" if low > 0 else title_of(one["b"]) if high < 0 else "tie" if low <= 0 <= high else None
        wins = "tie" if wins and (one.get("p_holm") or 0.0) >= LEVEL else wins
        head = (MEASURES[one["measure"]].title, title_of(one["b"]), str(one["R"]))
        rows.append((*head, Interval(one["difference"], low, high), one.get("p_holm"), wins))
    columns = (
        Column("measure"),
        Column("k-MTR less"),
        Column("R"),
        Column("difference", 3, True),
        Column("p, Holm", 4),
        Column("wins"),
    )
    draws = max((one["draws"] for one in compared), default=0)
    return IntervalTable(
        "differences",
        f"Paired differences on the same held-out subjects, 95 % bootstrap intervals ({draws:,} draws of subjects)",
        columns,
        tuple(rows),
        note="Seeds are averaged, then subjects drawn. Who wins does so beyond the interval, on the mean over R after "
        "Holm's correction too. p by the bootstrap, corrected over all means over R; single R have their intervals "
        "alone.",
        strong=frozenset((i, len(columns) - 1) for i, row in enumerate(rows) if row[-1] not in ("tie", None)),
    )


# ------------------------------------------------------------------------------------------------------------- numbers


def worthless_masks(study: Study, rows: Rows) -> dict[str, list[int]]:
    """Contender -> R at which the paired 95 % interval of its Dice over the mean mask's reaches 0, of the first seed;
    empty where no floors keep that.
    """
    seed, found = study.config.study.seeds[0], dict[str, list[int]]()
    floors = Asked(seed, FLOORS, study.config.task.tasks, 0)
    mean = study.rows.values(floors) if floors in rows and "dice" in measures(study.config) else {}
    for name in names_of(rows) if any(target.startswith(MEAN) for target in mean) else ():
        one = rows_of(rows, name, "dice").get(seed)
        said = study.rows.values(one) if one else {}
        over = {t: said[t] - mean[MEAN + t] for t in targets_of("dice", study.config) if t in said and MEAN + t in mean}
        for number, r in enumerate(study.config.evaluate.accelerations) if over else ():
            drawn = replicates("dice", study.config, over, number, study.truth, {}, study.config.evaluate.bootstrap)
            if drawn and interval_of(np.mean([*drawn.values()], axis=0)).low <= 0:
                found.setdefault(name, []).append(r)
    return found


def figure_of(study: Study, scores: Scores, worthless: Mapping[str, Sequence[int]]) -> Figure:
    """Measures against R: a panel per measure, a line per system.

    Args:
        worthless: contender -> R at which its masks have failed.
    """
    rs = study.config.evaluate.accelerations
    panels: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    failed: dict[str, dict[str, list[int]]] = {}
    for (measure, name), by_r in scores.items():
        points = [(r, by_r[r].value, (by_r[r].high - by_r[r].low) / 2) for r in rs]
        panels.setdefault(MEASURES[measure].title, {})[title_of(name)] = points
        nothing = MEASURES[measure].nothing
        wrong = [*worthless.get(name, ())] if measure == "dice" else [r for r in rs if by_r[r].low <= nothing]
        failed.setdefault(MEASURES[measure].title, {})[title_of(name)] = wrong
    styles = {}
    for _, name in scores:
        colour, line = contender(name).style
        styles[title_of(name)] = (figures.COLOURS[colour], line)
    return figures.label_curves(panels, styles, "", xlabel="nominal R", failed=failed)


def curves_of(scores: Scores) -> dict[int, dict[str, float]]:
    """Metrics of the MLflow run: R -> name -> score."""
    curves: dict[int, dict[str, float]] = {}
    for (measure, name), by_r in scores.items():
        for r, one in by_r.items():
            if r != ALL:
                curves.setdefault(int(r), {})[f"{measure}/{name}"] = one.value
    return curves
