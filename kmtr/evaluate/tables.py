"""Tables and metrics of an evaluation, computed from the rows of its predictions alone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from kmtr.config import RunConfig
from kmtr.evaluate.predictions import MEAN, MEAN_MASK, RIDGE, TRAINED, UNTRAINED, Name
from kmtr.evaluate.scores import Scores, panel
from kmtr.metrics import bootstrap_r2, paired_bootstrap
from kmtr.metrics.dense import DICE, IMAGES, IN_BOX, PHASES
from kmtr.report.html import Cell, Table
from kmtr.types import PHENOTYPES, SEGMENTATION_CLASSES


def short(target: str) -> str:
    """Name of a phenotype without its unit: ``lvedv_ml`` -> ``lvedv``."""
    return target.rsplit("_", 1)[0]


def r2_table(scores: list[Scores], config: RunConfig) -> Table:
    """R2 with 95 % intervals: a row per acceleration and source of features; empty where a system says nothing of a
    target, as what is measured on masks, or a model of other targets.
    """
    targets = list(scores[0].probes[MEAN])
    rows: list[tuple[Cell, ...]] = []
    for s in scores:
        for name, probes in s.probes.items():
            cells: list[str] = []
            for target in targets:
                if target not in probes:  # phenotypes that are measured on masks are others than a model is asked for
                    cells.append("–")
                    continue
                low, high = bootstrap_r2(probes[target], config.evaluate.bootstrap)
                few = _fewer(s, name, target)
                cells.append(f"{probes[target].r2:.3f} [{low:.3f}, {high:.3f}]{few}" if name != MEAN else "0.000")
            rows.append((s.acceleration, f"{s.true_acceleration:.2f}", name.title, *cells))
    return Table(
        f"R2 on {len(next(iter(scores[0].probes[MEAN].values())).truth)} held-out subjects, "
        f"95 % bootstrap intervals; patterns of family {config.sampling.family}",
        ("R", "true R", "system", *(short(t).upper() for t in targets)),
        tuple(rows),
    )


def _fewer(scores: Scores, name: Name, target: str) -> str:
    """Number of subjects of a score, where it is of fewer than the mean's: it was measured on masks."""
    count, every = (len(scores.probes[who][target].truth) for who in (name, MEAN))
    return f" (n = {count})" if count < every else ""


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
            rows.append((s.acceleration, f"over {name.title}", *cells))
    return Table(
        "Gain of the trained encoder (difference of R2, paired 95 % bootstrap; above 0 = the encoder wins)",
        ("R", "gain", *(short(t).upper() for t in targets)),
        tuple(rows),
    )


def error_table(scores: list[Scores]) -> Table:
    """Mean absolute errors in physical units."""
    targets = list(scores[0].probes[MEAN])

    def cell(s: Scores, name: Name, target: str) -> Cell:
        if target not in s.probes[name]:
            return None
        mae, few = s.probes[name][target].mae, _fewer(s, name, target)
        return f"{mae:.2f}{few}" if few else round(mae, 2)

    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (s.acceleration, name.title, *(cell(s, name, t) for t in targets)) for s in scores for name in s.probes
    )
    columns = tuple(f"{short(t).upper()} ({PHENOTYPES[t]})" for t in targets)
    return Table("Mean absolute error", ("R", "system", *columns), rows, digits=2)


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


# -------------------------------------------------------------------------------------------------------------- masks


def mean_dice(table: pa.Table) -> list[tuple[int, float, dict[Name, np.ndarray]]]:
    """R, true R, and `DICE` of each system, mean over the subjects that have the class.

    Empty where no masks were scored; NaN: no subject has the class.
    """
    seen = panel(table, targets=DICE)
    found: list[tuple[int, float, dict[Name, np.ndarray]]] = []
    for number, r in enumerate(seen.accelerations):
        means = {
            fit.name: np.array(
                [np.mean(v[np.isfinite(v)]) if np.isfinite(v).any() else np.nan for v in values[number].T]
            )
            for fit, values in seen.values.items()
            if np.isfinite(values).any()
        }
        if means:
            found.append((r, seen.true_acceleration_at(number), means))
    return found


def mask_table(dice: list[tuple[int, float, dict[Name, np.ndarray]]]) -> Table:
    """Dice of each class at end-diastole and end-systole: a row per acceleration and system; the mean mask, which needs
    no input, once.
    """
    rows: list[tuple[Cell, ...]] = [
        ("any", "", MEAN_MASK.title, *_cells(means[MEAN_MASK])) for _, _, means in dice[:1] if MEAN_MASK in means
    ]
    for r, true, means in dice:
        rows += [(r, f"{true:.2f}", name.title, *_cells(found)) for name, found in means.items() if name != MEAN_MASK]
    return Table(
        "Dice at the truth's end-diastole / end-systole, mean over held-out subjects",
        ("R", "true R", "system", *SEGMENTATION_CLASSES[1:], "mean"),
        tuple(rows),
    )


def _cells(scores: np.ndarray) -> list[str]:
    phases = scores.reshape(len(PHASES), -1)
    both = [*phases.T, [np.nanmean(phase) if np.isfinite(phase).any() else np.nan for phase in phases]]
    return [" / ".join(f"{value:.3f}" if np.isfinite(value) else "-" for value in pair) for pair in both]


def image_table(table: pa.Table) -> Table:
    """PSNR, SSIM and NMSE, on the field of view and on the heart's box: a row per acceleration and system."""
    seen = panel(table, targets=(*IMAGES, *IN_BOX))
    rows: list[tuple[Cell, ...]] = []
    for number, r in enumerate(seen.accelerations):
        for fit, values in seen.values.items():
            if np.isfinite(values[number]).any():
                means = [np.nanmean(v) if np.isfinite(v).any() else np.nan for v in values[number].T]
                cells = [f"{value:.2f}" if i % 3 == 0 else f"{value:.4f}" for i, value in enumerate(means)]
                rows.append((r, f"{seen.true_acceleration_at(number):.2f}", fit.name.title, *cells))
    columns = ("PSNR (dB)", "SSIM", "NMSE")
    return Table(
        "Images on the field of view, and on the heart's box, mean over held-out subjects",
        ("R", "true R", "system", *columns, *(f"{name}, heart" for name in columns)),
        tuple(rows),
    )
