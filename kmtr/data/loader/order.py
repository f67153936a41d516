"""Which subjects at which step: a pure function of (seed, step). No I/O, no Ray.

    pass      one walk over a source: its row groups in random order, and the rows of each in random order
    stretch   what one epoch takes of a source: a whole pass, or by weight a piece of the endless chain of its passes
    bucket    one shape of batch; the stretches of all sources, cut down to a bucket's rows, form its list
    lane      a bucket's list of ``batch * n`` rows is cut into `batch` equal lanes; batch k takes one row of each
    window    neighbouring row groups of a lane whose rows are shuffled among each other
    overflow  what fills no batch of a bucket moves up to the next shape that fits, in the end to the largest, the
              overflow: the tail of an epoch is under one batch

So each row comes exactly once a pass, a source has the same share of every batch of a bucket up to one row, reads in a
lane run along the row groups, and a worker owns a contiguous range of lanes: the global batch at step k is the same at
any number of workers, and a restart at any step continues with exactly what is left. With single-row groups a pass is a
full permutation. Numbers come from Philox keyed by (seed, what they are for, epoch or pass, source, bucket).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from threading import Lock
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int, Int64

from kmtr.data.loader.buckets import Buckets, Shape
from kmtr.types import InputError

_GROUPS, _LEFT, _WINDOWS, _STEPS = range(1, 5)
"""Purposes of random numbers."""

KEPT_EPOCHS = 2
"""Orders in memory: reading ahead crosses the border of an epoch."""


@dataclass(frozen=True)
class Source:
    """Rows of one dataset's split, in file order.

    Attributes:
        groups: runs of (row groups, rows in each): the sizes of all row groups in file order.
        shapes: runs of (rows, shape class): the class of every row in file order.
        weight: share in every batch; 0 for all sources: in proportion to rows.
    """

    rows: int
    groups: Int[np.ndarray, "group_runs 2"]
    shapes: Int[np.ndarray, "shape_runs 2"]
    weight: float = 0.0

    def __post_init__(self) -> None:
        for name, held in (("groups", self.groups.prod(1).sum()), ("shapes", self.shapes[:, 0].sum())):
            if held != self.rows:
                raise InputError(f"source: expected {name} that hold its {self.rows} rows, got {held}")
        if not 0 <= self.weight < math.inf:
            raise InputError(f"source: expected a weight from 0, got {self.weight}")

    @property
    def single(self) -> bool:
        """True if every row has a row group of its own."""
        return bool((self.groups[:, 1] <= 1).all())

    def group_of_row(self) -> Int[np.ndarray, " row"]:
        sizes = self.group_sizes()
        return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)

    def group_sizes(self) -> Int[np.ndarray, " group"]:
        return np.repeat(self.groups[:, 1], self.groups[:, 0])

    def only(self, rows: Int[np.ndarray, " chosen"]) -> Source:
        """The source that has these rows alone, ascending; a row group is what is left of it."""
        sizes = np.unique(self.group_of_row()[rows], return_counts=True)[1]
        classes = np.repeat(self.shapes[:, 1], self.shapes[:, 0])[rows]
        runs = [np.stack([np.ones_like(values), values], axis=1) for values in (sizes, classes)]
        return replace(self, rows=len(rows), groups=runs[0], shapes=runs[1])


@dataclass(frozen=True)
class Slot:
    """A global batch, or one worker's part of it.

    Attributes:
        row: numbers through all sources, source 0's rows first.
        epoch: how often its source was passed over before (one source: the epoch of the run).
        repeated: only fills up a padded tail; no loss may count it.
        bucket: index of the batch shape.
        real: rows of the global batch that are not repeated.
    """

    row: Int64[np.ndarray, " batch"]
    epoch: Int64[np.ndarray, " batch"]
    repeated: Bool[np.ndarray, " batch"]
    bucket: int
    real: int

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class _Order:
    """One epoch.

    Attributes:
        row: the stretches of all sources, one after the other.
        lanes: per bucket, positions in `row` as lanes.
        bucket: of every full batch.
        at: its number among the batches of its bucket.
        tail: positions in `row` of the padded batch; empty without one.
    """

    row: Int[np.ndarray, " draw"]
    lanes: list[Int[np.ndarray, "batch _"]]
    bucket: Int[np.ndarray, " step"]
    at: Int[np.ndarray, " step"]
    tail: Int[np.ndarray, " real"]


@dataclass(frozen=True, eq=False)
class Plan:
    """Order of the rows of `sources` in global batches.

    Attributes:
        global_batch: rows per step over all workers.
        tail: end of an epoch that fills no batch: ``drop`` it (other rows each epoch) or ``pad`` with flagged repeats.
            Sources with weights have none: their passes run on through the epochs.
        window: row groups of a lane whose rows are shuffled among each other.
        buckets: batch shapes; None: all rows have one.
        rows: numbers of the rows that `sources` hold, ascending, where these are not all (`Source.only`): order and
            epochs count places among them, and only a `Slot` says their numbers. None: all.

    Raises:
        InputError: the rows fill no batch, weights are incomplete, or a row's shape class has no bucket.
    """

    sources: Sequence[Source]
    global_batch: int
    seed: int = 0
    tail: Literal["drop", "pad"] = "drop"
    window: int = 4
    buckets: Buckets | None = None
    rows: Int[np.ndarray, " chosen"] | None = None
    _orders: dict[int, _Order] = field(default_factory=dict, init=False, repr=False)
    _lock: Any = field(default_factory=Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise InputError(
                f"data.global_batch: expected at most the {self.subjects} training subjects of the dataset, "
                f"got {self.global_batch}"
            )
        if self.rows is not None and len(self.rows) != self.subjects:
            raise InputError(f"plan: expected sources of the {len(self.rows)} rows chosen, got {self.subjects} rows")
        for number, source in enumerate(self.sources):
            if self.weighted and not (source.weight and source.rows):
                raise InputError(
                    f"data.weights: expected a weight and subjects for every dataset, got {source.weight:g} and "
                    f"{source.rows} subjects for number {number + 1}"
                )
            classes = source.shapes[source.shapes[:, 0] > 0, 1]
            if self.buckets and classes.size and classes.max() >= len(self.buckets.of_class):
                raise InputError(
                    f"buckets: expected one for each shape class, got {len(self.buckets.of_class)} for class "
                    f"{classes.max()}"
                )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_orders": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The batch shapes, of a plan that has them (`planning.plan_of`)."""
        assert self.buckets is not None
        return self.buckets.shapes

    @property
    def subjects(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def weighted(self) -> bool:
        return any(source.weight for source in self.sources)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.subjects // self.global_batch) if self.tail == "pad" else self.subjects // self.global_batch

    @cached_property
    def draws(self) -> tuple[int, ...]:
        """Rows that an epoch takes of each source. With weights their sum is that of whole batches."""
        if not self.weighted:
            return tuple(source.rows for source in self.sources)
        shares = [Fraction(str(float(source.weight))) for source in self.sources]
        return tuple(np.diff(_cuts(shares, self.steps_per_epoch * self.global_batch)).tolist())

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def cursor(self, step: int) -> tuple[int, int]:
        """Epoch and step in that epoch; inverse of `step_of`."""
        return divmod(step, self.steps_per_epoch)

    def step_of(self, epoch: int, offset: int) -> int:
        return epoch * self.steps_per_epoch + offset

    def batch(self, step: int) -> Slot:
        """The global batch at `step`."""
        return self.share(step, 0, 1)

    def share(self, step: int, rank: int, world: int) -> Slot:
        """Rows that one worker of `world` reads at `step`; all together, in the order of ranks, are the global batch.

        Raises:
            InputError: `world` does not divide the global batch.
        """
        if self.global_batch % world:
            raise InputError(f"data.global_batch: expected a multiple of the {world} workers, got {self.global_batch}")
        size = self.global_batch // world
        mine = slice(rank * size, (rank + 1) * size)
        epoch, offset = self.cursor(step)
        order = self._order(epoch)
        if offset < len(order.bucket):
            bucket, real = int(order.bucket[offset]), self.global_batch
            draw = order.lanes[bucket][mine, order.at[offset]]
            repeated = np.zeros(size, bool)
        else:  # each row of the tail is followed by its repeats: workers share real rows evenly
            bucket, real = self._overflow, len(order.tail)
            which = np.arange(self.global_batch) * real // self.global_batch
            draw = order.tail[which[mine]]
            repeated = (np.diff(which, prepend=-1) == 0)[mine]
        row = order.row[draw] if self.rows is None else self.rows[order.row[draw]]
        return Slot(row.astype(np.int64), self._epochs(epoch, draw), repeated, bucket, real)

    def _epochs(self, epoch: int, draw: Int[np.ndarray, " batch"]) -> Int64[np.ndarray, " batch"]:
        ends = np.cumsum(self.draws)
        source = np.searchsorted(ends, draw, side="right")
        draws, rows = np.array(self.draws)[source], np.array([s.rows for s in self.sources])[source]
        return (epoch * draws + draw - ends[source] + draws) // rows

    @property
    def _overflow(self) -> int:
        return self.buckets.overflow if self.buckets else 0

    def _order(self, epoch: int) -> _Order:
        with self._lock:  # else each of a reader's threads builds its own at the border of an epoch
            order = self._orders.pop(epoch, None) or self._build(epoch)
            self._orders[epoch] = order
            while len(self._orders) > KEPT_EPOCHS:
                del self._orders[next(iter(self._orders))]
            return order

    def _build(self, epoch: int) -> _Order:
        kind = np.int32 if max(self.subjects, sum(self.draws)) < 2**31 else np.int64
        row: np.ndarray = np.empty(sum(self.draws), kind)
        ends = np.cumsum([0, *self.draws])
        for number, first in enumerate(accumulate((s.rows for s in self.sources[:-1]), initial=0)):
            stretch = row[ends[number] : ends[number + 1]]
            self._stretch(epoch, number, stretch)
            stretch += first
        pools = self._pools(row, ends)
        left: list[np.ndarray] = []
        lanes: list[np.ndarray] = [np.empty((self.global_batch, 0), kind)] * len(pools)
        for bucket in sorted(range(len(pools)), key=lambda b: (b == self._overflow, b)):
            kept, left = self._cut(epoch, bucket, pools[bucket])
            lanes[bucket] = self._lanes(epoch, bucket, kept, row)
            if bucket != self._overflow:
                above = self.buckets.above[bucket] if self.buckets else bucket
                pools[above] = [_join(a, b) for a, b in zip(pools[above], left, strict=True)]
        steps = np.repeat(np.arange(len(lanes), dtype=np.int16), [lane.shape[1] for lane in lanes])
        if len(lanes) > 1:
            _rng(self.seed, _STEPS, epoch).shuffle(steps)
        at = np.empty(len(steps), np.int32)
        at[np.argsort(steps, kind="stable")] = np.concatenate([np.arange(lane.shape[1]) for lane in lanes])
        return _Order(row, lanes, steps, at, np.concatenate(left) if self.tail == "pad" else np.empty(0, kind))

    def _stretch(self, epoch: int, number: int, out: Int[np.ndarray, " draw"]) -> None:
        """Rows of one source in this epoch, numbered within it."""
        rows, first, done = self.sources[number].rows, epoch * self.draws[number], 0
        while done < len(out):
            before, skip = divmod(first + done, rows)
            count = min(rows - skip, len(out) - done)
            out[done : done + count] = self._pass(number, before)[skip : skip + count]
            done += count

    def _pass(self, number: int, before: int) -> Int[np.ndarray, " row"]:
        """All rows of one source: row groups permuted, and the rows in each."""
        source = self.sources[number]
        rng = _rng(self.seed, _GROUPS, before, number)
        if source.single:
            return rng.permutation(source.rows)
        sizes = source.group_sizes()
        order = rng.permutation(len(sizes))
        starts = (np.cumsum(sizes) - sizes)[order]
        sizes = sizes[order]
        rows = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(source.rows)
        return rows[_shuffled(np.repeat(np.arange(len(sizes)), sizes), rng)]

    def _pools(
        self, row: Int[np.ndarray, " draw"], ends: Int[np.ndarray, " edge"]
    ) -> list[list[Int[np.ndarray, " _"]]]:
        """Bucket -> source -> positions in `row`, ascending."""
        stretches = [np.arange(a, b, dtype=row.dtype) for a, b in pairwise(ends)]
        if self.buckets is None:
            return [stretches]
        runs = np.concatenate([source.shapes for source in self.sources])
        of_row = np.repeat(np.asarray(self.buckets.of_class, np.int16)[runs[:, 1]], runs[:, 0])
        bucket = of_row[row]
        return [[s[bucket[s] == b] for s in stretches] for b in range(len(self.buckets.shapes))]

    def _cut(
        self, epoch: int, bucket: int, pool: list[Int[np.ndarray, " _"]]
    ) -> tuple[list[Int[np.ndarray, " _"]], list[Int[np.ndarray, " _"]]]:
        """Rows that fill whole batches, and those that are left: random rows, of each source its share."""
        sizes = [len(part) for part in pool]
        whole = sum(sizes) // self.global_batch * self.global_batch
        kept, left = [], []
        for number, (part, keep) in enumerate(zip(pool, np.diff(_cuts(sizes, whole)), strict=True)):
            rng = _rng(self.seed, _LEFT, epoch, number, bucket)
            out = np.zeros(len(part), bool)
            out[rng.choice(len(part), len(part) - keep, replace=False) if keep < len(part) else []] = True
            kept.append(part[~out])
            left.append(part[out])
        return kept, left

    def _lanes(
        self, epoch: int, bucket: int, pool: list[Int[np.ndarray, " _"]], row: Int[np.ndarray, " draw"]
    ) -> Int[np.ndarray, "batch _"]:
        """A bucket's list as lanes, shuffled in windows that cross neither lanes nor sources: shares stay as they are.

        Groups of one row need no windows.
        """
        steps = sum(map(len, pool)) // self.global_batch
        first, done, parts = 0, 0, []
        for number, (source, part) in enumerate(zip(self.sources, pool, strict=True)):
            if not source.single and len(part):
                lane = np.arange(done, done + len(part)) // steps
                window = _windows(source.group_of_row()[row[part] - first], lane - lane[0], self.window)
                part = part[_shuffled(window, _rng(self.seed, _WINDOWS, epoch, number, bucket))]
            parts.append(part)
            first, done = first + source.rows, done + len(part)
        return np.concatenate(parts).reshape(self.global_batch, steps)


def check_workers(global_batch: int, minimum: int, maximum: int) -> None:
    """Refuse a global batch that not every number of workers shares evenly that an elastic run may shrink or grow to.

    Raises:
        InputError: one of them does not divide the global batch.
    """
    refused = [n for n in range(minimum, maximum + 1) if global_batch % n]
    if refused:
        multiple = math.lcm(*range(minimum, maximum + 1))
        raise InputError(
            f"data.global_batch: expected a multiple of every number of workers from {minimum} to {maximum} (of "
            f"{multiple}), got {global_batch}, which {refused[0]} does not divide"
        )


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Order of `n` rows in one epoch, by a counter-based generator; read-only int64."""
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(n)
    order.flags.writeable = False
    return order


def _rng(seed: int, purpose: int, *key: int) -> np.random.Generator:
    # The purpose, never 0, comes last: trailing zeros do not change a SeedSequence.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key, purpose])))


def _cuts(shares: Sequence[int | Fraction], total: int) -> list[int]:
    """Cumulative parts of `total` in proportion to `shares`, from 0 to `total`, each rounded up.

    Rounded so, a part cut into lanes of equal length has floor or ceil of its exact share in every batch, and no part
    of a total under the sum exceeds its share.
    """
    edges = [Fraction(0), *accumulate(map(Fraction, shares))]
    return [math.ceil(edge * total / (edges[-1] or 1)) for edge in edges]


def _shuffled(segment: Int[np.ndarray, " row"], rng: np.random.Generator) -> Int[np.ndarray, " row"]:
    """A random order inside each segment; `segment` ascends. Stable: equal keys must not depend on the processor."""
    key = segment.astype(np.uint64) << np.uint64(32) | rng.integers(2**32, size=len(segment), dtype=np.uint64)
    return np.argsort(key, kind="stable")


def _windows(group: Int[np.ndarray, " row"], lane: Int[np.ndarray, " row"], window: int) -> Int[np.ndarray, " row"]:
    """Number of the window of every row of a list: `window` neighbouring groups of a lane; ascending."""
    new_lane = np.diff(lane, prepend=lane[0] - 1) != 0
    number = np.cumsum(new_lane | (np.diff(group, prepend=group[0]) != 0))
    number -= number[new_lane][lane]  # groups since the lane began
    number //= window
    return lane * (number.max() + 1) + number


def _join(a: Int[np.ndarray, " a"], b: Int[np.ndarray, " b"]) -> Int[np.ndarray, " ab"]:
    return np.concatenate([a, b]) if len(b) else a
