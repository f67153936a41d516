"""Thresholds from which on a subject is called diseased: chosen on validation subjects.

A run keeps their predictions in a file of their own, so that no table of the test split can hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from kmtr.evaluate.predictions import Name
from kmtr.evaluate.scores import Fit, Panel, panel
from kmtr.metrics import best_f1_threshold
from kmtr.report.contact import title_of

FILE = "validation.parquet"
"""Predictions of validation subjects (`predictions.SCHEMA`), in a run's folder."""
MIN_CLASS = 3
"""Validation subjects with a disease, and without it, below which no threshold is chosen."""


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of each system, R and disease, and of whom they were chosen.

    Attributes:
        values: NaN: none was chosen.
        diseased, known: validation subjects that have the disease, and those of whom it is known, by its name; empty
            without predictions of validation subjects.
    """

    values: Mapping[Fit, Float[np.ndarray, "acceleration target"]]
    diseased: Mapping[str, int]
    known: Mapping[str, int]

    def of(self, name: Name, acceleration: int, target: str, seen: Panel) -> float:
        """Threshold of one system, R and disease of the panel that they were chosen for."""
        (values,) = (values for fit, values in self.values.items() if fit.name == name)
        return float(values[seen.accelerations.index(acceleration), seen.targets.index(target)])

    def note(self) -> str:
        """Sentence on the choice, with the numbers of validation subjects."""
        if not self.known:
            return "No F1: its threshold is chosen on validation subjects, of whom no predictions are kept."
        said = {
            target: f"{title_of(target)} {self.diseased[target]} of {known}" for target, known in self.known.items()
        }
        enough = [text for target, text in said.items() if self.chosen(target)]
        few = [text for target, text in said.items() if not self.chosen(target)]
        found = []
        if enough:
            found += [
                "F1: at the threshold with the highest F1 on validation subjects (the lowest of several), for each "
                f"system that says it of these, R and disease; diseased of validation subjects: {', '.join(enough)}."
            ]
        if few:
            found += [
                f"No F1 where fewer than {MIN_CLASS} validation subjects have, or lack, the disease: {', '.join(few)}."
            ]
        return " ".join(found)

    def chosen(self, target: str) -> bool:
        """True if there are enough validation subjects for a threshold of this disease."""
        diseased, known = self.diseased.get(target, 0), self.known.get(target, 0)
        return min(diseased, known - diseased) >= MIN_CLASS


def choose(seen: Panel, validation: pa.Table | None) -> Thresholds:
    """Thresholds for the systems, R and diseases of a panel.

    Args:
        validation: rows of validation subjects; None: there are none, and no threshold is chosen.
    """
    shape = len(seen.accelerations), len(seen.targets)
    none = np.full(shape, np.nan)
    if validation is None:
        return Thresholds(dict.fromkeys(seen.values, none), {}, {})
    held_out = panel(validation, seen.accelerations, seen.targets)
    diseased = {t: int(np.nansum(held_out.truth[:, i])) for i, t in enumerate(seen.targets)}
    known = {t: int(np.isfinite(held_out.truth[:, i]).sum()) for i, t in enumerate(seen.targets)}
    found = Thresholds({fit: none.copy() for fit in seen.values}, diseased, known)
    for fit in seen.values.keys() & held_out.values.keys():
        for r, i in np.ndindex(shape):
            truth, score = held_out.truth[:, i], held_out.values[fit][r, :, i]
            said = np.isfinite(score) | (not fit.name.measured)  # areas of masks may lack subjects
            if found.chosen(seen.targets[i]):
                found.values[fit][r, i] = best_f1_threshold(truth[said], score[said])
    return found


def called(seen: Panel, thresholds: Thresholds) -> Panel:
    """The panel with 1 in place of scores at or above their threshold, 0 below; NaN where there is none."""
    values = {}
    for fit, scores in seen.values.items():
        limit = thresholds.values[fit][:, None]
        values[fit] = np.where(np.isnan(scores) | np.isnan(limit), np.nan, (scores >= limit).astype(np.float64))
    return replace(seen, values=values)
