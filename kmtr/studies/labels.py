"""R2 against the number of labels: baselines, pretraining's stages, fine-tuning and training from scratch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.evaluate.scores import Result, difference
from kmtr.evaluate.tables import short
from kmtr.report import figures
from kmtr.report.html import Cell, Table
from kmtr.studies import comparison
from kmtr.studies.comparison import Cohort, Source
from kmtr.studies.running import each, fit, named, open_run, publish, rate
from kmtr.train import driver
from kmtr.train.loop import MASKED_ENCODER
from kmtr.types import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scores = Mapping[tuple[str, int], Mapping[str, Mapping[str, float]]]
"""(method, labels) -> R -> ``mean`` over targets, its ``sd`` over seeds, and each target -> R2 (`scores.summary`)."""

TITLES = {
    "mean": "predict the mean",
    "central": "ridge on central 4 x 8 samples",
    "lowres": "ridge on low-res image",
    "lowres-augmented": "ridge on low-res image, augmented",
    "untrained": "untrained encoder, probe",
    "untrained-augmented": "untrained encoder, augmented probe",
    "scratch": "supervised from scratch",
    "masked": "masked pretraining, probe",
    "masked-augmented": "masked pretraining, augmented probe",
    "longer": "more masked pretraining, probe",
    "aligned": "alignment, probe",
    "aligned-augmented": "alignment, augmented probe",
    "masked-tuned": "masked pretraining, fine-tuned",
    "aligned-tuned": "alignment, fine-tuned",
}
"""Methods in the order of the table."""

STYLES = {
    "central": (figures.COLOURS[5], ":"),
    "lowres": (figures.COLOURS[5], "--"),
    "lowres-augmented": (figures.COLOURS[5], "-"),
    "untrained": (figures.COLOURS[3], ":"),
    "scratch": (figures.COLOURS[3], "-"),
    "masked": (figures.COLOURS[0], "--"),
    "masked-augmented": (figures.COLOURS[0], "-."),
    "longer": (figures.COLOURS[4], "--"),
    "aligned": (figures.COLOURS[1], "--"),
    "aligned-augmented": (figures.COLOURS[1], "-."),
    "masked-tuned": (figures.COLOURS[0], "-"),
    "aligned-tuned": (figures.COLOURS[1], "-"),
}
"""Colour of what is learnt from; dashes for probes, dashes and dots for augmented ones."""

INSTEAD = {"aligned": "masked", "aligned-augmented": "masked-augmented", "aligned-tuned": "masked-tuned"}
"""Method that stands for another one in a seed whose alignment the guard stopped."""

COMPARED = (
    ("masked", "untrained", ""),
    ("masked-tuned", "scratch", ""),
    ("masked-tuned", "lowres", ""),
    ("masked-tuned", "lowres-augmented", ""),
    ("aligned-tuned", "lowres-augmented", ""),
    ("aligned-tuned", "masked-tuned", ""),
    ("masked-augmented", "untrained-augmented", ""),
    ("aligned-augmented", "lowres-augmented", ""),
    ("aligned-tuned", "aligned-augmented", ""),
    ("aligned", "longer", ""),
    ("aligned", "masked", ""),
    ("aligned", "masked", "lvef_pct"),
)
"""Pairs of methods whose R2 is compared, in the mean over targets or in one of them."""


def run(config: RunConfig) -> dict[str, Any]:
    """Pretrain, fit and compare all methods, or go on where it stopped; what the last line on stdout says."""
    began = time.perf_counter()
    config, dataset = driver.resolve(override(config, {"stage": "both"}))
    if not config.masked_steps or not config.align_steps:
        raise InputError("study: expected masked.steps and align.steps of at least 1, since both are compared")
    run_name, _ = driver.run_folder(named(config, {}), dataset)
    name = f"labels-{config.recipe}-{comparison.digest(config, run_name)}"
    folder = Path(config.storage.root) / "study" / name
    cohort = comparison.cohort(config, dataset, folder, config.study.labels)
    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"study: {name}: seeds {_listed(config.study.seeds)}, labels {_listed(cohort.budgets)}, R "
        f"{_listed(cohort.accelerations)}, {len(cohort.rows)} held-out subjects",
        flush=True,
    )
    with open_run(config, dataset, name) as run_id:
        trained, longer_steps = pretrain(config, dataset, folder, run_id)
        encoders = encoders_of(trained)
        comparison.probe_all(cohort, sources(cohort, encoders, longer_steps))
        each(comparison.write_trained, trainings(cohort, encoders), "study: trainings", config.train.device)
        results = collect(cohort, encoders, longer_steps)
        stopped = {seed: one.metrics.get("align_stopped") for (seed, what), one in trained.items() if what == "aligned"}
        return report(cohort, name, run_id, results, stopped, longer_steps, time.perf_counter() - began)


# ------------------------------------------------------------------------------------------------------------ training


def pretrain(
    config: RunConfig, dataset: Dataset, folder: Path, run_id: str
) -> tuple[dict[tuple[int, str], driver.Outcome], int]:
    """Runs of every seed, ``aligned`` (both stages) and ``longer`` (masked pretraining alone), and the steps that this
    one has beyond the recipe's.
    """
    outcomes = {}
    for seed in config.study.seeds:
        outcomes[seed, "aligned"] = fit(
            named(config, {"seed": seed}), dataset, run_id, f"seed {seed}, masked pretraining and alignment"
        )
    more = config.study.longer_steps or _longer_steps(config, folder, outcomes)
    steps = config.masked.steps + more
    for seed in config.study.seeds[: config.study.longer_seeds]:
        changes = {"seed": seed, "stage": "masked", "masked.steps": steps}
        outcomes[seed, "longer"] = fit(
            named(config, changes), dataset, run_id, f"seed {seed}, {steps} steps of masked pretraining alone"
        )
    return outcomes, more


def _longer_steps(config: RunConfig, folder: Path, outcomes: Mapping[tuple[int, str], driver.Outcome]) -> int:
    """Steps of masked pretraining that take alignment's time, by the subjects/s that the runs logged: one number for
    all seeds (the median), rounded to 10, kept so that a later call has the same.
    """
    kept = folder / "longer.json"
    if kept.is_file():
        return int(json.loads(kept.read_text()))
    masked, both = config.masked_steps, config.total_steps
    ratios = sorted(
        rate(o, 0, masked) / rate(o, masked, both) for (_, what), o in outcomes.items() if what == "aligned"
    )
    ratio = ratios[len(ratios) // 2]
    steps = max(10, 10 * round(config.align_steps * (ratio if math.isfinite(ratio) else 1.0) / 10))
    kept.write_text(json.dumps(steps))
    return steps


def encoders_of(trained: Mapping[tuple[int, str], driver.Outcome]) -> dict[tuple[int, str], str]:
    """(seed, method) -> folder of its encoder. Where the guard stopped alignment, there is none of it."""
    found = {}
    for (seed, what), outcome in trained.items():
        if what == "longer":
            found[seed, "longer"] = outcome.encoder
            continue
        found[seed, "masked"] = str(Path(outcome.folder) / MASKED_ENCODER)
        if "align_stopped" not in outcome.metrics:
            found[seed, "aligned"] = outcome.encoder
    return found


def sources(
    cohort: Cohort, encoders: Mapping[tuple[int, str], str], longer_steps: int
) -> dict[tuple[int, str], Source]:
    """Features of every probe."""
    seeds = tuple(cohort.labelled)
    found = {(seed, name): Source(name, seeds=seeds) for seed in seeds for name in comparison.BASELINES}
    for (seed, method), encoder in encoders.items():
        name = _file_name(method, longer_steps)
        found[seed, name] = Source(f"{name}-{seed}", encoder, seeds=(seed,))
        if method == "masked":
            found[seed, "untrained"] = Source(f"untrained-{seed}", encoder, untrained=True, seeds=(seed,))
    wanted = {
        (seed, method.removesuffix("-augmented")): method
        for seed in seeds
        for method in TITLES
        if "-augmented" in method
    }
    return found | {
        (key[0], wanted[key]): replace(source, augmented=True) for key, source in found.items() if key in wanted
    }


def trainings(cohort: Cohort, encoders: Mapping[tuple[int, str], str]) -> list[tuple[Cohort, str, str, int, int, bool]]:
    """Arguments of `comparison.write_trained` for what is not there yet, the most labels first."""
    wanted = []
    for budget in reversed(cohort.budgets):
        for seed in cohort.labelled:
            wanted.append((cohort, encoders[seed, "masked"], "scratch", seed, budget, True))
            for method in ("masked", "aligned"):
                if (seed, method) in encoders:
                    encoder = encoders[seed, method]
                    wanted.append((cohort, encoder, f"{method}-tuned", seed, budget, False))
    return [job for job in wanted if not comparison.part(cohort, job[3], job[2], job[4]).is_file()]


def collect(
    cohort: Cohort, encoders: Mapping[tuple[int, str], str], longer_steps: int
) -> dict[tuple[str, int], list[Result]]:
    """(method, labels) -> results, one per seed; of ``longer`` those of the first seeds alone."""
    asked: dict[tuple[str, int], list[tuple[str, int, int]]] = {}
    for method in TITLES:
        for budget in cohort.budgets:
            for seed in cohort.labelled:
                if method == "longer" and (seed, "longer") not in encoders:
                    continue
                own = method if (seed, "aligned") in encoders else INSTEAD.get(method, method)
                asked.setdefault((method, budget), []).append((_file_name(own, longer_steps), seed, budget))
    results = comparison.gather(cohort, [one for some in asked.values() for one in some])
    return {key: [results[one] for one in some] for key, some in asked.items()}


def _file_name(method: str, longer_steps: int) -> str:
    return f"longer{longer_steps}" if method == "longer" else method


# ----------------------------------------------------------------------------------------------------------- reporting


def report(
    cohort: Cohort,
    name: str,
    run_id: str,
    results: Mapping[tuple[str, int], list[Result]],
    stopped: Mapping[int, float | None],
    longer_steps: int,
    seconds: float,
) -> dict[str, Any]:
    scores = {key: comparison.scores(found, cohort) for key, found in results.items()}
    compared = differences(cohort, results)
    guard = "; ".join(
        f"seed {seed}: the guard stopped alignment at step {step:.0f}, and masked pretraining stands for it"
        for seed, step in stopped.items()
        if step is not None
    )
    tables = [
        mean_table(cohort, scores, guard, longer_steps),
        difference_table(cohort, compared),
        target_table(cohort, scores),
    ]
    said = {
        "seeds": list(cohort.labelled),
        "longer_steps": longer_steps,
        "guard_stopped_at": {str(seed): step for seed, step in stopped.items()},
        "r2": _nested(scores),
        "r2_of_seeds": {
            str(seed): _nested(
                {key: comparison.scores([found[i]], cohort) for key, found in results.items() if i < len(found)}
            )
            for i, seed in enumerate(cohort.labelled)
        },
        "differences": compared,
    }
    caption = "Mean R2 against the number of labels; bars: SD over seeds. Dashed: probes; dash-dotted: augmented."
    summary = f"{summary_of(cohort, longer_steps)}\n\n{guard}"
    figure, curves = figure_of(cohort, scores), curves_of(cohort, scores)
    last = publish(cohort.config, cohort.folder, name, run_id, tables, figure, caption, summary, said, curves)
    print(f"study: {seconds:.0f} s")
    return last | {"differences": compared, "longer_steps": longer_steps}


def curves_of(cohort: Cohort, scores: Scores) -> dict[int, dict[str, float]]:
    """Number of labels -> metrics of the study's MLflow run; a NaN is left out."""
    curves: dict[int, dict[str, float]] = {}
    for (method, budget), by_r in scores.items():
        for r, values in by_r.items():
            some = {f"r2_R{r}/{method}": values["mean"]}
            some |= {f"{short(t)}_r2_R{r}/{method}": values[t] for t in cohort.targets}
            curves.setdefault(budget, {}).update({k: v for k, v in some.items() if math.isfinite(v)})
    return curves


def figure_of(cohort: Cohort, scores: Scores) -> Figure:
    """Mean R2 against the number of labels, a panel for each R."""

    def points(method: str, r: int) -> list[tuple[int, float, float]]:
        found = [(budget, scores[method, budget][str(r)]) for budget in cohort.budgets]
        return [(budget, values["mean"], values["sd"]) for budget, values in found]

    panels = {f"R = {r}": {TITLES[method]: points(method, r) for method in STYLES} for r in cohort.accelerations}
    return figures.label_curves(panels, {TITLES[method]: style for method, style in STYLES.items()})


def summary_of(cohort: Cohort, longer_steps: int) -> str:
    """Subjects, targets and trainings in words."""
    config = cohort.config
    return (
        f"Mean R2 over {', '.join(short(t).upper() for t in cohort.targets)} on {len(cohort.rows)} held-out "
        f"subjects, from {_listed(cohort.budgets)} labelled ones. Seeds {_listed(tuple(cohort.labelled))} change "
        f"pretraining and the labelled subjects. Masked pretraining: {config.masked.steps} steps; alignment: "
        f"{config.align.steps}; more masked pretraining: {config.masked.steps + longer_steps}. Fine-tuning takes "
        f"{config.study.steps} steps, training from scratch {config.study.scratch_steps}, one model for all R; neither "
        f"chooses its step by held-out labels. A probe has a model for each R; augmented subjects (up to "
        f"{config.study.copies} copies each) are shifted and rotated as in training."
    )


def differences(cohort: Cohort, results: Mapping[tuple[str, int], list[Result]]) -> list[dict[str, Any]]:
    """Every pair of `COMPARED` at every budget, at each R and in their mean (``R`` "all")."""
    found = []
    for a, b, target in COMPARED:
        if target and target not in cohort.targets:
            continue
        targets = [cohort.targets.index(target)] if target else None
        for budget in cohort.budgets:
            for i, r in [*enumerate(cohort.accelerations), (None, "all")]:
                both = min(len(results[a, budget]), len(results[b, budget]))  # seeds; those of longer are the first
                gain = difference(
                    results[a, budget][:both],
                    results[b, budget][:both],
                    cohort.truth,
                    cohort.config.evaluate.bootstrap,
                    None if i is None else [i],
                    targets,
                )
                found.append(
                    {
                        "a": a,
                        "b": b,
                        "target": short(target) if target else "mean",
                        "labels": budget,
                        "R": r,
                        "difference": gain.value,
                        "over_subjects": gain.subjects,
                        "over_subjects_and_seeds": gain.both,
                        "seeds": gain.each,
                    }
                )
    return found


def mean_table(cohort: Cohort, scores: Scores, guard: str, longer_steps: int) -> Table:
    """Mean R2 with its SD over seeds, and LVEF's apart: a row per R and method."""
    there = len(cohort.labelled)
    seeds = dict.fromkeys(TITLES, there) | {"longer": min(there, cohort.config.study.longer_seeds)}
    lvef = ("lvef_pct",) if "lvef_pct" in cohort.targets else ()
    rows: list[tuple[Cell, ...]] = []
    for r in map(str, cohort.accelerations):
        for method, title in TITLES.items():
            by_budget = [scores[method, budget][r] for budget in cohort.budgets]
            means = [f"{s['mean']:.3f}" + (f" ± {s['sd']:.3f}" if seeds[method] > 1 else "") for s in by_budget]
            rows.append((int(r), title, *means, *(s[t] for t in lvef for s in by_budget)))
    note = f"More: {longer_steps} steps, alignment's time, {cohort.config.study.longer_seeds} seed(s)."
    return Table(
        f"Mean R2 over {len(cohort.targets)} phenotypes on {len(cohort.rows)} held-out subjects by number of "
        f"labels, mean over {there} seed(s){' ± SD' if there > 1 else ''}",
        ("R", "method", *(f"{b} labels" for b in cohort.budgets), *(f"LVEF {b}" for _ in lvef for b in cohort.budgets)),
        tuple(rows),
        note=f"{note} {guard}" if guard else note,
    )


def target_table(cohort: Cohort, scores: Scores) -> Table:
    """Each target's R2, mean over seeds."""
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (r, budget, title, *(scores[method, budget][str(r)][t] for t in cohort.targets))
        for r in cohort.accelerations
        for budget in cohort.budgets
        for method, title in TITLES.items()
    )
    columns = ("R", "labels", "method", *(short(t).upper() for t in cohort.targets))
    return Table("R2 of each phenotype, mean over seeds", columns, rows)


def difference_table(cohort: Cohort, compared: list[dict[str, Any]]) -> Table:
    """Paired differences: a row per pair, number of labels and R."""
    rows: list[tuple[Cell, ...]] = []
    for one in compared:
        cells = [f"{one['difference']:+.3f}"]
        cells += ["[{:+.3f}, {:+.3f}]".format(*one[key]) for key in ("over_subjects", "over_subjects_and_seeds")]
        pair = f"{TITLES[one['a']]} over {TITLES[one['b']]}"
        what = one["target"] if one["target"] == "mean" else one["target"].upper()
        each_seed = " ".join(f"{value:+.3f}" for value in one["seeds"])
        rows.append((pair, what, one["labels"], str(one["R"]), *cells, each_seed))
    return Table(
        "Differences of R2 on the same held-out subjects, 95 % bootstrap intervals",
        ("gain", "R2 of", "labels", "R", "difference", "over subjects", "over subjects and seeds", "each seed"),
        tuple(rows),
        note="R all: the mean over R. An interval over seeds from three of them is a rough one: see each seed.",
    )


def _nested(scores: Scores) -> dict[str, dict[str, Any]]:
    """Method -> number of labels -> scores, for JSON."""
    found: dict[str, dict[str, Any]] = {}
    for (method, budget), by_r in scores.items():
        found.setdefault(method, {})[str(budget)] = by_r
    return found


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
