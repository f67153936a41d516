"""Training on labels as a command: the run, then its model on the test split at every R beside the floors."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from kmtr import machine, tracking
from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import NOTHING
from kmtr.evaluate import baselines, probes, tables
from kmtr.evaluate.predictions import FILE, FINETUNED, FROM_SCRATCH, MEAN, RIDGE, Name, joined, read, write
from kmtr.evaluate.predictors import Predictor, predict
from kmtr.evaluate.scores import panel, scores_of
from kmtr.inference import TaskModel, load_model
from kmtr.metrics.diseases import detection
from kmtr.physics.sampling import VALIDATION
from kmtr.progress import Bar
from kmtr.ray_start import start_ray
from kmtr.report.html import Cell, Table, text_table
from kmtr.train import driver, start
from kmtr.train.folder import write_json
from kmtr.train.resolve import resolve
from kmtr.types import DISEASES, PHENOTYPES, KmtrError

RESULT = "test.json"


def run(config: RunConfig) -> dict[str, Any]:
    """Train on labels, or find that it is done; what the last line on stdout says."""
    config, dataset = resolve(config)
    name, folder = driver.run_folder(config, dataset)
    if driver.finished(folder) is None:
        begun = "initial weights" if config.task.encoder == start.NONE else "a pretrained encoder"
        print(
            f"finetune: {name}: {', '.join(config.task.tasks)} on {dataset.rows('train')} subjects, "
            f"{config.task_steps} steps from {begun}{', which stays frozen' if config.task.frozen else ''}, batch "
            f"{config.data.global_batch} on {config.train.workers} worker(s), ZeRO-{config.train.zero_stage}",
            flush=True,
        )
        start_ray()
    began = time.perf_counter()
    outcome = driver.fit(config)
    if outcome.reused:
        print(f"finetune: {name} is finished, reused (run.fresh=true starts anew)")
    else:
        print(f"finetune: {name} finished in {time.perf_counter() - began:.0f} s")
    tested = score(config, dataset, Path(outcome.encoder), folder)
    if not outcome.reused:
        _send(config, outcome.run_id, folder, int(outcome.metrics["step"]), tested["metrics"])
    print(f"  model     {outcome.encoder}\n  tracking  {tracking.where(config.tracking.uri)}, run {outcome.run_id}")
    return asdict(outcome) | {"model": outcome.encoder} | tested


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
    path = folder / FILE
    write(path, predictions(config, dataset, load_model(model, machine.device(config.train.device))))
    shown, metrics = summary(read(path), config)
    text = "\n\n".join(map(text_table, shown))
    print(text)
    write_json(kept, {"predictions": str(path), "metrics": metrics, "text": text})
    return {"predictions": str(path), "metrics": metrics}


def predictions(config: RunConfig, dataset: Dataset, model: TaskModel) -> pa.Table:
    """Rows of the model, the mean and a ridge on the low-resolution image, all of the same labels and patterns."""
    device = torch.device(machine.device(config.train.device))
    targets = model.prepare.labels
    readers = probes.readers_of(dataset, config, "finetune")
    labelled = list(range(len(readers["train"])))
    asked = subjects.held_out(config.seed, len(readers["test"]), config.evaluate.subjects)
    known = subjects.labels_of(readers["train"], labelled, targets)
    held_out = probes.held_out_of(readers["test"], asked, targets)
    total = len(config.evaluate.accelerations) * (len(labelled) + len(asked))
    tell = probes.Counter(Bar("finetune: subjects"), total)
    parts = []
    for r in config.evaluate.accelerations:
        fixed = override(config, {"sampling.accelerations": (r,)})
        train = tell(pipeline.read_in_order(readers["train"], labelled, probes.CHUNK, fixed, NOTHING, VALIDATION))
        test = tell(pipeline.read_in_order(readers["test"], asked, probes.CHUNK, fixed, NOTHING, VALIDATION))
        fitted: dict[Name, Predictor] = {trained(config): model}
        fitted |= probes.fit({RIDGE: baselines.low_resolution}, train, known, targets, device)
        parts.append(
            predict(fitted, test, held_out, acceleration=r, seed=config.seed, labels=len(labelled), device=device)
        )
    return joined(parts)


def trained(config: RunConfig) -> Name:
    """Name of the model in tables."""
    return FROM_SCRATCH if config.task.encoder == start.NONE else FINETUNED


def summary(table: pa.Table, config: RunConfig) -> tuple[list[Table], dict[str, float]]:
    """A table for each task, and the metrics of the model at the highest R evaluated."""
    shown: list[Table] = []
    metrics: dict[str, float] = {}
    names = set(table.column("target").to_pylist())
    if names & set(PHENOTYPES):
        scores = scores_of(table.filter(pc.is_in(table.column("target"), pa.array(list(PHENOTYPES)))))
        shown += [tables.r2_table(scores, config), tables.error_table(scores)]
        last = max(scores, key=lambda one: one.acceleration)
        for name, suffix in ((trained(config), ""), (RIDGE, "_ridge")):
            r2 = {tables.short(target): probe.r2 for target, probe in last.probes[name].items()}
            metrics |= {f"{target}_r2{suffix}": value for target, value in r2.items()}
            metrics[f"mean_r2{suffix}"] = float(np.mean(list(r2.values())))
    if names & set(DISEASES):
        areas = table.filter(pc.is_in(table.column("target"), pa.array(DISEASES)))
        found = disease_table(areas)
        shown.append(found[0])
        metrics |= found[1]
    return shown, metrics


def disease_table(table: pa.Table) -> tuple[Table, dict[str, float]]:
    """AUROC, and average precision beside the prevalence, of each disease; AUROC of the model at the highest R."""
    seen = panel(table)
    rows: list[tuple[Cell, ...]] = []
    metrics: dict[str, float] = {}
    for number, r in enumerate(seen.accelerations):
        for fit, values in seen.values.items():
            if fit.name == MEAN:
                continue
            cells: list[Cell] = []
            for i, target in enumerate(seen.targets):
                scored = detection(seen.truth[:, i], values[number, :, i], threshold=0.5)
                cells.append(f"{scored.auroc:.3f} (AP {scored.average_precision:.2f} of {scored.prevalence:.2f})")
                if fit.name in (FINETUNED, FROM_SCRATCH):
                    metrics[f"{target}_auroc"] = scored.auroc
            rows.append((r, f"{seen.true_acceleration_at(number):.2f}", fit.name.title, *cells))
    title = "AUROC on held-out subjects (average precision; a guess has the prevalence behind it)"
    return Table(title, ("R", "true R", "system", *seen.targets), tuple(rows)), metrics


def _send(config: RunConfig, run_id: str, folder: Path, step: int, metrics: dict[str, float]) -> None:
    """Metrics of the test split to the run in MLflow; of the predictions nothing, since they name subjects."""
    spool = tracking.Spool(folder / "test-spool", config.tracking.uri, run_id)
    spool.metrics(step, {f"test/{name}": value for name, value in metrics.items() if np.isfinite(value)})
    try:
        unsent = spool.close(30.0)
    except KmtrError as error:
        print(f"tracking: {error}")
        return
    if unsent:
        print(f"tracking: not everything could be sent yet; kept in {folder / 'test-spool'}")
