"""Metrics of continuous phenotypes."""

from __future__ import annotations

import numpy as np


def r2(truth: np.ndarray, predicted: np.ndarray, reference: float | np.ndarray) -> float:
    """Share of variance explained on held-out subjects, against always answering `reference` (the training mean)."""
    return float(1 - np.sum((truth - predicted) ** 2) / np.sum((truth - reference) ** 2))
