"""Shapes of batches: which one holds a subject, and how many values it has."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kmtr.config import Data, RunConfig
from kmtr.data.loader.buckets import Shape


def full_shape(data: Data) -> Shape:
    """The largest batch shape of a configuration."""
    return (data.sax_slices if "sax" in data.views else 0, data.coils, data.frames, *data.matrix)


def shape_of(config: RunConfig, subject: dict[str, list[int]]) -> Shape:
    """The smallest batch shape that holds a subject (view -> ``slice coil t ky kx``)."""
    data, patch = config.data, config.model.patch[0]
    views = [subject[view] for view in data.views if view in subject]
    if not views:
        return (1 if "sax" in data.views else 0, 1, patch, 8, 8)
    sax = min(subject["sax"][0], data.sax_slices) if "sax" in subject else 1
    frames = min(max(view[2] for view in views), data.frames)
    matrix = data.matrix if data.crop else (max(view[3] for view in views), max(view[4] for view in views))
    coils = max(view[1] for view in views)
    return (sax if "sax" in data.views else 0, coils, -(-frames // patch) * patch, *matrix)


def cells_of(config: RunConfig, subject: dict[str, list[int]]) -> int:
    """Complex samples of a subject that enter a batch."""
    data, cells = config.data, 0
    for view in data.views:
        if view in subject:
            slices, coils, frames, ny, nx = subject[view]
            ny, nx = data.matrix if data.crop else (ny, nx)
            cells += min(slices, data.slots(view)) * coils * min(frames, data.frames) * ny * nx
    return cells


def cells_in(data: Data, shapes: np.ndarray) -> np.ndarray:
    """Complex samples of one subject in batches of these shapes, ``... 5`` -> ``...``."""
    long_axis = sum(view != "sax" for view in data.views)
    return (shapes[..., 0] + long_axis) * np.prod(shapes[..., 1:], axis=-1, dtype=np.int64)


def choose(available: int, wanted: int, centred: bool) -> np.ndarray:
    """Indices of `wanted` of `available` items, evenly spread; all of them where there are fewer.

    `centred` takes the middle of equal stretches (slices: neither the outermost base nor apex); else the first of each
    (frames: frame 0 stays).
    """
    if available <= wanted:
        return np.arange(available)
    return np.floor((np.arange(wanted) + (0.5 if centred else 0.0)) * available / wanted).astype(int)


def places_of(data: Data, shape: Shape) -> Iterator[tuple[str, slice]]:
    """Views of the configuration, and the slices of a batch of this shape that are theirs."""
    first = 0
    for view in data.views:
        count = shape[0] if view == "sax" else 1
        yield view, slice(first, first + count)
        first += count


def slots_of(data: Data, sax_slices: int) -> tuple[int, ...]:
    """Slice slot of the configuration that each slice of a batch with so many short-axis slices is."""
    slots: list[int] = []
    first = 0
    for view in data.views:
        slots += range(first, first + (sax_slices if view == "sax" else 1))
        first += data.slots(view)
    return tuple(slots)
