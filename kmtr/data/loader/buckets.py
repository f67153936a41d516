"""A few batch shapes for subjects of many shapes: which, for whom, and what the padding costs.

A batch has one shape, and every shape is compiled once. So the classes of equal subjects are merged, always the two
buckets whose union costs least, and the cells (complex values) that hold no data are counted, those of leftovers that a
plan moves up to the next shape that fits them included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from kmtr.types import InputError

Shape = tuple[int, int, int, int, int]
"""Short-axis slices, coils, frames, ny, nx: of a subject after the configuration's limits, or of a batch."""

Cells = Callable[[np.ndarray], np.ndarray]
"""Shapes ``... 5`` -> complex values of one subject ``...``; must not fall where a size grows."""


CROWDED = 3
"""So many classes a shape that greedy merging ends far from the best."""

SLACKS = (0.003, 0.006, 0.01)
WANDER, MOST_MOVES = 100, 4000
"""Random moves per class, and at most: a second or two."""


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

    @property
    def above(self) -> tuple[int, ...]:
        """Bucket that takes what fills no batch of each: the next one whose shape fits; of the overflow itself."""
        return _above(np.array(self.shapes))


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

    Greedy: every class begins as a bucket of its own, and the pair whose union costs least is merged until one bucket
    is left. Each state on that way with at most `limit` shapes is improved by moving single classes, and the cheapest
    is taken; where classes are many, it is improved further by random moves. The cost is the cells of an epoch, where
    what fills no batch pays for the next shape that fits: a class too small for a batch merges readily.

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
    nodes = sorted({*shapes, top}, key=lambda shape: (shape != top, shape))  # the overflow is the first
    size, number = np.array(nodes), np.zeros(len(nodes), np.int64)
    np.add.at(number, [nodes.index(shape) for shape in shapes], counts)
    states = _merged(size, number, limit, batch, cells)
    improved = (_improved(member, size, number, batch, cells) for member in states)
    # Of states that cost the same, that of the fewest shapes.
    cost, best = min(improved, key=lambda state: (state[0], len(np.unique(state[1]))))
    if limit > 1 and len(nodes) > CROWDED * limit:
        wandered = [_wandered(best, size, number, batch, cells, slack) for slack in SLACKS]
        best = min([(cost, best), *wandered], key=lambda state: state[0])[1]
    return _buckets(best[[nodes.index(shape) for shape in shapes]], best, size, cells)


def _cost(number: np.ndarray, size: np.ndarray, batch: int, cells: Cells) -> np.ndarray:
    """Cells of each bucket's subjects; the first is the overflow's."""
    left = number % batch
    return (number - left) * cells(size) + left * cells(size[:1])


def _merged(size: np.ndarray, number: np.ndarray, limit: int, batch: int, cells: Cells) -> Iterator[np.ndarray]:
    """Class -> bucket after every merge that leaves at most `limit`; a bucket is called after its first class."""
    size, number = size.copy(), number.copy()
    member, alive = np.arange(len(size)), np.ones(len(size), bool)
    top = cells(size[:1])

    def gains(i: int) -> np.ndarray:
        """Change of the cost when bucket i is merged with each other one."""
        union, together = np.maximum(size, size[i]), number + number[i]
        left = together % batch
        apart = _cost(number, size, batch, cells)
        change = (together - left) * cells(union) + left * top - apart - apart[i]
        return np.where(alive & (np.arange(len(size)) != i), change, np.inf)

    merge = np.stack([gains(i) for i in range(len(size))])
    while True:
        if alive.sum() <= limit:
            yield member.copy()
        if alive.sum() == 1:
            return
        a, b = sorted(divmod(int(merge.argmin()), len(size)))
        size[a], number[a], alive[b] = np.maximum(size[a], size[b]), number[a] + number[b], False
        member[member == b] = a
        merge[b], merge[:, b] = np.inf, np.inf
        merge[a] = merge[:, a] = gains(a)


def _improved(
    member: np.ndarray, size: np.ndarray, number: np.ndarray, batch: int, cells: Cells
) -> tuple[float, np.ndarray]:
    """Cost and state after moving single classes, each to where it costs least, until none wants to move."""
    names = np.unique(np.append(member, 0))
    member = np.searchsorted(names, member)
    best, moved = _total(member, len(names), size, number, batch, cells), True
    while moved:
        moved = False
        for node in np.flatnonzero(number):
            home = member[node]
            for bucket in range(len(names)):
                member[node] = bucket
                if (cost := _total(member, len(names), size, number, batch, cells)) < best * (1 - 1e-12):
                    best, home, moved = cost, bucket, True
            member[node] = home
    return best, names[member]


def _wandered(
    member: np.ndarray, size: np.ndarray, number: np.ndarray, batch: int, cells: Cells, slack: float
) -> tuple[float, np.ndarray]:
    """As `_improved`, after random moves that may also cost a little more, at first up to `slack` of the whole:
    threshold accepting (Dueck and Scheuer 1990). No exponentials: every machine must find the same.
    """
    names = np.unique(np.append(member, 0))
    member = np.searchsorted(names, member)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([len(size), len(names)])))
    moves = min(WANDER * len(size), MOST_MOVES)
    nodes, homes = rng.integers(len(size), size=moves), rng.integers(len(names), size=moves)
    now = best = start = _total(member, len(names), size, number, batch, cells)
    kept = member.copy()
    for i, (node, home) in enumerate(zip(nodes, homes, strict=True)):
        before, member[node] = member[node], home
        cost = _total(member, len(names), size, number, batch, cells)
        if cost - now < slack * start * (1 - i / moves):
            now = cost
            if cost < best:
                best, kept = cost, member.copy()
        else:
            member[node] = before
    return _improved(names[kept], size, number, batch, cells)


def _total(member: np.ndarray, count: int, size: np.ndarray, number: np.ndarray, batch: int, cells: Cells) -> float:
    """Cells of an epoch; bucket 0 is the overflow."""
    shape = np.zeros((count, size.shape[1]), size.dtype)
    np.maximum.at(shape, member, size)
    shape[0] = size[0]
    many = cells(shape)
    order = np.lexsort((np.arange(count) == 0, many))  # the overflow last
    subjects = np.bincount(member, number, count)[order].astype(np.int64)
    return float((_trained(subjects, _above(shape[order]), batch) * many[order]).sum())


def _above(shapes: Int[np.ndarray, "bucket 5"]) -> tuple[int, ...]:
    """The first later bucket that fits each one's subjects, else itself; shapes go from few cells to many."""
    fits = np.triu((shapes[None] >= shapes[:, None]).all(-1), 1)
    return tuple(int(row.argmax()) if row.any() else i for i, row in enumerate(fits))


def _trained(subjects: Int[np.ndarray, " bucket"], above: Sequence[int], batch: int) -> Int[np.ndarray, " bucket"]:
    """Subjects trained at each shape when what fills no batch moves up."""
    found = np.asarray(subjects, np.int64).copy()
    for bucket, other in enumerate(above):
        if other != bucket:
            left = found[bucket] % batch
            found[bucket] -= left
            found[other] += left
    return found


def _buckets(of_class: np.ndarray, member: np.ndarray, size: np.ndarray, cells: Cells) -> Buckets:
    """Named buckets in the order of their cells, the overflow (0) last."""
    used = {name: size[member == name].max(0) for name in np.unique(of_class)} | {0: size[0]}
    many = dict(zip(used, cells(np.stack(list(used.values()))).tolist(), strict=True))
    order = sorted(used, key=lambda name: (name == 0, many[name], used[name].tolist()))
    return Buckets(
        shapes=tuple(tuple(used[name].tolist()) for name in order),
        of_class=tuple(order.index(name) for name in of_class.tolist()),
        overflow=len(order) - 1,
    )


def waste(
    buckets: Buckets,
    shapes: Sequence[Shape],
    counts: Sequence[int],
    batch: int,
    cells: Cells = product,
    held: Sequence[float] | None = None,
) -> Waste:
    """Padding of an epoch: full batches at their own shape, what fills none at that of the bucket above.

    Args:
        held: mean cells that hold data, per subject of each class; None: those of its shape.
    """
    each = np.asarray(cells(np.asarray(shapes)) if held is None else held, np.float64)
    count, of_class = np.asarray(counts), np.asarray(buckets.of_class)
    subjects = np.bincount(of_class, count, len(buckets.shapes)).astype(np.int64)
    data: np.ndarray = np.bincount(of_class, count * each, len(buckets.shapes))
    for bucket, above in enumerate(buckets.above):
        left = subjects[bucket] % batch if above != bucket else 0
        moved = data[bucket] * left / max(subjects[bucket], 1)
        subjects[[bucket, above]] += [-left, left]
        data[[bucket, above]] += [-moved, moved]
    padded = subjects * cells(np.asarray(buckets.shapes))
    return Waste(subjects, data / 1e6, padded / 1e6)
