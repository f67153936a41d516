"""Phenotypes from masks by a linear map, and diseases from these: what masks are worth where formulas of volumes ask
too much of them.

The map is fitted on the masks that a system predicts of labelled subjects, at the R at which it is asked: so it knows
how they err. A formula takes every error of a mask as it is, and the ejection fraction the difference of two; masks
from few lines are blurred in time, all in the same direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from kmtr.metrics.dense import Pair
from kmtr.metrics.from_phenotypes import Regressions
from kmtr.metrics.phenotypes import MIN_LABELLED
from kmtr.metrics.ridge import Ridge, fit_ridges
from kmtr.types import SEGMENTATION_CLASSES, UNLABELLED

HARMONICS = 2
"""Harmonics of the cycle that count beside the mean over it."""
CLASSES = np.arange(1, len(SEGMENTATION_CLASSES))
NO_DISEASES = Regressions((), {})


@dataclass(frozen=True)
class AreaMap:
    """Ridge regressions from areas of classes in every slice over the cycle, and what their answers say of diseases.

    Attributes:
        slices: view -> slices of it that the configuration has.
        shown: features that count: those that most of the labelled subjects have, and in which they differ.
        ridges: by phenotype.
        diseases: from true phenotypes, asked with those that the ridges say.
    """

    slices: Mapping[str, int]
    shown: Bool[np.ndarray, " feature"]
    ridges: Mapping[str, Ridge]
    diseases: Regressions = NO_DISEASES

    @classmethod
    def fit(
        cls,
        slices: Mapping[str, int],
        seen: Float[np.ndarray, "subject feature"],
        labels: Float[np.ndarray, "subject target"],
        targets: Sequence[str],
        diseases: Regressions = NO_DISEASES,
    ) -> AreaMap | None:
        """On labelled subjects; None where fewer than 3 have all that counts.

        Args:
            seen: `areas` of their predicted masks.
            labels: NaN: unknown.
            targets: names of the labels, which it is to say.
            diseases: on phenotypes among these.
        """
        there = np.isfinite(seen)
        shown = there.mean(0) >= 0.5
        known = there[:, shown].all(1) & bool(shown.any())
        if known.sum() < MIN_LABELLED:
            return None
        shown[shown] = np.ptp(seen[known][:, shown], axis=0) > 0
        if not shown.any():  # all masks are alike: what is left of a regression is the mean
            return cls(slices, shown, _means(labels[known], targets), diseases)
        return cls(slices, shown, fit_ridges(seen[known][:, shown], labels[known], targets), diseases)

    def __call__(self, views: Mapping[str, Pair]) -> dict[str, float]:
        """Phenotypes of one subject in their units, and probabilities of diseases, by its predicted masks; NaN where an
        area that counts is unknown.
        """
        seen = areas(views, self.slices)[self.shown]
        found = {name: float(ridge(seen[None])[0]) for name, ridge in self.ridges.items()}
        if not np.isfinite(seen).all():
            return found | dict.fromkeys(self.diseases.of, float("nan"))
        phenotypes = np.array([[found.get(name, np.nan) for name in self.diseases.phenotypes]])
        return found | {name: float(one(phenotypes)[0]) for name, one in self.diseases.of.items()}


def _means(labels: Float[np.ndarray, "subject target"], targets: Sequence[str]) -> dict[str, Ridge]:
    """Regressions on nothing."""
    nothing, enough = np.zeros(0), np.isfinite(labels).sum(0) >= MIN_LABELLED
    means = {name: np.nanmean(labels[:, i]) for i, name in enumerate(targets) if enough[i]}
    return {name: Ridge(nothing, nothing, nothing, float(mean), np.inf) for name, mean in means.items()}


def features_of(slices: Mapping[str, int]) -> int:
    """Number of features that `areas` gives."""
    return sum(slices.values()) * (1 + 2 * HARMONICS) * len(CLASSES)


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
