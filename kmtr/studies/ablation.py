"""Pretraining's choices one by one: short runs, scored by the probe, each against the recipe's own choice."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmtr import machine
from kmtr.config import RunConfig, from_json, override, to_json
from kmtr.data.dataset.reader import Dataset
from kmtr.evaluate.scores import Result, difference
from kmtr.evaluate.tables import short
from kmtr.progress import Bar
from kmtr.ray_start import start_ray
from kmtr.report import figures
from kmtr.report.html import Cell, Table
from kmtr.studies import comparison, running
from kmtr.studies.running import finished, named, open_run, publish, rate
from kmtr.studies.variants import Group, asked, check
from kmtr.train import driver
from kmtr.types import InputError, KmtrError

DEFAULT = "default"
NOISE = "seeds"
"""The group of the default with other seeds: how much differs without a reason."""


SINGLE = ("lvef_pct", "lvm_g")
"""Phenotypes whose R2 a row tells beside the mean, where they are among `study.targets`."""


@dataclass
class Variant:
    """One row's run.

    Attributes:
        reference: the variant that it is compared with; itself where there is none.
        run: name of its run and of the system in its predictions; empty while it has none.
        failure: one line; empty: it did not fail.
    """

    group: str
    name: str
    config: RunConfig | None
    reference: Variant | None = None
    run: str = ""
    failure: str = ""
    outcome: driver.Outcome | None = None

    @property
    def seed(self) -> int:
        assert self.config is not None
        return self.config.seed

    @property
    def encoder(self) -> str:
        assert self.outcome is not None
        return self.outcome.encoder


def run(config: RunConfig) -> dict[str, Any]:
    """Pretrain and score all variants, or go on where it stopped; what the last line on stdout says."""
    began = time.perf_counter()
    groups = asked(config)
    check(groups, config)
    config, dataset = driver.resolve(override(config, base_of(config, "both") | {"study.seeds": seeds_of(config)}))
    run_name, _ = driver.run_folder(named(config, {}), dataset)
    name = f"ablation-{config.recipe}-{comparison.digest(config, run_name)}"
    folder = Path(config.storage.root) / "study" / name
    cohort = comparison.cohort(config, dataset, folder, config.study.ablation_labels)
    folder.mkdir(parents=True, exist_ok=True)
    variants = variants_of(config, groups)
    with open_run(config, dataset, name) as run_id:
        pretrain(config, dataset, variants, run_id)
        done = [v for v in _with_references(variants) if v.outcome is not None]
        if not done:
            raise KmtrError(f"study: all variants failed: {next((v.failure for v in variants), 'there are none')}")
        comparison.probe_all(
            cohort, {(v.seed, v.run): comparison.Source(v.run, v.encoder, seeds=(v.seed,)) for v in done}
        )
        results = comparison.gather(cohort, [(v.run, v.seed, budget) for v in done for budget in cohort.budgets])
        rows = [score(cohort, results, v, budget) for v in variants for budget in cohort.budgets]
        return report(cohort, name, run_id, rows, time.perf_counter() - began)


def seeds_of(config: RunConfig) -> tuple[int, ...]:
    """Seeds of the recipe's own choices: the run's, which all variants have, and the study's others."""
    return (config.seed, *(seed for seed in config.study.seeds if seed != config.seed))


def base_of(config: RunConfig, stage: str) -> dict[str, Any]:
    """Changes that make the recipe a run of the ablation. One worker each: several run side by side."""
    steps = config.study.ablation_steps
    changes = {
        "stage": stage,
        "masked.steps": steps,
        "align.steps": config.study.ablation_align_steps,
        "train.workers": 1,
        "train.eval_every": -(-steps // config.train.log_every) * config.train.log_every,  # only at a stage's end
    }
    return changes | {"train.threads": config.train.threads or machine.threads(at_once(config))}


def at_once(config: RunConfig) -> int:
    """Runs at the same time, each on a core at least."""
    return min(config.study.concurrent, os.cpu_count() or 1)


def variants_of(config: RunConfig, groups: Sequence[Group]) -> list[Variant]:
    """The default at every seed, then all groups; a variant whose configuration is refused has failed already."""
    references: dict[str, Variant] = {}
    found: list[Variant] = []
    for seed in seeds_of(config):
        default = Variant(NOISE, f"seed {seed}", named(config, base_of(config, "masked") | {"seed": seed}))
        default.reference = references.setdefault("masked", default)
        found.append(default)
    references["both"] = Variant("", DEFAULT, named(config, base_of(config, "both")))
    for group in groups:
        for name, changes in group.variants.items():
            try:
                own: RunConfig | None = named(config, base_of(config, group.stage) | dict(changes))
                failure = ""
            except InputError as error:
                own, failure = None, str(error)
            found.append(Variant(group.name, name, own, references[group.stage], failure=failure))
    return found


# ------------------------------------------------------------------------------------------------------------ training


def _with_references(variants: Sequence[Variant]) -> list[Variant]:
    return [*variants, *{id(v.reference): v.reference for v in variants if v.reference}.values()]


def pretrain(config: RunConfig, dataset: Dataset, variants: Sequence[Variant], parent: str) -> None:
    """Train what is not finished, `study.concurrent` at a time, and note every outcome or failure."""
    everything = _with_references(variants)
    waiting: dict[str, RunConfig] = {}
    for variant in everything:
        if variant.config is not None:
            variant.run = driver.run_folder(variant.config, dataset)[0]
            if finished(variant.config, dataset) is None:
                waiting.setdefault(variant.run, variant.config)
    failures: dict[str, str] = {}
    if waiting:
        print(f"study: {len(waiting)} runs of {config.study.ablation_steps} steps", flush=True)
        start_ray()
        failures = _train_all(list(waiting.values()), parent, at_once(config))
    for variant in everything:
        if variant.config is not None:
            variant.outcome = finished(variant.config, dataset)
            if variant.outcome is None:
                variant.failure = failures.get(variant.run, "it ended without a result")


def _train_all(configs: Sequence[RunConfig], parent: str, most: int) -> dict[str, str]:
    """Run name -> why it failed."""
    bar, failures = Bar("study: runs"), {}
    jobs = [(to_json(config), parent) for config in configs]
    results = running.ended(_train, jobs, most, num_cpus=0, max_retries=0)
    for done, (name, failure, seconds) in enumerate(results, 1):
        if failure:
            failures[name] = failure
        print(f"  {name}  {f'failed: {failure}' if failure else f'finished in {seconds:.0f} s'}", flush=True)
        bar(done, len(configs))
    return failures


def _train(text: str, parent: str) -> tuple[str, str, float]:
    """One run, in a process of Ray's that only waits for its workers: name, failure, seconds."""
    os.environ.pop("MLFLOW_RUN_ID", None)  # else MLflow would write into that run instead of a child
    config, began = from_json(text), time.perf_counter()
    config, dataset = driver.resolve(config)
    name, _ = driver.run_folder(config, dataset)
    try:
        driver.fit(config, parent_id=parent, quiet=True)
    except Exception as error:  # a row of the table; the other variants go on
        return name, " ".join(str(error).split()) or type(error).__name__, time.perf_counter() - began
    return name, "", time.perf_counter() - began


# ----------------------------------------------------------------------------------------------------------- reporting


def score(
    cohort: comparison.Cohort, results: Mapping[tuple[str, int, int], Result], variant: Variant, budget: int
) -> dict[str, Any]:
    """One row: R2 at each R and of single targets, the difference to the reference, the time of a step."""
    row: dict[str, Any] = {
        "group": variant.group,
        "variant": variant.name,
        "labels": budget,
        "failure": variant.failure,
        "run": variant.run,
    }
    if variant.failure or variant.outcome is None or variant.config is None:
        return row
    result = results[variant.run, variant.seed, budget]
    r2 = comparison.scores([result], cohort)
    row["r2"] = {r: values["mean"] for r, values in r2.items()}
    for target in SINGLE:
        if target in cohort.targets:
            row[short(target)] = statistics.fmean(values[target] for values in r2.values())
    last = variant.config.masked_steps
    row["seconds_per_step"] = variant.config.data.global_batch / rate(variant.outcome, 0, last)
    reference = variant.reference
    if reference is not None and reference.outcome is not None and reference.run != variant.run:
        other = results[reference.run, reference.seed, budget]
        gain = difference([result], [other], cohort.truth, cohort.config.evaluate.bootstrap)
        row["difference"], row["interval"] = gain.value, gain.subjects
    elif reference is not None and reference.run == variant.run:
        row["difference"], row["interval"], row["own"] = 0.0, (0.0, 0.0), True
    if "align_stopped" in variant.outcome.metrics:
        row["guard_stopped_at"] = variant.outcome.metrics["align_stopped"]
    return row


def noise_of(rows: Sequence[Mapping[str, Any]], budget: int) -> float:
    """SD over seeds of the default's R2 (mean over R); NaN with one seed."""
    means = [
        statistics.fmean(row["r2"].values())
        for row in rows
        if row["group"] == NOISE and row["labels"] == budget and "r2" in row
    ]
    return statistics.stdev(means) if len(means) > 1 else math.nan


def table(cohort: comparison.Cohort, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row per variant and number of labels: R2 at each R, of single targets, and the difference to the reference."""
    cells: list[tuple[Cell, ...]] = []
    targets = [short(t) for t in SINGLE if t in cohort.targets]
    for row in rows:
        head = (row["group"], row["variant"], row["labels"])
        if "r2" not in row:
            missing = (None,) * (len(cohort.accelerations) + len(targets))
            cells.append((*head, *missing, f"failed: {row['failure']}", None))
            continue
        if "difference" not in row:
            gain = ""
        elif row.get("own"):
            gain = "the recipe's"
        else:
            gain = "{:+.3f} [{:+.3f}, {:+.3f}]".format(row["difference"], *row["interval"])
        if "guard_stopped_at" in row:
            gain += f" (guard at {row['guard_stopped_at']:.0f})"
        r2 = [row["r2"][str(r)] for r in cohort.accelerations]
        cells.append((*head, *r2, *(row[t] for t in targets), gain, row["seconds_per_step"]))
    noise = ", ".join(f"{noise_of(rows, budget):.3f} at {budget} labels" for budget in cohort.budgets)
    return Table(
        f"Mean R2 over {len(cohort.targets)} phenotypes on {len(cohort.rows)} held-out subjects, ridge probe of "
        "frozen encoders, by variant",
        (
            "group",
            "variant",
            "labels",
            *(f"R = {r}" for r in cohort.accelerations),
            *(t.upper() for t in targets),
            "difference",
            "s/step",
        ),
        tuple(cells),
        note=f"Difference to the recipe's own choice, mean over R, with a paired 95 % bootstrap interval over held-out "
        f"subjects. SD of the recipe between seeds (which change weights, order and labelled subjects): {noise}.",
    )


def report(
    cohort: comparison.Cohort, name: str, run_id: str, rows: Sequence[Mapping[str, Any]], seconds: float
) -> dict[str, Any]:
    """Publish table, figure and numbers; what the last line on stdout says."""
    budget = cohort.budgets[0]
    dots: dict[str, dict[str, tuple[float, float, float]]] = {}
    for row in rows:
        if row["labels"] == budget and (row["failure"] or "difference" in row):
            gap = (math.nan,) * 3 if row["failure"] else (row["difference"], *row["interval"])
            dots.setdefault(row["group"], {})[row["variant"]] = gap
    figure = figures.differences(
        dots, noise_of(rows, budget), f"R2 over the recipe's, {budget} labels, mean over R", title="Ablation"
    )
    curves: dict[int, dict[str, float]] = {}
    for row in rows:
        if "r2" in row:
            key = f"{row['group']}/{row['variant']}"
            values = {f"r2/{key}": statistics.fmean(row["r2"].values()), f"s_per_step/{key}": row["seconds_per_step"]}
            curves.setdefault(row["labels"], {}).update({k: v for k, v in values.items() if math.isfinite(v)})
    study_config = cohort.config.study
    questions = "\n\n".join(f"{group.name}: {group.asks}" for group in asked(cohort.config))
    summary = (
        f"Every variant changes one choice of the recipe {cohort.config.recipe} and is pretrained for "
        f"{study_config.ablation_steps} steps of masked pretraining (alignment, image side: and "
        f"{study_config.ablation_align_steps} of alignment), then scored by a ridge probe.\n\n{questions}"
    )
    caption = (
        f"Difference to the recipe's own choice with {budget} labels, 95 % intervals over held-out subjects; grey: "
        "SD of the recipe between seeds."
    )
    said = {"rows": list(rows), "noise": {str(b): noise_of(rows, b) for b in cohort.budgets}}
    tables = [table(cohort, rows)]
    last = publish(cohort.config, cohort.folder, name, run_id, tables, figure, caption, summary, said, curves)
    print(f"study: {seconds:.0f} s")
    failed = sorted({f"{row['group']}/{row['variant']}" for row in rows if row["failure"]})
    return last | {"rows": len(rows), "failed": failed}
