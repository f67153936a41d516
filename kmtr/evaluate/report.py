"""Report of an encoder on held-out subjects: tables, figures, HTML, metrics in MLflow; or of baselines alone."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kmtr import tracking
from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import patterns
from kmtr.encoder import WEIGHTS, load_encoder
from kmtr.evaluate import baselines, probes
from kmtr.evaluate.probes import Scores
from kmtr.metrics import bootstrap_r2
from kmtr.progress import Bar
from kmtr.report import figures
from kmtr.report.html import text_table, write_report
from kmtr.train import driver
from kmtr.types import PHENOTYPES, InputError


def run(config: RunConfig) -> dict[str, Any]:
    """Evaluate, print and keep, or find that it was done; what the last line on stdout says."""
    config, dataset = driver.resolve(config)
    if config.evaluate.encoder == "none":
        return run_baselines(config, dataset)
    name, folder = driver.run_folder(config, dataset)
    done = driver.finished(folder)
    encoder_path = Path(config.evaluate.encoder) if config.evaluate.encoder else None
    if encoder_path is None:
        if done is None:
            raise InputError(f"evaluate: run {name} is not finished; pretrain it first, or set evaluate.encoder=FOLDER")
        encoder_path = Path(done.encoder)
    if not (encoder_path / WEIGHTS).is_file():
        raise InputError(
            f"evaluate.encoder: expected a folder with {WEIGHTS}, as pretraining writes it to RUN/encoder, got "
            f"{encoder_path}"
        )
    run_id = done.run_id if done is not None and not config.evaluate.encoder else ""
    target = folder / "report" if run_id else Path(config.storage.root) / "reports" / dataset.digest[:8]
    asked = fingerprint(config, encoder_path, dataset)
    last = target / "result.json"
    if last.is_file() and (result := json.loads(last.read_text())).pop("asked") == asked:
        print(f"evaluate: done before, reused\n{(target / 'tables.txt').read_text()}\nreport: {result['report']}")
        return result

    device = "cuda" if config.train.device != "cpu" and torch.cuda.is_available() else "cpu"
    sources = {
        probes.TRAINED: probes.embedding(load_encoder(encoder_path, device)),
        probes.UNTRAINED: probes.embedding(load_encoder(encoder_path, device, untrained=True)),
        probes.RIDGE: baselines.low_resolution,
    }
    scores = probes.score(config, dataset, sources, Bar("evaluate: subjects"), torch.device(device))
    tables = [probes.r2_table(scores, config), probes.gain_table(scores, config), probes.error_table(scores)]
    metrics = probes.metrics_of(scores, config)
    text = "\n\n".join(map(text_table, tables))
    print(text)
    report = write_report(
        target / "report.html",
        title=f"k-MTR: {name}",
        summary=summary(config, dataset, metrics),
        tables=tables,
        figures=pictures(scores, config, folder),
        footer=f"run {run_id or encoder_path.name}, data {dataset.digest[:12]}, torch {torch.__version__}, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    )
    (target / "tables.txt").write_text(text)
    if run_id:
        spool = tracking.Spool(target / "spool", config.tracking.uri, run_id)
        spool.metrics(int(done.metrics["step"]) if done else 0, {f"test/{k}": v for k, v in metrics.items()})
        spool.artifact(report, "report")
        if spool.close(30.0):
            print(f"tracking: not everything could be sent yet; kept in {target / 'spool'}")
    result = {"run_id": run_id, "report": str(report), "encoder": str(encoder_path), "metrics": metrics}
    last.write_text(json.dumps(result | {"asked": asked}))
    print(f"report: {report}\nMLflow: {tracking.where(config.tracking.uri)}")
    return result


def run_baselines(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """Scores of the linear baselines on a dataset, without an encoder."""
    sources = {probes.CENTRAL: baselines.central, probes.RIDGE: baselines.low_resolution}
    scores = probes.score(config, dataset, sources, Bar("baselines: subjects"), torch.device("cpu"))
    masks = baselines.score_masks(config, dataset, Bar("baselines: masks"))
    tables = [probes.r2_table(scores, config)] + ([baselines.mask_table(masks)] if masks else [])
    print("\n\n".join(map(text_table, tables)))
    r2 = {
        name: {str(s.acceleration): {t: round(p.r2, 4) for t, p in s.probes[name].items()} for s in scores}
        for name in sources
    }
    overlap = {
        str(s.acceleration): {"mean mask": float(np.nanmean(s.mean)), "ridge": float(np.nanmean(s.ridge))}
        for s in masks
    }
    return {"data": config.data.root, "r2": r2, "dice": overlap}


def fingerprint(config: RunConfig, encoder: Path, dataset: Dataset) -> str:
    """Hash of all that decides the result: where it is the same, an earlier result is reused."""
    weights = hashlib.file_digest((encoder / "encoder.safetensors").open("rb"), "sha256").hexdigest()
    read = {"views", "sax_slices", "frames", "matrix", "crop"}
    settings = config.evaluate.model_dump_json(exclude={"encoder"}) + config.data.model_dump_json(include=read)
    settings += config.sampling.model_dump_json(exclude={"file"}) + patterns.digest(config.sampling)
    settings += f" baselines {baselines.VERSION}"
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
    found: list[tuple[str, Any]] = []
    for s in scores:
        bars = {
            name: {
                probes.short(t).upper(): (p.r2, *bootstrap_r2(p, config.evaluate.bootstrap))
                for t, p in found_probes.items()
            }
            for name, found_probes in s.probes.items()
            if name != probes.MEAN
        }
        title = f"R = {s.acceleration} (true {s.true_acceleration:.2f})"
        found.append(
            (f"R2 on held-out subjects at {title}, 95 % bootstrap intervals.", figures.probe_bars(bars, title=title))
        )
    trained = scores[-1].probes[probes.TRAINED]
    names = list(trained)
    if len({len(p.truth) for p in trained.values()}) == 1:
        found.append(
            (
                f"Predicted against true at R = {scores[-1].acceleration}, trained encoder.",
                figures.probe_scatter(
                    np.stack([trained[n].predicted for n in names], 1),
                    np.stack([trained[n].truth for n in names], 1),
                    [probes.short(n).upper() for n in names],
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
