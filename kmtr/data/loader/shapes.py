"""Shapes of batches: which one holds a subject, how many values it has, and whether a dataset fits at all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kmtr.config import Data, RunConfig
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import patterns
from kmtr.data.loader.buckets import Shape
from kmtr.physics import sampling
from kmtr.types import InputError


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


def check_shapes(config: RunConfig, dataset: Dataset) -> None:
    """Refuse a dataset that can't feed this configuration, before a worker starts.

    Raises:
        InputError: a view is missing, there are more coils than the configuration has, a matrix is larger, too few
            lines would be left, or the pattern file is of another number of lines.
    """
    data = config.data
    patterns.check(config)
    table = patterns.table(config.sampling)
    for view in data.views:
        if view not in dataset.shapes:
            have = ",".join(dataset.shapes)
            raise InputError(f"data.views: expected views of the dataset ({have}), got {view}; set data.views={have}")
        for slices, coils, frames, ny, nx in dataset.shapes[view]:
            if coils > data.coils:
                raise InputError(f"data.coils: {view} of the dataset has {coils} coils, got data.coils={data.coils}")
            if (ny > data.matrix[0] or nx > data.matrix[1]) and not data.crop:
                raise InputError(
                    f"data.matrix: {view} of the dataset is {ny} x {nx}, got {data.matrix[0]} x {data.matrix[1]}; "
                    f"set data.matrix={ny},{nx}, or data.crop=true to crop or pad it"
                )
            if ny != data.matrix[0] and data.crop and view in dataset.undersampled:
                raise InputError(
                    f"data.matrix: {view} is undersampled along ky, so its {ny} lines can't become {data.matrix[0]}"
                )
            if frames < data.frames / 2 or slices == 0:
                raise InputError(
                    f"data.frames: {view} of the dataset has {frames} frames, got data.frames={data.frames}"
                )
            lines = data.matrix[0] if data.crop else ny
            if table is not None:
                patterns.check_lines(table, view, lines)
                continue
            for key in ("sampling", "evaluate"):
                for r in getattr(config, key).accelerations:
                    try:
                        sampling.check(lines, r, config.sampling.acs_lines, config.sampling.family)
                    except InputError as error:
                        raise InputError(f"{key}.accelerations: {view}: {error}") from None


def unreached(data: Data, dataset: Dataset) -> str:
    """Advice on what of the configuration's full shape no subject fills, in one line; empty: all is filled."""
    shapes = [shape for view in data.views for shape in dataset.shapes.get(view, [])]
    if not shapes or data.crop:
        return ""
    _, coils, _, ny, nx = (max(sizes) for sizes in zip(*shapes, strict=True))
    if coils < data.coils:
        return f"data.coils: no subject has more than {coils} coils, got {data.coils}; set data.coils={coils}"
    if (ny, nx) != data.matrix:
        return (
            f"data.matrix: no subject is larger than {ny} x {nx}, got {data.matrix[0]} x {data.matrix[1]}, so images "
            f"are interpolated; set data.matrix={ny},{nx}"
        )
    return ""
