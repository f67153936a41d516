"""Report of an encoder on held-out subjects: tables, figures, HTML, metrics in MLflow; or of baselines alone."""

from __future__ import annotations

import datetime
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kmtr import tracking
from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import patterns
from kmtr.data.loader.planning import check_shapes
from kmtr.encoder import WEIGHTS, load_encoder
from kmtr.evaluate import baselines, masks, probes, tables
from kmtr.evaluate.predictions import (
    CENTRAL,
    FILE,
    FORMAT,
    MASK_RIDGE,
    MEAN,
    MEAN_MASK,
    RIDGE,
    TRAINED,
    UNTRAINED,
    append,
    read,
    write,
)
from kmtr.evaluate.scores import Scores, scores_of
from kmtr.metrics import bootstrap_r2
from kmtr.progress import Bar
from kmtr.report import figures
from kmtr.report.html import Table, text_table, write_report
from kmtr.train.folder import finished, run_folder
from kmtr.train.resolve import open_data
from kmtr.types import PHENOTYPES, InputError


def run(config: RunConfig) -> dict[str, Any]:
    """Evaluate, print and keep, or find that it was done; what the last line on stdout says."""
    config, dataset = resolve_data(config)
    if config.evaluate.encoder == "none":
        return run_baselines(config, dataset)
    found = encoder_of(config, dataset)
    asked = fingerprint(config, found.encoder, dataset)
    target = found.folder / "report" if found.run_id else folder_of(config, dataset, asked)
    last = target / "result.json"
    if last.is_file() and (result := json.loads(last.read_text())).pop("asked") == asked:
        print(f"evaluate: done before, reused\n{(target / 'tables.txt').read_text()}\nreport: {result['report']}")
        return result

    device = "cuda" if config.train.device != "cpu" and torch.cuda.is_available() else "cpu"
    sources = {
        TRAINED: load_encoder(found.encoder, device).features,
        UNTRAINED: load_encoder(found.encoder, device, untrained=True).features,
        RIDGE: baselines.low_resolution,
    }
    last.unlink(missing_ok=True)  # what it speaks of is written anew
    path = target / FILE
    write(path, probes.score(config, dataset, sources, Bar("evaluate: subjects"), torch.device(device)))
    scores = scores_of(read(path))
    shown = encoder_tables(scores, config)
    metrics = tables.metrics_of(scores, config)
    text = "\n\n".join(map(text_table, shown))
    print(text)
    report = write_report(
        target / "report.html",
        title=f"k-MTR: {found.name}",
        summary=summary(config, dataset, metrics),
        tables=shown,
        figures=pictures(scores, config, found.folder),
        footer=f"run {found.run_id or found.encoder.name}, data {dataset.digest[:12]}, torch {torch.__version__}, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    )
    (target / "tables.txt").write_text(text)
    if found.run_id:
        send(config, found, metrics, report, target / "spool")
    result = {
        "run_id": found.run_id,
        "report": str(report),
        "predictions": str(path),
        "encoder": str(found.encoder),
        "metrics": metrics,
    }
    last.write_text(json.dumps(result | {"asked": asked}))
    print(f"report: {report}\nMLflow: {tracking.where(config.tracking.uri)}")
    return result


def resolve_data(config: RunConfig) -> tuple[RunConfig, Dataset]:
    """The configuration with absolute paths, and its dataset, which can feed it; no plan of a training is made.

    Raises:
        InputError: one line that names the key or the file.
    """
    config, dataset = open_data(config)
    check_shapes(config, dataset)
    dataset.preflight()
    return config, dataset


@dataclass(frozen=True)
class Found:
    """An encoder that is evaluated.

    Attributes:
        name, folder: name and folder of the run of this configuration; the folder may not exist where another encoder
            is named.
        run_id: id of its MLflow run; empty: the encoder is another run's.
        step: at which that run ended.
    """

    encoder: Path
    name: str
    folder: Path
    run_id: str = ""
    step: int = 0


def encoder_of(config: RunConfig, dataset: Dataset) -> Found:
    """The encoder that `evaluate.encoder` names, or that of the finished run with this configuration.

    Raises:
        InputError: there is none.
    """
    name, folder = run_folder(config, dataset)
    if config.evaluate.encoder:
        found = Found(Path(config.evaluate.encoder), name, folder)
    else:
        done = finished(folder)
        if done is None:
            raise InputError(f"evaluate: run {name} is not finished; pretrain it first, or set evaluate.encoder=FOLDER")
        found = Found(Path(done.encoder), name, folder, done.run_id, int(done.metrics["step"]))
    if not (found.encoder / WEIGHTS).is_file():
        raise InputError(
            f"evaluate.encoder: expected a folder with {WEIGHTS}, as pretraining writes it to RUN/encoder, got "
            f"{found.encoder}"
        )
    return found


def folder_of(config: RunConfig, dataset: Dataset, asked: str) -> Path:
    """Folder of an evaluation that belongs to no run of this configuration."""
    return Path(config.storage.root) / "reports" / f"{dataset.digest[:8]}-{asked[:8]}"


def encoder_tables(scores: list[Scores], config: RunConfig) -> list[Table]:
    """The tables of an encoder beside its baselines."""
    return [tables.r2_table(scores, config), tables.gain_table(scores, config), tables.error_table(scores)]


def send(config: RunConfig, found: Found, metrics: dict[str, float], report: Path, folder: Path) -> None:
    """Metrics and report to the MLflow run of the encoder; predictions, which name subjects, stay here."""
    spool = tracking.Spool(folder, config.tracking.uri, found.run_id)
    spool.metrics(found.step, {f"test/{k}": v for k, v in metrics.items()})
    spool.artifact(report, "report")
    if spool.close(30.0):
        print(f"tracking: not everything could be sent yet; kept in {folder}")


def run_baselines(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """Scores of the linear baselines on a dataset, without an encoder."""
    path = folder_of(config, dataset, fingerprint(config, None, dataset)) / FILE
    sources = {CENTRAL: baselines.central, RIDGE: baselines.low_resolution}
    write(path, probes.score(config, dataset, sources, Bar("baselines: subjects"), torch.device("cpu")))
    append(path, masks.score_masks(config, dataset, Bar("baselines: masks")))
    said = read(path)
    scores, dice = scores_of(said), tables.mean_dice(said)
    shown = [tables.r2_table(scores, config)] + ([tables.mask_table(dice)] if dice else [])
    print("\n\n".join(map(text_table, shown)))
    r2 = {
        name.title: {str(s.acceleration): {t: round(p.r2, 4) for t, p in s.probes[name].items()} for s in scores}
        for name in sources
    }
    overlap = {
        str(r): {"mean mask": float(np.nanmean(means[MEAN_MASK])), "ridge": float(np.nanmean(means[MASK_RIDGE]))}
        for r, _, means in dice
    }
    print(f"predictions: {path}")
    return {"data": config.data.root, "r2": r2, "dice": overlap, "predictions": str(path)}


def fingerprint(config: RunConfig, encoder: Path | None, dataset: Dataset) -> str:
    """Hash of all that decides the result: where it is the same, an earlier result is reused."""
    weights = hashlib.sha256((encoder / WEIGHTS).read_bytes()).hexdigest() if encoder else "none"
    read = {"views", "sax_slices", "frames", "matrix", "crop"}
    settings = config.evaluate.model_dump_json(exclude={"encoder"}) + config.data.model_dump_json(include=read)
    settings += config.sampling.model_dump_json(exclude={"file"}) + patterns.digest(config.sampling)
    settings += f" baselines {baselines.VERSION} predictions {FORMAT}"
    return hashlib.sha256(f"{weights} {dataset.digest} {settings} {config.seed}".encode()).hexdigest()


def summary(config: RunConfig, dataset: Dataset, metrics: dict[str, float]) -> str:
    """Data, method and result in words."""
    labelled = min(config.evaluate.labels, dataset.rows("train"))
    text = (
        f"Data: {dataset.source}. Pretrained on {dataset.rows('train')} training subjects without labels; the probe "
        f"is a ridge regression on {labelled} labelled ones, scored on the test split."
    )
    if "lvedv_r2" in metrics:
        text += (
            f"\n\nAt R = {metrics['acceleration']:.0f} (true R {metrics['true_acceleration']:.2f}) LVEDV's R2 is "
            f"{metrics['lvedv_r2']:.3f} with the trained encoder, {metrics['lvedv_r2_untrained']:.3f} with an "
            f"untrained one, and {metrics['lvedv_r2_ridge']:.3f} with ridge on the zero-filled low-resolution image."
        )
    return text


def pictures(scores: list[Scores], config: RunConfig, folder: Path) -> list[tuple[str, Any]]:
    """Captions and figures: scores, predictions against truth, and what the run's folder has of its training."""
    found: list[tuple[str, Any]] = []
    for s in scores:
        bars = {
            name.title: {
                tables.short(t).upper(): (p.r2, *bootstrap_r2(p, config.evaluate.bootstrap))
                for t, p in found_probes.items()
            }
            for name, found_probes in s.probes.items()
            if name != MEAN
        }
        title = f"R = {s.acceleration} (true {s.true_acceleration:.2f})"
        found.append(
            (f"R2 on held-out subjects at {title}, 95 % bootstrap intervals.", figures.probe_bars(bars, title=title))
        )
    trained = scores[-1].probes[TRAINED]
    names = list(trained)
    if len({len(p.truth) for p in trained.values()}) == 1:
        found.append(
            (
                f"Predicted against true at R = {scores[-1].acceleration}, trained encoder.",
                figures.probe_scatter(
                    np.stack([trained[n].predicted for n in names], 1),
                    np.stack([trained[n].truth for n in names], 1),
                    [tables.short(n).upper() for n in names],
                    [PHENOTYPES[n] for n in names],
                ),
            )
        )
    for image in sorted((folder / "figures").glob("reconstruction_*.png"))[-1:]:
        found.append(
            (
                "Reconstruction of one held-out subject at the end of training (its decoder is no product: a look "
                "at what the encoder knows).",
                image.read_bytes(),
            )
        )
    history = {
        name: values
        for name, values in tracking.history(folder / "spool").items()
        if name.endswith("loss") or "infonce" in name or name == "val/probe_r2"
    }
    if history:
        found.append(("Losses and the probe over steps.", figures.loss_curves(history)))
    return found
