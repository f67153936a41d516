"""Which labels a fine-tuned model answers by the areas of its own masks: those that these tell better than its heads,
on validation subjects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kmtr import area_maps
from kmtr.area_maps import AreaMaps
from kmtr.evaluate import predictions
from kmtr.evaluate.predictions import Name
from kmtr.evaluate.scores import panel
from kmtr.metrics.areas import AreaMap
from kmtr.metrics.diseases import detection
from kmtr.types import DISEASES

MIN_KNOWN = 10
"""Validation subjects with a label (with and without a disease), below which they do not choose: the heads answer."""


@dataclass(frozen=True)
class Choice:
    """Who answers a label.

    Attributes:
        subjects: validation subjects that both say it of.
        head, areas: R2 about their mean, or AUROC, the mean over R; NaN: too few subjects.
    """

    label: str
    subjects: int
    head: float
    areas: float

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
    """Compare both for each label that areas say at all.

    Args:
        validation: rows of validation subjects.
        ours: name of the model in them.
        labels: that the model answers.
    """
    there = {*pc.unique(validation.column("target")).to_pylist()}
    found = []
    for label in (one for one in labels if one in there):
        seen = panel(validation, targets=(label,))
        values = {fit.name: said[..., 0] for fit, said in seen.values.items()}
        nothing = np.full((len(seen.accelerations), len(seen.subjects)), np.nan)
        head, areas = (values.get(name, nothing) for name in (ours, predictions.by_areas(ours)))
        if not np.isfinite(areas).any():
            continue
        truth = seen.truth[:, 0]
        known = np.isfinite(truth) & np.isfinite(head).all(0) & np.isfinite(areas).all(0)
        scores = (_score(label, truth[known], said[:, known]) for said in (head, areas))
        found.append(Choice(label, int(known.sum()), *scores))
    return found


def _score(label: str, truth: np.ndarray, said: np.ndarray) -> float:
    """Mean over R; NaN where there are too few subjects."""
    if label in DISEASES:
        if min(np.sum(truth == 1), np.sum(truth == 0)) < MIN_KNOWN:
            return float("nan")
        return float(np.mean([detection(truth, one, float("nan")).auroc for one in said]))
    spread = np.sum((truth - truth.mean()) ** 2) if len(truth) >= MIN_KNOWN else 0.0
    return float(1 - np.mean(np.sum((said - truth) ** 2, axis=1)) / spread) if spread > 0 else float("nan")


def keep(model: Path, maps: Mapping[int, AreaMap], validation: pa.Table, ours: Name, labels: Sequence[str]) -> str:
    """Put the maps beside a model where they answer any label; a line about who answers what, empty where there is
    nothing to compare.

    Args:
        maps: of each nominal R.
        validation, ours, labels: as of `choose`.
    """
    choices = choose(validation, ours, labels)
    if not choices:
        return ""
    areas, heads = ([one for one in choices if one.by_areas is better] for better in (True, False))
    if areas:
        seen = panel(validation, tuple(maps))
        true = {r: seen.true_acceleration_at(number) for number, r in enumerate(seen.accelerations)}
        area_maps.export(model, AreaMaps(maps, true, tuple(one.label for one in areas)))
    parts = [
        f"{who} {', '.join(f'{one.label} ({one.compared})' for one in some)}"
        for who, some in (("areas of its masks answer", areas), ("its heads answer", heads))
        if some
    ]
    return f"{'; '.join(parts)} (R2 or AUROC of validation subjects, mean over R: by areas, by head)"
