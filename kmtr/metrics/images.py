"""Metrics of reconstructed images."""

from __future__ import annotations

import numpy as np


def nmse(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Energy of the error over energy of the reference."""
    return float(np.sum(np.abs(estimate - reference) ** 2) / np.sum(np.abs(reference) ** 2))
