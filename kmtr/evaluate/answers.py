"""Choice of the labels that a fine-tuned model answers with the areas of its own masks: those that it so tells better
than by its heads alone, on validation subjects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from kmtr import area_maps
from kmtr.area_maps import AreaMaps
from kmtr.evaluate import predictions
from kmtr.evaluate.predictions import HeldOut, Name
from kmtr.evaluate.scores import Panel, panel
from kmtr.metrics.areas import AreaMap
from kmtr.metrics.diseases import detection
from kmtr.metrics.ridge import Ridge, fit_ridge
from kmtr.types import DISEASES

MIN_KNOWN, MIN_CLASS = 30, 10
"""Validation subjects with a phenotype, and with and without a disease, below which they choose nothing: the heads
answer. (23 of them chose what was worse on test subjects, mean R2 .69 against .72.)
"""


@dataclass(frozen=True)
class Choice:
    """Who answers a label.

    Attributes:
        subjects: validation subjects of whom both say it.
        head, areas: R2 about their mean, or AUROC, the mean over R; of phenotypes `areas` is what areas and head say
            together. NaN: too few subjects.
        blends: R -> regression of a phenotype from both.
    """

    label: str
    subjects: int
    head: float
    areas: float
    blends: Mapping[int, Ridge] = field(default_factory=dict)

    @property
    def by_areas(self) -> bool:
        """True where areas are better than the head, and than saying the same of everybody."""
        return self.areas > max(self.head, 0.5 if self.label in DISEASES else 0.0)

    @property
    def compared(self) -> str:
        """Both scores in words."""
        if not np.isfinite(self.areas):
            return f"{self.subjects} subjects, too few to compare"
        return f"{self.areas:.2f}, {self.head:.2f} of {self.subjects}"


def choose(validation: pa.Table, ours: Name, labels: Sequence[str]) -> list[Choice]:
    """Compare both for each label that areas say at all. For a phenotype areas and head are stacked (Wolpert 1992): the
    masks know volumes, the head what their blur in time hides.

    Args:
        validation: rows of validation subjects.
        ours: name of the model in them.
        labels: that the model answers.
    """
    there = {*pc.unique(validation.column("target")).to_pylist()}
    found = []
    for label in (one for one in labels if one in there):
        seen = panel(validation, targets=(label,))
        head, areas = _both(seen, ours)
        if not np.isfinite(areas).any():
            continue
        truth = seen.truth[:, 0]
        known = np.isfinite(truth) & np.isfinite(head).all(0) & np.isfinite(areas).all(0)
        truth, head, areas = truth[known], head[:, known], areas[:, known]
        blends: dict[int, Ridge] = {}
        if label not in DISEASES and len(truth) >= MIN_KNOWN:
            each = zip(seen.accelerations, areas, head, strict=True)
            blends = {r: fit_ridge(np.stack([one, other], axis=1), truth) for r, one, other in each}
            areas = _blended(seen.accelerations, areas, head, blends)
        found.append(Choice(label, len(truth), _score(label, truth, head), _score(label, truth, areas), blends))
    return found


def rows(table: pa.Table, ours: Name, choices: Sequence[Choice]) -> pa.Table:
    """Rows of the phenotypes that areas and head answer together (`predictions.together`), of all subjects of a table
    of whom both say them.
    """
    chosen = [one for one in choices if one.by_areas and one.blends]
    parts = []
    for one in chosen:
        seen = panel(table, targets=(one.label,))
        head, areas = _both(seen, ours)
        said = _blended(seen.accelerations, areas, head, one.blends)
        (fit,) = (fit for fit in seen.values if fit.name == ours)
        held_out = HeldOut(seen.subjects, seen.targets, seen.truth)
        for number, r in enumerate(seen.accelerations):
            about: dict[str, Any] = {"acceleration": r, "seed": fit.seed, "labels": fit.labels}
            true = seen.true_acceleration[number]
            name = predictions.together(ours)
            parts.append(predictions.rows(name, held_out, said[number][:, None], true_acceleration=true, **about))
    return predictions.joined(parts)


def _both(seen: Panel, ours: Name) -> list[Float[np.ndarray, "acceleration subject"]]:
    """One label by the head and by areas; NaN where they say nothing."""
    values = {fit.name: said[..., 0] for fit, said in seen.values.items()}
    nothing = np.full((len(seen.accelerations), len(seen.subjects)), np.nan)
    return [values.get(name, nothing) for name in (ours, predictions.by_areas(ours))]


def _blended(
    accelerations: Sequence[int],
    areas: Float[np.ndarray, "acceleration subject"],
    head: Float[np.ndarray, "acceleration subject"],
    blends: Mapping[int, Ridge],
) -> Float[np.ndarray, "acceleration subject"]:
    each = zip(accelerations, areas, head, strict=True)
    return np.stack([blends[r](np.stack([one, other], axis=1)) for r, one, other in each])


def _score(label: str, truth: np.ndarray, said: np.ndarray) -> float:
    """Mean over R; NaN where there are too few subjects."""
    if label in DISEASES:
        if min(np.sum(truth == 1), np.sum(truth == 0)) < MIN_CLASS:
            return float("nan")
        return float(np.mean([detection(truth, one, float("nan")).auroc for one in said]))
    spread = np.sum((truth - truth.mean()) ** 2) if len(truth) >= MIN_KNOWN else 0.0
    return float(1 - np.mean(np.sum((said - truth) ** 2, axis=1)) / spread) if spread > 0 else float("nan")


def keep(model: Path, maps: Mapping[int, AreaMap], validation: pa.Table, choices: Sequence[Choice]) -> str:
    """Put the maps beside a model where they answer any label; a line about who answers what, empty where nothing was
    compared.

    Args:
        maps: of each nominal R.
        validation: rows of the subjects who chose.
    """
    if not choices:
        return ""
    areas, heads = ([one for one in choices if one.by_areas is better] for better in (True, False))
    if areas:
        seen = panel(validation, tuple(maps))
        true = {r: seen.true_acceleration_at(number) for number, r in enumerate(seen.accelerations)}
        blends = {r: {one.label: one.blends[r] for one in areas if one.blends} for r in maps}
        area_maps.export(model, AreaMaps(maps, true, tuple(one.label for one in areas), blends))
    parts = [
        f"{who} {', '.join(f'{one.label} ({one.compared})' for one in some)}"
        for who, some in (("areas of its masks help to answer", areas), ("its heads alone answer", heads))
        if some
    ]
    return f"{'; '.join(parts)} (R2 or AUROC of validation subjects, mean over R: with areas, by head)"
