"""Samples that a batch is collated from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa


@runtime_checkable
class Samples(Protocol):
    """Subjects whose small columns are at hand and whose k-space and masks can be fetched."""

    @property
    def meta(self) -> pa.Table: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def in_flight(self) -> int:
        """Fetches that are worth having under way at once."""
        ...

    def fetch(self, row: int, view: str, shape: Sequence[int], out: np.ndarray | None = None) -> np.ndarray | None:
        """Stored values ``slice coil t ky kx 2`` of a row's view, in `out` (contiguous, that shape) where given.

        None where the subject lacks the view.
        """
        ...

    def fetch_masks(self, row: int, view: str, shape: Sequence[int]) -> np.ndarray | None:
        """Masks uint8 ``slice t y x`` of a row's view whose k-space has this `shape`; None where it has none."""
        ...
