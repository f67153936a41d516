"""The ridge probe of frozen k-space embeddings on held-out subjects, beside the baselines that it has to beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import pipeline
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.order import permutation
from kmtr.encoder import KSpaceEncoder
from kmtr.metrics import Probe, bootstrap_r2, paired_bootstrap, probe
from kmtr.physics.sampling import VALIDATION
from kmtr.report.html import Cell, Table
from kmtr.types import PHENOTYPES, InputError

CHUNK = 32

TRAINED, UNTRAINED, RIDGE, MEAN = "k-MTR encoder", "untrained encoder", "ridge on low-res image", "mean"
CENTRAL = "ridge on central lines"

Features = Callable[[Batch], np.ndarray]
"""Batch -> float32 ``subject feature``."""


@dataclass(frozen=True)
class Scores:
    """Probes at one nominal acceleration: source of features -> target -> probe; and what was really sampled."""

    acceleration: int
    true_acceleration: float
    probes: dict[str, dict[str, Probe]]


def embedding(encoder: KSpaceEncoder) -> Features:
    """The frozen encoder's."""
    return lambda batch: encoder.embed(batch).float().cpu().numpy()


def score(
    config: RunConfig,
    dataset: Dataset,
    sources: Mapping[str, Features],
    progress: Callable[[int, int], None],
    device: torch.device,
) -> list[Scores]:
    """Fit probes on labelled training subjects and score them on the test split, at each `evaluate.accelerations`.

    Every source of features sees the same subjects and the same patterns.

    Raises:
        InputError: no test subjects, or none of the targets is labelled.
    """
    targets = [name for name in config.evaluate.targets if dataset.labels.get(name)]
    if not targets:
        wanted = ", ".join(config.evaluate.targets)
        raise InputError(
            f"evaluate.targets: expected at least one that the dataset has, got {wanted}; it has "
            f"{', '.join(dataset.labels) or 'no labels'}"
        )
    rows, readers = {}, {}
    for split, count in (("train", config.evaluate.labels), ("test", config.evaluate.subjects)):
        reader = dataset.reader(split, config.data)
        if len(reader) < 3:
            raise InputError(f"evaluate: expected at least 3 subjects in split {split}, got {len(reader)}")
        readers[split] = reader
        rows[split] = permutation(config.seed + 2, 0, len(reader))[:count].tolist()
    total = len(config.evaluate.accelerations) * sum(map(len, rows.values()))
    done, scores = 0, []
    for acceleration in config.evaluate.accelerations:
        fixed = override(config, {"sampling.accelerations": (acceleration,)})
        features: dict[str, dict[str, list[np.ndarray]]] = {}
        labels: dict[str, list[np.ndarray]] = {}
        lines = cells = 0
        for split in ("train", "test"):
            for host in pipeline.read_in_order(readers[split], rows[split], CHUNK, fixed, targets, VALIDATION):
                batch = host.to(device)
                for name, make in sources.items():
                    features.setdefault(name, {}).setdefault(split, []).append(make(batch))
                labels.setdefault(split, []).append(batch.labels.cpu().numpy())
                lines, cells = lines + int(batch.sampled.sum()), cells + int(batch.existing.sum())
                done += len(batch)
                progress(done, total)
        known = {split: np.concatenate(parts) for split, parts in labels.items()}
        probes: dict[str, dict[str, Probe]] = {}
        for name, parts in features.items():
            train, test = np.concatenate(parts["train"]), np.concatenate(parts["test"])
            for i, target in enumerate(targets):
                result = probe(train, known["train"][:, i], test, known["test"][:, i])
                if result is not None:
                    probes.setdefault(name, {})[target] = result
        probes[MEAN] = {
            target: Probe(p.truth, np.full_like(p.predicted, p.training_mean), p.training_mean)
            for target, p in next(iter(probes.values())).items()
        }
        scores.append(Scores(acceleration, cells / max(lines, 1), probes))
    return scores


def short(target: str) -> str:
    """``lvedv_ml`` -> ``lvedv``."""
    return target.rsplit("_", 1)[0]


def r2_table(scores: list[Scores], config: RunConfig) -> Table:
    """R2 with 95 % intervals: a row per acceleration and source of features."""
    targets = list(scores[0].probes[MEAN])
    rows: list[tuple[Cell, ...]] = []
    for s in scores:
        for name, probes in s.probes.items():
            cells: list[str] = []
            for target in targets:
                low, high = bootstrap_r2(probes[target], config.evaluate.bootstrap)
                cells.append(f"{probes[target].r2:.3f} [{low:.3f}, {high:.3f}]" if name != MEAN else "0.000")
            rows.append((s.acceleration, f"{s.true_acceleration:.2f}", name, *cells))
    return Table(
        f"R2 on {len(next(iter(scores[0].probes[MEAN].values())).truth)} held-out subjects, ridge probe, "
        f"95 % bootstrap intervals; patterns of family {config.sampling.family}",
        ("R", "true R", "features", *(short(t).upper() for t in targets)),
        tuple(rows),
    )


def gain_table(scores: list[Scores], config: RunConfig) -> Table:
    """Paired differences of R2 between the trained encoder and each baseline, over the same held-out subjects."""
    targets = list(scores[0].probes[MEAN])
    rows: list[tuple[Cell, ...]] = []
    for s in scores:
        for name in (UNTRAINED, RIDGE):
            cells = []
            for target in targets:
                trained, other = s.probes[TRAINED][target], s.probes[name][target]
                low, high = paired_bootstrap(trained, other, config.evaluate.bootstrap)
                cells.append(f"{trained.r2 - other.r2:+.3f} [{low:+.3f}, {high:+.3f}]")
            rows.append((s.acceleration, f"over {name}", *cells))
    return Table(
        "Gain of the trained encoder (difference of R2, paired 95 % bootstrap; above 0 = the encoder wins)",
        ("R", "gain", *(short(t).upper() for t in targets)),
        tuple(rows),
    )


def error_table(scores: list[Scores]) -> Table:
    """Mean absolute errors in physical units."""
    targets = list(scores[0].probes[MEAN])
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (s.acceleration, name, *(round(probes[t].mae, 2) for t in targets))
        for s in scores
        for name, probes in s.probes.items()
    )
    columns = tuple(f"{short(t).upper()} ({PHENOTYPES[t]})" for t in targets)
    return Table("Mean absolute error", ("R", "features", *columns), rows, digits=2)


def metrics_of(scores: list[Scores], config: RunConfig) -> dict[str, float]:
    """Metrics of the last line: R2 at the highest acceleration that training drew (else the first evaluated)."""
    trained_at = [s for s in scores if s.acceleration in config.sampling.accelerations] or scores[:1]
    s = max(trained_at, key=lambda one: one.acceleration)
    metrics: dict[str, float] = {"acceleration": float(s.acceleration), "true_acceleration": s.true_acceleration}
    for target in s.probes[MEAN]:
        for suffix, name in (("", TRAINED), ("_untrained", UNTRAINED), ("_ridge", RIDGE), ("_mean", MEAN)):
            metrics[f"{short(target)}_r2{suffix}"] = s.probes[name][target].r2
        low, high = paired_bootstrap(s.probes[TRAINED][target], s.probes[UNTRAINED][target], config.evaluate.bootstrap)
        metrics[f"{short(target)}_gain_low"], metrics[f"{short(target)}_gain_high"] = low, high
    return metrics
