"""Metrics of segmentations: overlap, and distance of the contours in mm.

Pixels where the truth is UNLABELLED count for nothing: neither is anything there in the truth nor in the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Integer
from scipy import ndimage

from kmtr.types import SEGMENTATION_CLASSES, UNLABELLED, InputError

CLASSES = range(1, len(SEGMENTATION_CLASSES))
"""All classes but the background."""

LV_CAVITY, LV_MYOCARDIUM, RV, LA, RA = CLASSES


def contoured_classes(contoured: Sequence[int] | None) -> Sequence[int]:
    """The classes that a source draws: all `CLASSES` where it says nothing (None)."""
    return CLASSES if contoured is None else contoured


def dice(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Overlap 2 |A and B| / (|A| + |B|) of each class but the background, per subject.

    Args:
        truth, predicted: uint8 ``subject ...`` of class values; where `truth` is UNLABELLED nothing is counted.

    Returns:
        float64 ``subject class - 1``; NaN where neither holds the class.
    """
    counted = truth != UNLABELLED
    axes = tuple(range(1, truth.ndim))
    scores = np.full((len(truth), classes - 1), np.nan)
    for value in range(1, classes):
        a, b = truth == value, (predicted == value) & counted
        size = a.sum(axes) + b.sum(axes)
        np.divide(2 * (a & b).sum(axes), size, out=scores[:, value - 1], where=size > 0)
    return scores


CHAMBERS = (LV_CAVITY, RV, LA, RA)


def extreme_frames(
    truth: Integer[np.ndarray, "slice t y x"], chambers: Sequence[int] = CHAMBERS
) -> tuple[int, int] | None:
    """Frames of end-diastole and end-systole in the truth, by the first of `chambers` that it shows: a ventricle is
    largest and smallest there, an atrium smallest and largest.

    Only frames that show the chamber and are labelled as far as any (the fewest pixels UNLABELLED, see `told`) are
    asked; of a source that labels two frames, both, although at end-systole fewer slices show a cavity. With one such
    frame both are that one; None without any.
    """
    truth, _ = told(truth, truth)
    unknown = (truth == UNLABELLED).sum((0, 2, 3))
    for chamber in chambers:
        size = (truth == chamber).sum((0, 2, 3))
        frames = np.flatnonzero(size)
        if len(frames) > 2:
            frames = frames[unknown[frames] == unknown.min()]
        if len(frames):
            largest, smallest = int(frames[size[frames].argmax()]), int(frames[size[frames].argmin()])
            return (smallest, largest) if chamber in (LA, RA) else (largest, smallest)
    return None


def told(
    truth: Integer[np.ndarray, "slice t y x"], predicted: Integer[np.ndarray, "slice t y x"]
) -> tuple[Integer[np.ndarray, "slice t y x"], Integer[np.ndarray, "slice t y x"]]:
    """Both with all that the truth says of frames in which not everything was contoured (`kmtr.tasks.losses.told`).

    In an image whose truth has classes but no background, UNLABELLED pixels are of none of these classes: they become
    background. Of other classes nothing is known there: what is predicted of them counts as background. So a cavity
    that is missed or found too large counts where it alone was drawn.
    """
    shown = np.stack([(truth == value).any((2, 3)) for value in range(len(SEGMENTATION_CLASSES))], axis=2)
    partly = shown.any(2) & ~shown[..., 0] & (truth == UNLABELLED).any((2, 3))
    if not partly.any():
        return truth, predicted
    z, t = np.ogrid[: truth.shape[0], : truth.shape[1]]
    of_shown = shown[z[..., None, None], t[..., None, None], np.minimum(predicted, len(SEGMENTATION_CLASSES) - 1)]
    here = partly[..., None, None]
    return (
        np.where(here & (truth == UNLABELLED), 0, truth).astype(truth.dtype),
        np.where(here & ~of_shown & (predicted != UNLABELLED), 0, predicted).astype(predicted.dtype),
    )


def dice_at(
    truth: Integer[np.ndarray, "slice t y x"],
    predicted: Integer[np.ndarray, "slice t y x"],
    frames: Sequence[int],
    contoured: Sequence[int] | None = None,
) -> Float[np.ndarray, "frame class"]:
    """Dice of one subject's view at some frames of the truth, over all slices together.

    Args:
        frames: of the truth, as `extreme_frames` gives them; the prediction is read at the same.
        contoured: the classes that the source draws (`View.contoured`); None: all.

    Returns:
        Columns for all `CLASSES`. NaN: the class is not contoured, or is in neither; 0: it is in one only.

    Raises:
        InputError: shapes differ.
    """
    _check_shapes(truth, predicted)
    truth, predicted = told(truth, predicted)
    at = list(frames)
    scores = dice(
        np.moveaxis(truth[:, at], 1, 0), np.moveaxis(predicted[:, at], 1, 0), classes=len(SEGMENTATION_CLASSES)
    )
    scores[:, [value not in contoured_classes(contoured) for value in CLASSES]] = np.nan
    return scores


@dataclass(frozen=True)
class ContourDistance:
    """95 % Hausdorff distances of one subject's view, by frame and class (all `CLASSES`).

    Attributes:
        hd95_mm: mean over the slices that show the class in both; NaN where there is none.
        compared: number of these slices.
        missed: slices where the truth has the class and the prediction has not: no distance says how wrong that is, so
            it stands beside every mean of `hd95_mm`, which a system that finds less would otherwise improve.
        spurious: slices where only the prediction has it.
    """

    hd95_mm: Float[np.ndarray, "frame class"]
    compared: Int[np.ndarray, "frame class"]
    missed: Int[np.ndarray, "frame class"]
    spurious: Int[np.ndarray, "frame class"]


def contour_distance(
    truth: Integer[np.ndarray, "slice t y x"],
    predicted: Integer[np.ndarray, "slice t y x"],
    frames: Sequence[int],
    spacing_mm: tuple[float, float, float],
    contoured: Sequence[int] | None = None,
) -> ContourDistance:
    """95 % Hausdorff distance in the plane of each slice, see `hd95`.

    Args:
        frames, contoured: as of `dice_at`; a class that is not contoured is NaN and counts nowhere.
        spacing_mm: slices, pixel height, pixel width; the first is not used.

    Raises:
        InputError: shapes differ, or a pixel size that is not above 0.
    """
    _check_shapes(truth, predicted)
    truth, predicted = told(truth, predicted)
    shape = (len(frames), len(CLASSES))
    total = np.zeros(shape)
    compared, missed, spurious = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    for row, frame in enumerate(frames):
        for value in contoured_classes(contoured):
            cell = row, value - 1
            for real, guess in zip(truth[:, frame], predicted[:, frame], strict=True):
                a, b = real == value, (guess == value) & (real != UNLABELLED)
                in_truth, found = bool(a.any()), bool(b.any())
                missed[cell] += in_truth and not found
                spurious[cell] += found and not in_truth
                if in_truth and found:
                    compared[cell] += 1
                    total[cell] += hd95(a, b, spacing_mm[1:])
    mean = np.divide(total, compared, out=np.full(shape, np.nan), where=compared > 0)
    return ContourDistance(mean, compared, missed, spurious)


def hd95(a: Bool[np.ndarray, "y x"], b: Bool[np.ndarray, "y x"], pixel_mm: tuple[float, float]) -> float:
    """95 % Hausdorff distance of two structures in mm.

    The greater of the two directions' 95th percentiles (linear between ranks) of the distance from each contour pixel
    of one to the nearest contour pixel of the other. A contour pixel has one of its 4 neighbours outside the structure;
    distances are between pixel centres. This is MONAI's convention; others pool both directions.

    Args:
        pixel_mm: height, width.

    Returns:
        NaN where one is empty.

    Raises:
        InputError: a pixel size that is not above 0.
    """
    if not all(size > 0 for size in pixel_mm):
        raise InputError(f"pixel spacing: expected two sizes above 0 mm, got {pixel_mm}")
    if not (a.any() and b.any()):
        return float("nan")
    box = ndimage.find_objects((a | b).astype(np.int8))[0]
    one, other = (_contour(mask[box]) for mask in (a, b))
    to_other, to_one = (ndimage.distance_transform_edt(~contour, sampling=pixel_mm) for contour in (other, one))
    return float(max(np.percentile(to_other[one], 95), np.percentile(to_one[other], 95)))


def _contour(mask: Bool[np.ndarray, "y x"]) -> Bool[np.ndarray, "y x"]:
    return mask & ~ndimage.binary_erosion(mask)


def _check_shapes(truth: np.ndarray, predicted: np.ndarray) -> None:
    if truth.shape != predicted.shape:
        raise InputError(
            f"segmentation: expected a prediction of the truth's shape {truth.shape}, got {predicted.shape}"
        )
