"""From a plan to the batches of a worker, in order, by threads or by actors of Ray Data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from kmtr import machine
from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader import patterns
from kmtr.data.loader.batch import NOTHING, Wanted
from kmtr.data.loader.collate import collate
from kmtr.data.loader.device import HostBatch
from kmtr.data.loader.order import Plan
from kmtr.data.loader.ray import stream
from kmtr.data.loader.shapes import cells_in
from kmtr.data.loader.threads import in_order
from kmtr.physics import sampling


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
    pattern = patterns.carried(config.sampling)
    make = MakeBatch(config, reader, plan, steps.start, rank, world_size, wanted, pattern)
    if data.loader == "ray":
        yield from stream(make, len(steps), config, make.largest)
    else:
        pin = machine.device(config.train.device) == "cuda"
        yield from in_order(partial(make, pin=pin), range(len(steps)), data.readers, data.prefetch)


@dataclasses.dataclass(frozen=True)
class MakeBatch:
    """The host batch of one step, as a reader makes it in a thread or an actor.

    Attributes:
        pattern: of the configuration's pattern file, which an actor's node may not have.
    """

    config: RunConfig
    reader: Reader
    plan: Plan
    first: int
    rank: int
    world_size: int
    wanted: Wanted
    pattern: np.ndarray | None

    def __call__(self, number: int, pin: bool = False) -> HostBatch:
        patterns.hold(self.config.sampling, self.pattern)
        slot = self.plan.share(self.first + number, self.rank, self.world_size)
        return collate(
            self.reader.samples(slot.row),
            self.config,
            self.plan.shapes[slot.bucket],
            slot.epoch,
            self.wanted,
            repeated=slot.repeated,
            real=slot.real,
            pin=pin,
        )

    @property
    def largest(self) -> int:
        """Bytes of a host batch's k-space, and of its masks, at most."""
        data, shapes = self.config.data, np.array(self.plan.shapes)
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
