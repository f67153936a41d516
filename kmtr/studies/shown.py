"""Names of what rows show (`pictures`), for those who make figures of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kmtr.config import RunConfig

if TYPE_CHECKING:
    from kmtr.evaluate.looks import Look

CHOSEN_BY = "lvef_pct"
HEADLINE = 8
"""R at which one is shown alone, or the one of the study's that is nearest."""
BEFORE, AFTER = "masked pretraining", "alignment"
"""Encoders whose embeddings are shown."""
EMBEDDING = "embedding/"
"""Prefix of their arrays."""
WHITE = 200
"""Number that stands for the maximum of the fully sampled image; 255 is the brightest that is kept."""


def headline_of(config: RunConfig) -> int:
    """The R that is shown where one is shown."""
    return min(config.evaluate.accelerations, key=lambda r: (abs(r - HEADLINE), r))


def middle(seen: Sequence[Look]) -> int:
    """Number of the subject whose images are shown."""
    numbers = sorted({look.number for look in seen})
    return numbers[len(numbers) // 2]


def key(what: str, number: int, r: int, view: str) -> str:
    """Name of an array of a row."""
    return f"{what}/{number}/{r}/{view}"
