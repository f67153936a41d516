"""Scores of one subject's masks and images, over all its views, by the names under which predictions keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kmtr.metrics.images import heart_box, image_scores
from kmtr.metrics.segmentation import CLASSES, contour_distance, contoured_classes, dice, extreme_frames, told
from kmtr.metrics.volumes import Masks, mask_phenotypes
from kmtr.types import SEGMENTATION_CLASSES, UNLABELLED

PHASES = ("ed", "es")
"""End-diastole and end-systole."""
NAMES = SEGMENTATION_CLASSES[1:]
DICE = tuple(f"dice_{name}_{phase}" for phase in PHASES for name in NAMES)
DISTANCES = tuple(
    f"{kind}_{name}_{phase}{unit}"
    for kind, unit in (("hd95", "_mm"), ("missed", ""), ("spurious", ""))
    for phase in PHASES
    for name in NAMES
)
"""95 % Hausdorff distance, and slices in which a class was missed, or found where there is none."""
IMAGES = ("psnr_db", "ssim", "nmse")
IN_BOX = tuple(f"{name}_heart" for name in IMAGES)


@dataclass(frozen=True)
class Pair:
    """Truth and prediction of one view, without padding.

    Attributes:
        truth, predicted: ``slice t y x``; classes as uint8, or magnitudes.
        contoured: classes that the source draws; None: all.
        spacing_mm: distance of slices, height and width of a pixel; None: unknown.
    """

    truth: np.ndarray
    predicted: np.ndarray
    contoured: Sequence[int] | None = None
    spacing_mm: tuple[float, float, float] | None = None


def mask_scores(views: Mapping[str, Pair]) -> dict[str, float]:
    """`DICE` at the truth's end-diastole and end-systole of each view, over the pixels of all views together.

    Returns:
        NaN: no view draws the class, or it is in neither truth nor prediction; 0: in one of them only. A view with one
        labelled frame has no end-systole.
    """
    seen = [(pair, told(pair.truth, pair.predicted), phases(pair.truth)) for pair in views.values()]
    found = dict.fromkeys(DICE, float("nan"))
    for number, phase in enumerate(PHASES):
        for value, name in zip(CLASSES, NAMES, strict=True):
            at = [
                (truth[:, frames[number]].ravel(), predicted[:, frames[number]].ravel())
                for pair, (truth, predicted), frames in seen
                if number < len(frames) and value in contoured_classes(pair.contoured)
            ]
            if at:
                truth, predicted = (np.concatenate(parts)[None] for parts in zip(*at, strict=True))
                found[f"dice_{name}_{phase}"] = float(dice(truth, predicted, value + 1)[0, -1])
    return found


def phases(truth: np.ndarray) -> tuple[int, ...]:
    """Frames of the truth's `PHASES`: both, end-diastole alone where one frame is labelled, or none."""
    return tuple(dict.fromkeys(extreme_frames(truth) or ()))


def mask_distances(views: Mapping[str, Pair]) -> dict[str, float]:
    """`DISTANCES` at the same frames as `mask_scores`: of each class, the mean over the slices of all views that show
    it in both, and how many show it in one only. NaN where the size of a pixel is unknown, or nothing is compared.
    """
    shape = (len(PHASES), len(NAMES))
    total, compared, missed, spurious = (np.zeros(shape) for _ in range(4))
    drawn = np.zeros(shape, bool)
    for pair in views.values():
        frames = phases(pair.truth)
        if not frames or pair.spacing_mm is None:
            continue
        one, some = contour_distance(pair.truth, pair.predicted, frames, pair.spacing_mm, pair.contoured), len(frames)
        total[:some] += np.where(one.compared > 0, one.hd95_mm * one.compared, 0.0)
        for counted, more in ((compared, one.compared), (missed, one.missed), (spurious, one.spurious)):
            counted[:some] += more
        drawn[:some, [value - 1 for value in contoured_classes(pair.contoured)]] = True
    mean = np.divide(total, compared, out=np.full(shape, np.nan), where=compared > 0)
    counts = [np.where(drawn, count, np.nan) for count in (missed, spurious)]
    return dict(
        zip(DISTANCES, np.concatenate([mean.ravel(), *(count.ravel() for count in counts)]).tolist(), strict=True)
    )


def masks_phenotypes(views: Mapping[str, Pair]) -> dict[str, float]:
    """Volumes, mass and ejection fractions from the predicted masks (`volumes.mask_phenotypes`), at the predicted
    extremes, where the size of a pixel is known.
    """
    known = {
        view: Masks(pair.predicted, pair.spacing_mm, None)
        for view, pair in views.items()
        if pair.spacing_mm is not None and (pair.predicted != UNLABELLED).all()
    }
    return mask_phenotypes(known)


def reconstruction_scores(views: Mapping[str, Pair], masks: Mapping[str, np.ndarray] | None = None) -> dict[str, float]:
    """`IMAGES` of a subject, mean over its views, on the field of view; with masks also `IN_BOX`, on the heart's box.

    Args:
        masks: true classes of the views, as far as they are known.
    """
    whole = [image_scores(pair.predicted, pair.truth) for pair in views.values()]
    found = {name: float(np.mean([getattr(one, name) for one in whole])) for name in IMAGES}
    if masks is None:
        return found
    boxes = {view: heart_box(mask) for view, mask in masks.items()}
    inside = [
        image_scores(pair.predicted, pair.truth, boxes[view])
        for view, pair in views.items()
        if boxes.get(view) is not None
    ]
    return found | {
        f"{name}_heart": float(np.mean([getattr(one, name) for one in inside])) if inside else float("nan")
        for name in IMAGES
    }
