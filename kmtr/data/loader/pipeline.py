"""Every Ray Data graph: the plan to batches for training, and items to Parquet shards. The only file with ray.data."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kmtr.config import RunConfig
from kmtr.data.dataset import writing
from kmtr.data.dataset.manifest import DamagedShard, Manifest, Shard, shard_of
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.dataset.retry import StoreError
from kmtr.data.loader import buckets
from kmtr.data.loader.buckets import Shape
from kmtr.data.loader.collate import collate
from kmtr.data.loader.device import HostBatch
from kmtr.data.loader.order import Plan
from kmtr.data.loader.shapes import cells_in, cells_of, check_shapes, shape_of
from kmtr.data.loader.transport import pack, unpack
from kmtr.physics import sampling
from kmtr.types import InputError, KmtrError

MAX_BLOCKS = 500
"""Ray Data tasks per graph: enough to overlap, few enough to start in seconds."""


MIN_AHEAD_BYTES = 64 << 20
"""Object store of a worker's reading: room for blocks that are small beside it."""

EXECUTOR_PAUSE_S = (0.002, 0.02)
"""At least and at most: far above a turn of the executor (1 ms) where steps allow it."""

PAUSES_PER_STEP = 10


# ------------------------------------------------------------------------------------------------ plan -> batches


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
            if not rows[number]:  # only in other splits: it must not make training's batches larger
                continue
            at = of[d, number] = found.setdefault(shape_of(config, subject), len(found))
            if at == len(counts):
                counts.append(0)
                totals.append(0)
            counts[at] += rows[number]
            totals[at] += rows[number] * cells_of(config, subject)
    held = tuple(total / max(count, 1) for total, count in zip(totals, counts, strict=True))
    return Classes(tuple(found), tuple(counts), held, of)


def plan_of(config: RunConfig, dataset: Dataset) -> Plan:
    """The order of training on a dataset, and the shapes of its batches.

    Raises:
        InputError: the dataset can't feed this configuration.
    """
    check_shapes(config, dataset)
    classes = shape_classes(config, dataset)
    batch = config.data.global_batch
    shapes = buckets.choose(classes.shapes, classes.counts, config.plan.shapes, batch, partial(cells_in, config.data))
    sources = dataset.sources("train", classes.of, config.data.weights)
    return Plan(sources, batch, config.seed, config.plan.tail, config.plan.window, shapes)


def shapes_of(plan: Plan) -> tuple[Shape, ...]:
    """The batch shapes of a plan that `plan_of` made."""
    assert plan.buckets is not None
    return plan.buckets.shapes


def padding_of(config: RunConfig, dataset: Dataset, plan: Plan) -> buckets.Waste:
    """What the batches of an epoch pad, by shape."""
    assert plan.buckets is not None
    classes = shape_classes(config, dataset)
    cells = partial(cells_in, config.data)
    return buckets.waste(plan.buckets, classes.shapes, classes.counts, plan.global_batch, cells, classes.held)


def batches(
    config: RunConfig,
    reader: Reader,
    plan: Plan,
    steps: range,
    rank: int,
    world_size: int,
    labels: Sequence[str] = (),
) -> Iterator[HostBatch]:
    """This worker's part of the global batch of every step, in order; the same batches from either loader.

    Raises:
        DamagedShard: a file is not what the manifest says.
    """
    make = MakeBatch(config, reader, plan, steps.start, rank, world_size, tuple(labels))
    yield from (_with_ray if config.data.loader == "ray" else _with_threads)(make, len(steps))


@dataclasses.dataclass(frozen=True)
class MakeBatch:
    """What a reader does, in a thread or an actor: the host batch of one step."""

    config: RunConfig
    reader: Reader
    plan: Plan
    first: int
    rank: int
    world_size: int
    labels: tuple[str, ...]

    def __call__(self, number: int, pin: bool = False) -> HostBatch:
        slot = self.plan.share(self.first + number, self.rank, self.world_size)
        return collate(
            self.reader.samples(slot.row),
            self.config,
            shapes_of(self.plan)[slot.bucket],
            slot.visit,
            self.labels,
            repeated=slot.repeated,
            real=slot.real,
            pin=pin,
        )

    @property
    def largest(self) -> int:
        """Bytes of a host batch's k-space at most."""
        cells = int(cells_in(self.config.data, np.array(shapes_of(self.plan))).max())
        return self.plan.global_batch // self.world_size * cells * 2 * self.reader.dtype.itemsize


class ReadSteps:
    """An actor of Ray Data: steps in, each one's host batch out as one row that Ray neither merges nor splits."""

    def __init__(self, make: MakeBatch):
        self.make = make

    def __call__(self, steps: pa.Table) -> Iterator[pa.Table]:
        numbers = steps.column("item").to_pylist()
        yield from (pack(batch) for batch in _in_order(self.make, numbers, 1, 1))


def _with_ray(make: MakeBatch, steps: int) -> Iterator[HostBatch]:
    import ray
    from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

    data = make.config.data
    context = DataContext.get_current()
    block_size = context.target_max_block_size
    context.execution_options.preserve_order = True
    # Else Ray Data reads ahead until the object store is full, and takes the processors from training meanwhile.
    context.execution_options.resource_limits = ExecutionResources(
        object_store_memory=max((data.prefetch + 2) * data.readers * make.largest, MIN_AHEAD_BYTES)
    )
    context.target_max_block_size = 1  # a block is a batch, whatever its size
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.custom_execution_callback_classes = [Breathe]
    # One reader streams all steps out of one block. from_items, since range and from_arrow run tasks that want a whole
    # CPU, which workers and readers may have taken. An actor, since Ray ends idle task processes, and starting one
    # costs seconds.
    blocks = 1 if data.readers == 1 else min(steps, MAX_BLOCKS)
    dataset = ray.data.from_items(list(range(steps)), override_num_blocks=blocks).map_batches(
        ReadSteps,
        fn_constructor_args=(make,),
        compute=ActorPoolStrategy(size=data.readers),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=data.read_cpus,
    )
    context.target_max_block_size = block_size  # the dataset has its copy
    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=data.prefetch):
            asked = time.perf_counter()
            yield unpack(table, make.config)
            # What the consumer took, not what it waited for: else a slow executor would slow itself down.
            least, most = EXECUTOR_PAUSE_S
            Breathe.pause_s = min(max((time.perf_counter() - asked) / PAUSES_PER_STEP, least), most)
    except Exception as error:
        damage = find_cause(error, DamagedShard)
        if damage is None:
            raise
        raise damage from None


class Breathe:
    """A pause in every turn of Ray Data's executor (an `ExecutionCallback` of Ray Data).

    Its loop spins at full load as long as a finished block waits for room, which is always where reading is faster than
    training, and it shares the interpreter lock of the training worker: without the pause that costs half of the steps.
    The pause follows the time between the batches that training asks for.
    """

    pause_s = EXECUTOR_PAUSE_S[1]

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(Breathe.pause_s)

    def before_execution_starts(self, executor: Any) -> None:
        pass

    def after_execution_succeeds(self, executor: Any) -> None:
        pass

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        pass


def _with_threads(make: MakeBatch, steps: int) -> Iterator[HostBatch]:
    pin = torch.cuda.is_available() and make.config.train.device != "cpu"
    data = make.config.data
    yield from _in_order(partial(make, pin=pin), range(steps), data.readers, data.prefetch)


def _in_order(
    make: Callable[[int], HostBatch], numbers: Iterable[int], threads: int, ahead: int
) -> Iterator[HostBatch]:
    """``make(number)`` of each number in order, by `threads` threads, up to `ahead` of them not yet asked for."""
    with ThreadPoolExecutor(threads, thread_name_prefix="kmtr-read") as pool:
        remaining = iter(numbers)
        pending = deque(pool.submit(make, n) for n in islice(remaining, ahead))
        try:
            while pending:
                batch = pending.popleft().result()
                pending.extend(pool.submit(make, n) for n in islice(remaining, 1))
                yield batch
        finally:
            for future in pending:
                future.cancel()


def find_cause(error: BaseException | None, kind: type[KmtrError]) -> KmtrError | None:
    """The first error of `kind` among an error, its causes and what Ray wrapped; None if there is none."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        error = queue.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, kind):
            lines = str(error).strip().splitlines() or [""]
            marked = [line.partition(f"{kind.__name__}: ")[2] for line in lines if f"{kind.__name__}: " in line]
            return kind(marked[0] if marked else lines[0])  # Ray puts a traceback before, and advice behind
        queue += [error.__cause__, error.__context__, getattr(error, "cause", None)]
    return None


# ------------------------------------------------------------------------------------------------ items -> shards


class Ledger:
    """An actor: which items are under way and which are done, over all tasks of one job (`writing.Journal`).

    It lives as long as the job: what killed a job is not held against the item that was under way.
    """

    def __init__(self) -> None:
        self.begun: dict[int, int] = {}
        self.done: set[int] = set()

    def begin(self, item: int) -> int:
        self.begun[item] = self.begun.get(item, 0) + 1
        return self.begun[item]

    def end(self, item: int) -> None:
        if self.begun.get(item, 0) <= writing.CRASHES:  # else it is refused, and stays so if its shard is made again
            self.begun.pop(item, None)
        self.done.add(item)

    def count(self) -> int:
        return len(self.done)


@dataclasses.dataclass(frozen=True)
class RemoteJournal:
    """`writing.Journal` of a task: a ledger elsewhere."""

    ledger: Any

    def begin(self, item: int) -> int:
        import ray

        return ray.get(self.ledger.begin.remote(item))

    def end(self, item: int) -> None:
        self.ledger.end.remote(item)


def write_dataset(
    write: writing.WriteShards, progress: Callable[[int, int], None]
) -> tuple[Manifest, list[dict[str, str]], writing.Cost]:
    """Write all shards with Ray Data over the cluster, then the manifest. Finished shards of an earlier run are kept.

    A task that dies is run again by Ray, as often as it takes: the ledger knows what it was at, and what ended
    `writing.CRASHES` processes is refused.

    Args:
        progress: called with (subjects done, subjects in all), about once a second.

    Returns:
        The manifest, what was refused, and what the shards of this run cost (memory: of the largest process).

    Raises:
        InputError: every subject was refused, or another command's shards lie there.
        StoreError: a shard can't be written.
    """
    parts = writing.finished(write)
    missing = [number for number in range(len(write.jobs)) if number not in parts]
    subjects = [len(job.items) for job in write.jobs]
    before, total = sum(subjects[number] for number in parts), sum(subjects)
    costs = [writing.Cost(0, 0.0, 0)]
    if before:
        progress(before, total)
    if missing:
        for number, part, cost in _written(write, missing, lambda done: progress(min(before + done, total), total)):
            parts[number] = part
            costs.append(cost)
    cost = writing.Cost(sum(c.subjects for c in costs), sum(c.core_s for c in costs), max(c.peak_bytes for c in costs))
    return *writing.complete(write, parts), cost


@dataclasses.dataclass(frozen=True)
class _WriteTask:
    """What a task of Ray Data does: numbers of missing shards in, what became of them out."""

    write: writing.WriteShards
    missing: Sequence[int]
    journal: RemoteJournal

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        results = []
        for number in block["id"]:
            shard, summary, cost = self.write(self.missing[number], self.journal)
            results.append(json.dumps([dataclasses.asdict(shard), summary, dataclasses.asdict(cost)]))
        return {"number": [self.missing[number] for number in block["id"]], "result": results}


def _written(
    write: writing.WriteShards, missing: Sequence[int], progress: Callable[[int], None]
) -> Iterator[tuple[int, tuple[Shard, dict[str, Any]], writing.Cost]]:
    """Shards in the order in which they are finished."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # ends with the job only
    ledger = ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=here).remote()

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    task = _WriteTask(write, missing, RemoteJournal(ledger))
    dataset = ray.data.range(len(missing), override_num_blocks=min(len(missing), MAX_BLOCKS)).map_batches(
        task.__call__, batch_size=1, num_cpus=1
    )
    with _every_second(lambda: progress(ray.get(ledger.count.remote()))):
        try:
            for row in dataset.iter_rows():
                shard, summary, cost = json.loads(row["result"])
                yield int(row["number"]), (shard_of(shard), summary), writing.Cost(**cost)
        except Exception as error:
            cause = find_cause(error, InputError) or find_cause(error, StoreError)
            if cause is None:
                raise
            raise cause from None
    progress(ray.get(ledger.count.remote()))
    ray.kill(ledger)


@contextmanager
def _every_second(call: Callable[[], object]) -> Iterator[None]:
    """Makes the call once a second, in a thread, until the block ends."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(1.0):
            call()

    thread = threading.Thread(target=loop, name="kmtr-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def read_in_order(
    reader: Reader,
    rows: Iterable[int],
    size: int,
    config: RunConfig,
    labels: Sequence[str] = (),
    purpose: int = sampling.VALIDATION,
) -> Iterator[HostBatch]:
    """Batches of up to `size` subjects of the configuration's full shape in the order given, draws of visit 0: for
    statistics, validation, evaluation.
    """
    numbers = list(rows)
    chunks = [numbers[i : i + size] for i in range(0, len(numbers), size)]

    def make(number: int) -> HostBatch:
        return collate(reader.samples(chunks[number]), config, None, 0, labels, purpose)

    yield from _in_order(make, range(len(chunks)), 1, config.data.prefetch)
