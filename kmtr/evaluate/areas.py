"""Phenotypes from masks by a linear map: what masks are worth where formulas of volumes ask too much of them.

The map is fitted on the masks that a system predicts of labelled subjects, at the R at which it is asked: so it knows
how they err. A formula takes every error of a mask as it is, and the ejection fraction the difference of two; masks
from few lines are blurred in time, all in the same direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kmtr.config import Data
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.device import HostBatch
from kmtr.evaluate.predictions import Name
from kmtr.metrics.dense import Pair
from kmtr.metrics.ridge import MIN_LABELLED, Ridge, fit_ridges
from kmtr.tasks.views import views_of
from kmtr.types import SEGMENTATION_CLASSES, UNLABELLED, VIEWS

MOST = 200
"""Labelled subjects that it is fitted on at most: masks of all frames take long."""
HARMONICS = 2
"""Harmonics of the cycle that count beside the mean over it."""
CLASSES = np.arange(1, len(SEGMENTATION_CLASSES))

Masks = Callable[[Batch], Mapping[str, Tensor]]
"""Batch -> ``masks`` uint8 ``batch slice t y x`` among other outputs."""


@dataclass(frozen=True)
class AreaMap:
    """Ridge regressions from areas of classes in every slice over the cycle.

    Attributes:
        slices: view -> slices of it that the configuration has.
        shown: features that count: those that most of the labelled subjects have, and in which they differ.
    """

    slices: Mapping[str, int]
    shown: Bool[np.ndarray, " feature"]
    ridges: Mapping[str, Ridge]

    @classmethod
    def fit(
        cls,
        slices: Mapping[str, int],
        seen: Float[np.ndarray, "subject feature"],
        labels: Float[np.ndarray, "subject target"],
        targets: Sequence[str],
    ) -> AreaMap | None:
        """On labelled subjects; None where fewer than 3 have all that counts.

        Args:
            seen: `areas` of their predicted masks.
            labels: NaN: unknown.
            targets: names of the labels, which it is to say.
        """
        there = np.isfinite(seen)
        shown = there.mean(0) >= 0.5
        known = there[:, shown].all(1) & bool(shown.any())
        if known.sum() < MIN_LABELLED:
            return None
        shown[shown] = np.ptp(seen[known][:, shown], axis=0) > 0
        if not shown.any():  # all masks are alike: what is left of a regression is the mean
            return cls(slices, shown, _means(labels[known], targets))
        return cls(slices, shown, fit_ridges(seen[known][:, shown], labels[known], targets))

    def __call__(self, views: Mapping[str, Pair]) -> dict[str, float]:
        """Phenotypes of one subject by its predicted masks; NaN where an area that counts is unknown."""
        seen = areas(views, self.slices)
        return {name: float(ridge(seen[None, self.shown])[0]) for name, ridge in self.ridges.items()}


def seen_by(
    data: Data, predictors: Mapping[Name, Masks], batches: Iterable[HostBatch], device: torch.device
) -> dict[Name, Float[np.ndarray, "subject feature"]]:
    """`areas` of the masks of each predictor.

    Args:
        batches: subjects with masks' columns, at one R.
    """
    slices, found = slices_of(data), {name: list[np.ndarray]() for name in predictors}
    for host in batches if predictors else ():
        batch = host.to(device)
        for name, predictor in predictors.items():
            masks = predictor(batch)["masks"]
            found[name] += [areas(views, slices) for views in views_of(batch, data, masks, masks)]
    return {name: np.stack(some) for name, some in found.items() if some}


def fit_maps(
    data: Data,
    seen: Mapping[Name, Float[np.ndarray, "subject feature"]],
    labels: Float[np.ndarray, "subject target"],
    targets: Sequence[str],
) -> dict[Name, AreaMap]:
    """The map of each predictor; none of one whose masks say too little.

    Args:
        seen: of labelled subjects (`seen_by`).
        labels: NaN: unknown.
    """
    fitted = {name: AreaMap.fit(slices_of(data), some, labels, targets) for name, some in seen.items()}
    return {name: one for name, one in fitted.items() if one is not None}


def _means(labels: Float[np.ndarray, "subject target"], targets: Sequence[str]) -> dict[str, Ridge]:
    """Regressions on nothing."""
    nothing, enough = np.zeros(0), np.isfinite(labels).sum(0) >= MIN_LABELLED
    means = {name: np.nanmean(labels[:, i]) for i, name in enumerate(targets) if enough[i]}
    return {name: Ridge(nothing, nothing, nothing, float(mean), np.inf) for name, mean in means.items()}


def slices_of(data: Data) -> dict[str, int]:
    """Slices of each view of the configuration."""
    names = [VIEWS[view] for view in data.view_types]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def areas(views: Mapping[str, Pair], slices: Mapping[str, int]) -> Float[np.ndarray, " feature"]:
    """Areas in mm2 of every class in every slice of the predicted masks over the cycle: their mean, and cosine and sine
    of their first `HARMONICS` harmonics; view by view ``slice part class``.

    NaN where a subject lacks the view or slice, or the size of its pixels is unknown, and of slices with an UNLABELLED
    pixel.
    """
    parts = []
    for view, count in slices.items():
        found = np.full((count, 1 + 2 * HARMONICS, len(CLASSES)), np.nan)
        pair = views.get(view)
        if pair is not None and pair.spacing_mm is not None:
            _, height, width = pair.spacing_mm
            mask = pair.predicted[:count]
            pixels = (mask[..., None] == CLASSES).sum((2, 3)).astype(float)
            pixels[(mask == UNLABELLED).any((1, 2, 3))] = np.nan
            found[: len(mask)] = _cycle(pixels * (height * width))
        parts.append(found.ravel())
    return np.concatenate(parts)


def _cycle(values: Float[np.ndarray, "slice t class"]) -> Float[np.ndarray, "slice part class"]:
    """Mean and harmonics over the frames; zero where there are too few frames for one."""
    found = np.fft.rfft(values, axis=1)[:, : HARMONICS + 1] / max(1, values.shape[1])
    found = np.pad(found, ((0, 0), (0, HARMONICS + 1 - found.shape[1]), (0, 0)))
    return np.concatenate([found.real, found.imag[:, 1:]], axis=1)
