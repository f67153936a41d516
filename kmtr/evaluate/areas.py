"""Phenotypes from masks by a linear map: what masks are worth where formulas of volumes ask too much of them.

The map is fitted on true masks of labelled subjects and given predicted ones. A formula takes every error of a mask as
it is, and the ejection fraction the difference of two; the map weighs the areas of all classes and slices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float

from kmtr.config import Data, RunConfig
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import Wanted
from kmtr.data.loader.order import permutation
from kmtr.metrics.dense import Pair
from kmtr.metrics.ridge import MIN_LABELLED, Ridge, fit_ridges
from kmtr.metrics.segmentation import LV_CAVITY, extreme_frames
from kmtr.tasks.views import views_of
from kmtr.types import SEGMENTATION_CLASSES, UNLABELLED, VIEWS

MOST = 800
"""Labelled subjects that it is fitted on at most."""
CHUNK = 32
CLASSES = np.arange(1, len(SEGMENTATION_CLASSES))


@dataclass(frozen=True)
class AreaMap:
    """Ridge regressions from areas of classes in every slice, at the masks' own end-diastole and end-systole.

    Attributes:
        slices: view -> slices of it that the configuration has.
        shown: features that count: those that most of the labelled subjects have.
    """

    slices: Mapping[str, int]
    shown: Bool[np.ndarray, " feature"]
    ridges: Mapping[str, Ridge]

    @classmethod
    def fit(cls, config: RunConfig, reader: Reader, rows: Sequence[int], targets: Sequence[str]) -> AreaMap | None:
        """On the true masks of these training subjects, of `MOST` at most, drawn by the seed; None where fewer than 3
        have them.

        Args:
            targets: labels that it is to say.
        """
        some = [rows[i] for i in sorted(permutation(config.seed, 0, len(rows))[:MOST])]
        slices = slices_of(config.data)
        found: list[np.ndarray] = []
        for host in pipeline.read_in_order(reader, some, CHUNK, config, Wanted(masks=True)):
            batch = host.to(torch.device("cpu"))
            assert batch.masks is not None
            found += [of_truth(views, slices) for views in views_of(batch, config.data, batch.masks, batch.masks)]
        seen = np.stack(found)
        there = np.isfinite(seen)
        shown = there[there.any(1)].mean(0) >= 0.5 if there.any() else there.any(0)
        known = there[:, shown].all(1) & bool(shown.any())
        if known.sum() < MIN_LABELLED:
            return None
        labels = subjects.labels_of(reader, some, targets)[known]
        return cls(slices, shown, fit_ridges(seen[known][:, shown], labels, targets))

    def __call__(self, views: Mapping[str, Pair]) -> dict[str, float]:
        """Phenotypes of one subject by its predicted masks; NaN where an area that counts is unknown."""
        seen = of_predicted(views, self.slices)
        return {name: float(ridge(seen[None, self.shown])[0]) for name, ridge in self.ridges.items()}


def slices_of(data: Data) -> dict[str, int]:
    """Slices of each view of the configuration."""
    names = [VIEWS[view] for view in data.view_types]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def of_truth(views: Mapping[str, Pair], slices: Mapping[str, int]) -> Float[np.ndarray, " feature"]:
    """Areas in mm2 of every class in every slice of the true masks, at the frames of the largest and the smallest LV
    cavity of the view: view by view ``slice phase class``.

    NaN where a subject lacks the view or slice or the size of its pixels is unknown, of slices with an UNLABELLED
    pixel, of classes that the source does not draw, and of a view in which it does not draw the cavity.
    """
    parts = []
    for view, count in slices.items():
        areas = np.full((count, 2, len(CLASSES)), np.nan)
        pair = views.get(view)
        if pair is not None and pair.spacing_mm is not None:
            _, height, width = pair.spacing_mm
            areas[: len(pair.truth)] = _areas(pair)[:count] * (height * width)
        parts.append(areas.ravel())
    return np.concatenate(parts)


def of_predicted(views: Mapping[str, Pair], slices: Mapping[str, int]) -> Float[np.ndarray, " feature"]:
    """`of_truth` of the predicted masks, in which every class can be."""
    return of_truth(
        {view: Pair(pair.predicted, pair.predicted, None, pair.spacing_mm) for view, pair in views.items()}, slices
    )


def _areas(pair: Pair) -> Float[np.ndarray, "slice phase class"]:
    """Pixels of every class at both extremes."""
    mask, drawn = pair.truth, CLASSES if pair.contoured is None else np.array(sorted(pair.contoured), int)
    frames = extreme_frames(mask)
    if frames is None:  # no cavity is there, or nobody knows
        known = LV_CAVITY in drawn and not (mask == UNLABELLED).any()
        return np.full((len(mask), 2, len(CLASSES)), 0.0 if known else np.nan)
    shown = mask[:, frames]
    pixels = (shown[..., None] == CLASSES).sum((2, 3)).astype(float)
    pixels[(shown == UNLABELLED).any((1, 2, 3))] = np.nan
    pixels[..., ~np.isin(CLASSES, drawn)] = np.nan
    return pixels
