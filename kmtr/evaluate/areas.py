"""Phenotypes from masks by a linear map: what masks are worth where formulas of volumes ask too much of them.

The map is fitted on true masks of labelled subjects and given predicted ones. A formula takes every error of a mask as
it is, and the ejection fraction the difference of two; the map weighs the areas of all classes and slices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Integer

from kmtr.config import Data, RunConfig
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import Wanted
from kmtr.metrics.dense import Pair
from kmtr.metrics.ridge import MIN_LABELLED, Ridge, fit_ridges
from kmtr.metrics.segmentation import extreme_frames
from kmtr.tasks.views import views_of
from kmtr.types import SEGMENTATION_CLASSES, UNLABELLED, VIEWS

MOST = 800
"""Labelled subjects that it is fitted on at most."""
CHUNK = 32


@dataclass(frozen=True)
class AreaMap:
    """Ridge regressions from areas of classes in every slice, at the masks' own end-diastole and end-systole.

    Attributes:
        slices: view -> slices of it that the configuration has.
    """

    slices: Mapping[str, int]
    ridges: Mapping[str, Ridge]

    @classmethod
    def fit(cls, config: RunConfig, reader: Reader, rows: Sequence[int], targets: Sequence[str]) -> AreaMap | None:
        """On the true masks of these training subjects, `MOST` at most; None where fewer than 3 have them.

        Args:
            targets: labels that it is to say.
        """
        some = list(rows)[:MOST]
        slices = slices_of(config.data)
        read = pipeline.read_in_order(reader, some, CHUNK, config, Wanted(masks=True))
        found: list[np.ndarray] = []
        for host in read:
            batch = host.to(torch.device("cpu"))
            assert batch.masks is not None
            views = views_of(batch, config.data, batch.masks, batch.masks)
            found += [features({name: pair.truth for name, pair in each.items()}, each, slices) for each in views]
        seen = np.stack(found)
        known = np.isfinite(seen).all(1)
        if known.sum() < MIN_LABELLED:
            return None
        labels = subjects.labels_of(reader, some, targets)[known]
        return cls(slices, fit_ridges(seen[known], labels, targets))

    def __call__(self, views: Mapping[str, Pair]) -> dict[str, float]:
        """Phenotypes of one subject by its predicted masks; NaN where a pixel of them is UNLABELLED."""
        seen = features({name: pair.predicted for name, pair in views.items()}, views, self.slices)
        return {name: float(ridge(seen[None])[0]) for name, ridge in self.ridges.items()}


def slices_of(data: Data) -> dict[str, int]:
    """Slices of each view of the configuration."""
    names = [VIEWS[view] for view in data.view_types]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def features(
    masks: Mapping[str, Integer[np.ndarray, "slice t y x"]], views: Mapping[str, Pair], slices: Mapping[str, int]
) -> Float[np.ndarray, " feature"]:
    """Areas in mm2 (in pixels where their size is unknown) of every class in every slice, at the frames of the largest
    and the smallest LV cavity of the view: view by view ``slice phase class``, 0 where there is none. Those of a slice
    with an UNLABELLED pixel are NaN, and of a view that shows no cavity in what is labelled.
    """
    parts = []
    for view, count in slices.items():
        areas = np.zeros((count, 2, len(SEGMENTATION_CLASSES) - 1))
        mask = masks.get(view)
        frames = None if mask is None else extreme_frames(mask)
        if mask is not None and frames is None and (mask == UNLABELLED).any():
            areas[:] = np.nan
        elif mask is not None and frames is not None:
            shown = mask[:count, frames]
            spacing = views[view].spacing_mm
            size = 1.0 if spacing is None else spacing[1] * spacing[2]
            classes = np.arange(1, len(SEGMENTATION_CLASSES))
            areas[: len(shown)] = (shown[..., None] == classes).sum((2, 3)) * size
            areas[: len(shown)][(shown == UNLABELLED).any((1, 2, 3))] = np.nan
        parts.append(areas.ravel())
    return np.concatenate(parts)
