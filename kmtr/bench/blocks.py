"""Step times of blocks of one run, which differ in one thing and come in turns: their ratio, and how sure it is."""

from __future__ import annotations

from typing import Any

import numpy as np

RESAMPLES = 10_000


def over(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Ratio of median step times, with a 95 % bootstrap interval over blocks, which are drawn whole and in pairs.

    Args:
        ours, theirs: seconds, ``block step``.
    """
    count = len(ours)
    drawn = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    a, b = (np.median(np.median(x, axis=1)[drawn], axis=1) for x in (ours, theirs))
    low, high = np.percentile(a / b, [2.5, 97.5])
    value = np.median(np.median(ours, axis=1)) / np.median(np.median(theirs, axis=1))
    return {"ratio": round(float(value), 3), "interval": [round(float(low), 3), round(float(high), 3)]}
