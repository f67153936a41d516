"""How much k-space one view of a subject can have, so that a shard can hold it: known before it is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kmtr.types import InputError

PAYLOAD_BYTES = 2**31 - 1
"""Largest payload of one view: Parquet counts the bytes of a value in 32 bits with a sign."""


def check_payload(view: str, shape: Sequence[int], dtype: str) -> None:
    """Refuse a view that no shard can hold, by the shape of its k-space alone.

    Args:
        view: what messages call it.
        shape: slice, coil, t, ky, kx; dtype: as stored, one of float16 and float32.

    Raises:
        InputError: it has more than `PAYLOAD_BYTES` as stored.
    """
    size = 2 * math.prod(shape) * np.dtype(dtype).itemsize
    if size > PAYLOAD_BYTES:
        smaller = "; or store it with shards.dtype=float16" if dtype == "float32" and size // 2 <= PAYLOAD_BYTES else ""
        raise InputError(
            f"{view}: expected less than 2 GiB of k-space as stored, got {size / 2**30:.3g} GiB "
            f"({' x '.join(map(str, shape))} in {dtype}); take fewer coils with ingest.coils{smaller}"
        )
