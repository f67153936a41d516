"""Training on labels as a command: the run, then its model on the test split at every R beside the floors."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kmtr import area_maps, card, machine, tracking
from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Dataset
from kmtr.evaluate import answers, probes, tables, task_report, task_tables, thresholds
from kmtr.evaluate.predictions import (
    FILE,
    MASK_RIDGE,
    MEAN,
    MEAN_MASK,
    RIDGE,
    Name,
    by_areas,
    joined,
    together,
    write,
)
from kmtr.evaluate.scores import panel, scores_of
from kmtr.evaluate.task_predictions import by_split, mappable, trained
from kmtr.exported import AREAS, MODEL_HEAD
from kmtr.inference import load_model
from kmtr.metrics.dense import DICE, IMAGES
from kmtr.metrics.diseases import detection
from kmtr.ray_start import start_ray
from kmtr.report.html import Cell, Table, text_table
from kmtr.train import choice, driver, registered, start
from kmtr.train.folder import Outcome, write_json
from kmtr.train.resolve import resolve
from kmtr.types import DISEASES, PHENOTYPES, KmtrError

RESULT, SENT = "test.json", "test-sent.json"
"""Files in a run's folder: scores of the test split, and that they are with MLflow, or kept for it."""


def run(config: RunConfig) -> dict[str, Any]:
    """Train on labels, or find that it is done; what the last line on stdout says."""
    config, dataset = resolve(config)
    registered.check(config)
    name, folder = driver.run_folder(config, dataset)
    if driver.finished(folder) is None:
        there, labels = dataset.rows("train"), config.task.labels
        begun = "initial weights" if config.task.encoder == start.NONE else "a pretrained encoder"
        print(
            f"finetune: {name}: {', '.join(config.task.tasks)} on {f'{labels} of ' if labels else ''}{there} subjects, "
            f"{config.task_steps} steps from {begun}{', which stays frozen' if config.task.frozen else ''}, batch "
            f"{config.data.global_batch} on {config.train.workers} worker(s), ZeRO-{config.train.zero_stage}\n"
            f"finetune: {start.said_of_labels(config, dataset)}",
            flush=True,
        )
        start_ray()
    began = time.perf_counter()
    outcome = driver.fit(config)
    if not outcome.encoder:
        print(f"finetune: {name} pauses at step {outcome.metrics['step']:.0f} (train.until)")
        return asdict(outcome)
    if outcome.reused:
        print(f"finetune: {name} is finished, reused (run.fresh=true starts anew)")
    else:
        print(f"finetune: {name} finished in {time.perf_counter() - began:.0f} s")
    tested = score(config, dataset, Path(outcome.encoder), folder)
    tested |= _report(config, dataset, outcome, tested)
    chosen, said = choice.shown(outcome.metrics, config)
    print(f"  model     {outcome.encoder}\n            {chosen}")
    print(f"  tracking  {tracking.where(config.tracking.uri)}, run {outcome.run_id}")
    return (
        asdict(outcome)
        | {"model": outcome.encoder}
        | said
        | tested
        | registered.register(config, outcome.run_id, outcome.encoder)
    )


def score(config: RunConfig, dataset: Dataset, model: Path, folder: Path) -> dict[str, Any]:
    """Predictions for the test split as Parquet, and the tables made of them; printed, and kept for the next time.

    Returns:
        ``predictions`` (path) and ``metrics`` (``test/...``); empty where the dataset has no test split.
    """
    kept = folder / RESULT
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text())
        print(found.pop("text"))
        return found
    if dataset.rows("test") < probes.MIN_SUBJECTS:
        print(f"finetune: note: the dataset has {dataset.rows('test')} test subjects, too few to score the model on")
        return {"metrics": {}}
    area_maps.remove(model)  # of a scoring that was interrupted
    (folder / SENT).unlink(missing_ok=True)
    loaded = load_model(model, machine.device(config.train.device))
    areas = mappable(loaded, dataset)
    chooses = loaded.prepare.labels and (areas or "diseases" in loaded.prepare.tasks)
    chooses = chooses and dataset.rows("val") >= probes.MIN_SUBJECTS
    answered = by_split(config, dataset, loaded, ("test", "val") if chooses else ("test",), by_areas=areas)
    found = answered.tables
    choices = answers.choose(found["val"], trained(config), loaded.prepare.labels) if "val" in found else []
    found["test"] = joined([found["test"], answers.rows(found["test"], trained(config), choices)])
    files = {"test": folder / FILE, "val": folder / thresholds.FILE}
    files["val"].unlink(missing_ok=True)
    for split, rows in found.items():
        write(files[split], rows)
    shown, metrics = summary(found["test"], config, found.get("val"))
    text = "\n\n".join(map(text_table, shown))
    if choices:
        text += f"\n\nfinetune: {answers.keep(model, answered.maps, found['val'], choices)}"
    print(text)
    card.write_card(model, [*shown, *of_the_model(found["test"], config, found.get("val"))])
    write_json(kept, {"predictions": str(files["test"]), "metrics": metrics, "text": text})
    return {"predictions": str(files["test"]), "metrics": metrics}


def summary(
    table: pa.Table, config: RunConfig, validation: pa.Table | None = None
) -> tuple[list[Table], dict[str, float]]:
    """A table for each task, and the metrics of the model at the highest R evaluated.

    Args:
        validation: rows of validation subjects, who choose the thresholds of F1; None: there are none.
    """
    shown: list[Table] = []
    metrics: dict[str, float] = {}
    names = set(table.column("target").to_pylist())
    if names & set(PHENOTYPES):
        scores = scores_of(table.filter(pc.is_in(table.column("target"), pa.array(list(PHENOTYPES)))))
        shown += [tables.r2_table(scores, config), tables.error_table(scores)]
        last = max(scores, key=lambda one: one.acceleration)
        asked = last.probes.get(trained(config), last.probes[RIDGE])  # of masks alone more is measured
        ours = trained(config)
        more = (RIDGE, "_ridge"), (by_areas(ours), "_areas"), (together(ours), "_together")
        for name, suffix in ((ours, ""), *more):
            r2 = {tables.short(t): probe.r2 for t, probe in last.probes.get(name, {}).items() if t in asked}
            metrics |= {f"{target}_r2{suffix}": value for target, value in r2.items()}
            metrics |= {f"mean_r2{suffix}": float(np.mean(list(r2.values())))} if r2 else {}
    if names & set(DISEASES):
        areas = table.filter(pc.is_in(table.column("target"), pa.array(DISEASES)))
        found = disease_table(areas, trained(config), validation)
        shown.append(found[0])
        metrics |= found[1]
    if names & set(DICE):
        dice = tables.mean_dice(table)
        shown.append(tables.mask_table(dice))
        for name, suffix in ((trained(config), ""), (MASK_RIDGE, "_ridge"), (MEAN_MASK, "_mean")):
            if name in dice[-1][2]:
                metrics[f"mean_dice{suffix}"] = float(np.nanmean(dice[-1][2][name]))
    if names & set(IMAGES):
        shown.append(tables.image_table(table))
    return shown, metrics


def of_the_model(table: pa.Table, config: RunConfig, validation: pa.Table | None = None) -> list[Table]:
    """All metrics of the model with their intervals; of its floors the mean alone, which R2 compares with."""
    ours = trained(config)
    mine = {ours, by_areas(ours), together(ours)}
    rows = table.filter(pc.is_in(table.column("system"), pa.array([one.system for one in (*mine, MEAN)])))
    made = task_tables.tables_of(rows, mine, config.evaluate.bootstrap, validation)
    return [one.table() for one in made if not one.name.endswith(task_tables.GAIN)]


def disease_table(table: pa.Table, ours: Name, validation: pa.Table | None = None) -> tuple[Table, dict[str, float]]:
    """AUROC, average precision beside the prevalence, and F1 of each disease; the model's metrics at the highest R.

    Args:
        ours: name of the model.
        validation: rows of validation subjects, who choose the thresholds of F1; None: no F1.
    """
    seen = panel(table)
    limits, suffix = thresholds.choose(seen, validation), {ours: "", by_areas(ours): "_areas"}
    rows: list[tuple[Cell, ...]] = []
    metrics: dict[str, float] = {}
    for number, r in enumerate(seen.accelerations):
        for fit, values in seen.values.items():
            if fit.name == MEAN or not np.isfinite(values[number]).any():
                continue
            cells: list[Cell] = []
            for i, target in enumerate(seen.targets):
                said = np.isfinite(values[number, :, i]) | (not fit.name.measured)  # areas of masks may lack subjects
                truth, score = seen.truth[said, i], values[number, said, i]
                scored = detection(truth, score, limits.values[fit][number, i])
                f1 = f", F1 {scored.f1:.2f}" if np.isfinite(scored.f1) else ""
                f1 += "" if said.all() else f", {said.sum()} subjects"
                cells.append(f"{scored.auroc:.3f} (AP {scored.average_precision:.2f} of {scored.prevalence:.2f}{f1})")
                if fit.name in suffix:
                    metrics |= {f"{target}_auroc{suffix[fit.name]}": scored.auroc}
                    metrics |= {f"{target}_f1{suffix[fit.name]}": scored.f1} if np.isfinite(scored.f1) else {}
            rows.append((r, f"{seen.true_acceleration_at(number):.2f}", fit.name.title, *cells))
    title = "AUROC on held-out subjects (average precision; a guess has the prevalence behind it)"
    return Table(title, ("R", "true R", "system", *seen.targets), tuple(rows), limits.note()), metrics


def _report(config: RunConfig, dataset: Dataset, outcome: Outcome, tested: Mapping[str, Any]) -> dict[str, str]:
    """Write the report, where there are predictions to make it of, and send what is new to MLflow: ``report``."""
    model, folder = Path(outcome.encoder), Path(outcome.folder)
    if not outcome.reused or ("predictions" in tested and not (folder / SENT).is_file()):
        # Behind the maps the head that names them: what training sent stays whole until then.
        changed = (name for name in (card.FILE, AREAS, MODEL_HEAD) if (model / name).is_file())
        _send(config, outcome, [(model / name, model.name) for name in changed], tested["metrics"])
        write_json(folder / SENT, {"metrics": sorted(tested["metrics"])})
    if "predictions" not in tested:
        return {}
    title, path = f"k-MTR: {outcome.name}", Path(tested["predictions"])
    report = task_report.write(config, dataset, path, model, title=title, ours=trained(config), run=outcome.run_id)
    if report.new:
        _send(config, outcome, [(report.html, "report")], {})
    print(f"  report    {report.html}")
    return {"report": str(report.html)}


def _send(config: RunConfig, outcome: Outcome, files: Sequence[tuple[Path, str]], metrics: Mapping[str, float]) -> None:
    """Metrics, the model's changed files and the report to the run in MLflow; of the predictions nothing, since they
    name subjects.

    Args:
        files: each with its folder there.
    """
    folder, step = Path(outcome.folder), int(outcome.metrics["step"])
    first = tracking.unsent(folder / driver.SPOOL)  # the model as training left it: it must not arrive behind this one
    spool = tracking.Spool(folder / "test-spool", config.tracking.uri, outcome.run_id, ships=not first)
    for file, there in files:
        spool.artifact(file, there)
    spool.metrics(step, {f"test/{name}": value for name, value in metrics.items() if np.isfinite(value)})
    try:
        unsent = spool.close(30.0)
    except KmtrError as error:
        print(f"tracking: {error}")
        return
    if unsent:
        print(f"tracking: not everything could be sent yet; kept in {folder / 'test-spool'}")
