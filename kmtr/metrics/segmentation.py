"""Metrics of segmentations."""

from __future__ import annotations

import numpy as np

from kmtr.types import UNLABELLED


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
