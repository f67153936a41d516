"""From a dataset to the batches of a worker: the plan of a configuration, and its batches in order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from kmtr.config import RunConfig
from kmtr.data.dataset.manifest import merged
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader import buckets
from kmtr.data.loader.batch import NOTHING, Wanted
from kmtr.data.loader.buckets import Shape
from kmtr.data.loader.collate import collate
from kmtr.data.loader.device import HostBatch
from kmtr.data.loader.order import Plan, Source
from kmtr.data.loader.ray import stream
from kmtr.data.loader.shapes import cells_in, cells_of, check_shapes, shape_of
from kmtr.data.loader.threads import in_order
from kmtr.physics import sampling

# ----------------------------------------------------------------------------------------------- dataset -> plan


@dataclasses.dataclass(frozen=True)
class Classes:
    """The different batch shapes that the subjects of a split would need, each for itself.

    Attributes:
        counts: subjects of each.
        held: mean complex samples of such a subject, its own padding (of a missing view, a shorter series) left out.
        of: (dataset, index into its `Manifest.subject_shapes`) -> class.
    """

    shapes: tuple[Shape, ...]
    counts: tuple[int, ...]
    held: tuple[float, ...]
    of: dict[tuple[int, int], int]


def shape_classes(config: RunConfig, dataset: Dataset, split: str = "train") -> Classes:
    """The shapes that the subjects of a split need; those of other splits do not make its batches larger."""
    found: dict[Shape, int] = {}
    counts: list[int] = []
    totals: list[int] = []
    of: dict[tuple[int, int], int] = {}
    for d, manifest in enumerate(dataset.manifests):
        rows = [0] * len(manifest.subject_shapes)
        for shard in manifest.shards:
            if shard.split == split:
                for count, number in shard.shapes:
                    rows[number] += count
        for number, subject in enumerate(manifest.subject_shapes):
            if not rows[number]:
                continue
            at = of[d, number] = found.setdefault(shape_of(config, subject), len(found))
            if at == len(counts):
                counts.append(0)
                totals.append(0)
            counts[at] += rows[number]
            totals[at] += rows[number] * cells_of(config, subject)
    held = tuple(total / max(count, 1) for total, count in zip(totals, counts, strict=True))
    return Classes(tuple(found), tuple(counts), held, of)


def sources_of(
    dataset: Dataset, split: str, classes: dict[tuple[int, int], int], weights: Sequence[float] = ()
) -> list[Source]:
    """Sources of the plan: what it needs to know of each dataset's split.

    Args:
        classes: (dataset, index into its `Manifest.subject_shapes`) -> shape class.
    """
    found = []
    for d, manifest in enumerate(dataset.manifests):
        members = [shard for shard in manifest.shards if shard.split == split]
        groups = merged(run for shard in members for run in shard.groups)
        shapes = merged((rows, classes[d, shape]) for shard in members for rows, shape in shard.shapes)
        found.append(
            Source(
                rows=sum(shard.rows for shard in members),
                groups=groups,
                shapes=shapes,
                weight=weights[d] if weights else 0.0,
            )
        )
    return found


def plan_of(config: RunConfig, dataset: Dataset) -> Plan:
    """The order of training on a dataset, and the shapes of its batches.

    Raises:
        InputError: the dataset can't feed this configuration.
    """
    check_shapes(config, dataset)
    classes = shape_classes(config, dataset)
    batch = config.data.global_batch
    shapes = buckets.choose(classes.shapes, classes.counts, config.plan.shapes, batch, partial(cells_in, config.data))
    sources = sources_of(dataset, "train", classes.of, config.data.weights)
    return Plan(sources, batch, config.seed, config.plan.tail, config.plan.window, shapes)


def shapes_of(plan: Plan) -> tuple[Shape, ...]:
    """The batch shapes of a plan that `plan_of` made."""
    assert plan.buckets is not None
    return plan.buckets.shapes


def padding_of(config: RunConfig, dataset: Dataset, plan: Plan) -> buckets.Waste:
    """Padding of the batches of an epoch, by shape."""
    assert plan.buckets is not None
    classes = shape_classes(config, dataset)
    cells = partial(cells_in, config.data)
    return buckets.waste(plan.buckets, classes.shapes, classes.counts, plan.global_batch, cells, classes.held)


# ----------------------------------------------------------------------------------------------- plan -> batches


def batches(
    config: RunConfig,
    reader: Reader,
    plan: Plan,
    steps: range,
    rank: int,
    world_size: int,
    wanted: Wanted = NOTHING,
) -> Iterator[HostBatch]:
    """This worker's part of the global batch of every step, in order; the same batches from either loader.

    Raises:
        DamagedShard: a file is not what the manifest says.
    """
    data = config.data
    make = MakeBatch(config, reader, plan, steps.start, rank, world_size, wanted)
    if data.loader == "ray":
        yield from stream(make, len(steps), config, make.largest)
    else:
        pin = torch.cuda.is_available() and config.train.device != "cpu"
        yield from in_order(partial(make, pin=pin), range(len(steps)), data.readers, data.prefetch)


@dataclasses.dataclass(frozen=True)
class MakeBatch:
    """The host batch of one step, as a reader makes it in a thread or an actor."""

    config: RunConfig
    reader: Reader
    plan: Plan
    first: int
    rank: int
    world_size: int
    wanted: Wanted

    def __call__(self, number: int, pin: bool = False) -> HostBatch:
        slot = self.plan.share(self.first + number, self.rank, self.world_size)
        return collate(
            self.reader.samples(slot.row),
            self.config,
            shapes_of(self.plan)[slot.bucket],
            slot.epoch,
            self.wanted,
            repeated=slot.repeated,
            real=slot.real,
            pin=pin,
        )

    @property
    def largest(self) -> int:
        """Bytes of a host batch's k-space, and of its masks, at most."""
        data, shapes = self.config.data, np.array(shapes_of(self.plan))
        of_subject = int(cells_in(data, shapes).max()) * 2 * self.reader.dtype.itemsize
        if self.wanted.masks:
            of_subject += data.slices * data.frames * math.prod(data.matrix)
        return self.plan.global_batch // self.world_size * of_subject


def read_in_order(
    reader: Reader,
    rows: Iterable[int],
    size: int,
    config: RunConfig,
    wanted: Wanted = NOTHING,
    purpose: int = sampling.VALIDATION,
) -> Iterator[HostBatch]:
    """Batches of up to `size` subjects of the configuration's full shape in the order given, draws of epoch 0: for
    statistics, validation, evaluation.
    """
    numbers = list(rows)
    chunks = [numbers[i : i + size] for i in range(0, len(numbers), size)]

    def make(number: int) -> HostBatch:
        return collate(reader.samples(chunks[number]), config, None, 0, wanted, purpose)

    yield from in_order(make, range(len(chunks)), 1, config.data.prefetch)
