"""A few batch shapes for subjects of many shapes: which, for whom, and what the padding costs.

A batch has one shape, and every shape is compiled once. So the classes of equal subjects are merged, always the two
buckets whose union costs least, and the cells (complex values) that hold no data are counted, those of leftovers that a
plan moves up to the largest shape included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from kmtr.types import InputError

Shape = tuple[int, int, int, int, int]
"""Short-axis slices, coils, frames, ny, nx: of a subject after the configuration's limits, or of a batch."""

Cells = Callable[[np.ndarray], np.ndarray]
"""Shapes ``... 5`` -> complex values of one subject ``...``; must not fall where a size grows."""


@dataclass(frozen=True)
class Buckets:
    """Batch shapes.

    Attributes:
        shapes: from the fewest cells to the most.
        of_class: shape class -> index into `shapes`; no size of the class exceeds its bucket's.
        overflow: index of the largest shape, which fits every class.
    """

    shapes: tuple[Shape, ...]
    of_class: tuple[int, ...]
    overflow: int


@dataclass(frozen=True)
class Waste:
    """Padding of one epoch.

    Attributes:
        subjects: trained at each shape.
        held: cells of theirs that hold data, in millions.
        cells: cells of theirs in all, in millions.
    """

    subjects: Int[np.ndarray, " bucket"]
    held: Float[np.ndarray, " bucket"]
    cells: Float[np.ndarray, " bucket"]

    @property
    def shares(self) -> Float[np.ndarray, " bucket"]:
        """Padded share of each shape; 0 where nobody has it."""
        return 1 - np.divide(self.held, self.cells, out=np.ones_like(self.held), where=self.cells > 0)

    @property
    def total(self) -> float:
        return 1 - float(self.held.sum() / self.cells.sum())


def product(shapes: Int[np.ndarray, "*_ axis"]) -> Float[np.ndarray, "*_"]:
    """Cells of short-axis slices alone."""
    return np.prod(shapes, axis=-1, dtype=np.float64)


def choose(shapes: Sequence[Shape], counts: Sequence[int], limit: int, batch: int, cells: Cells = product) -> Buckets:
    """At most `limit` batch shapes, that of the overflow (the largest sizes of all) included.

    Greedy: every class begins as a bucket of its own; the pair that costs least is merged until one bucket is left. Of
    the states on that way with at most `limit` shapes the cheapest is taken, so that a larger limit never wastes more.
    The cost is the cells of an epoch, where what fills no batch pays for the largest shape: too small a class merges.

    Args:
        shapes: one per class, all different.
        counts: subjects of each.
        batch: global batch.
    """
    if limit < 1 or not shapes or len(shapes) != len(counts):
        raise InputError(
            f"plan.shapes: expected a positive limit and a count for each class, got {limit}, {len(shapes)} classes "
            f"and {len(counts)} counts"
        )
    top = tuple(np.max(np.asarray(shapes), axis=0).tolist())
    order = sorted({*shapes, top}, key=lambda s: (s != top, s))  # the overflow is node 0
    size = np.array(order)
    number = np.zeros(len(order), np.int64)
    member = np.array([order.index(shape) for shape in shapes])
    np.add.at(number, member, np.asarray(counts))
    alive = np.ones(len(order), bool)
    most = float(cells(size[:1])[0])

    def cost(n: np.ndarray, shape: np.ndarray) -> np.ndarray:
        left = n % batch
        return (n - left) * cells(shape) + left * most

    def gains(i: int) -> np.ndarray:
        """Change of the cost when node i is merged with each other one."""
        apart = cost(number, size)
        change = cost(number + number[i], np.maximum(size, size[i])) - apart - apart[i]
        return np.where(alive & (np.arange(len(order)) != i), change, np.inf)

    merge = np.stack([gains(i) for i in range(len(order))])
    total = cost(number, size).sum()
    best, found = np.inf, (member, size)
    while True:
        if alive.sum() <= limit and total < best:
            best, found = total, (member.copy(), size.copy())
        if alive.sum() == 1:
            break
        a, b = sorted(divmod(int(merge.argmin()), len(order)))
        total += merge[a, b]
        size[a], number[a], alive[b] = np.maximum(size[a], size[b]), number[a] + number[b], False
        member[member == b] = a
        merge[b], merge[:, b] = np.inf, np.inf
        merge[a] = merge[:, a] = gains(a)
    return _buckets(*found, cells)


def _buckets(member: np.ndarray, size: np.ndarray, cells: Cells) -> Buckets:
    many = cells(size).tolist()
    used = sorted({0, *member.tolist()}, key=lambda node: (node == 0, many[node], size[node].tolist()))
    return Buckets(
        shapes=tuple(tuple(size[node].tolist()) for node in used),
        of_class=tuple(used.index(node) for node in member.tolist()),
        overflow=len(used) - 1,
    )


def waste(
    buckets: Buckets,
    shapes: Sequence[Shape],
    counts: Sequence[int],
    batch: int,
    cells: Cells = product,
    held: Sequence[float] | None = None,
) -> Waste:
    """What an epoch pads: full batches at their own shape, what fills none at the overflow's.

    Args:
        held: mean cells that hold data, per subject of each class; None: those of its shape.
    """
    each = np.asarray(cells(np.asarray(shapes)) if held is None else held, np.float64)
    count, of_class = np.asarray(counts), np.asarray(buckets.of_class)
    subjects = np.bincount(of_class, count, len(buckets.shapes)).astype(np.int64)
    data: np.ndarray = np.bincount(of_class, count * each, len(buckets.shapes))
    left = np.where(np.arange(len(subjects)) == buckets.overflow, 0, subjects % batch)
    moved = data * left / np.maximum(subjects, 1)
    subjects -= left
    data -= moved
    subjects[buckets.overflow] += left.sum()
    data[buckets.overflow] += moved.sum()
    padded = subjects * cells(np.asarray(buckets.shapes))
    return Waste(subjects, data / 1e6, padded / 1e6)
