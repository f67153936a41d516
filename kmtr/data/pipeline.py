"""Every Ray Data graph: the plan to batches for training, and items to Parquet shards. The only file with ray.data."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from kmtr.config import RunConfig
from kmtr.data import shards
from kmtr.data.batch import HostBatch, ahead, collate
from kmtr.data.plan import Plan
from kmtr.types import KmtrError, Study

MAX_BLOCKS = 500
"""Ray Data tasks per graph: enough to overlap, few enough to start in seconds."""


SLOTS_PER_BLOCK = 16
"""Steps that one of several readers takes at a time."""

EXECUTOR_PAUSE_S = 0.02
"""Far below a training step, far above a turn of the executor (1 to 2 ms)."""

MIN_AHEAD_BYTES = 64 << 20
"""Object store of a worker's reading: room for blocks that are small beside it."""


# ------------------------------------------------------------------------------------------------ plan -> batches


def batches(
    config: RunConfig,
    reader: shards.Reader,
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
    read = _read_with_ray if config.data.loader == "ray" else _read_with_threads
    tables = read(config, reader, plan, steps, rank, world_size)
    stacked = (collate(table, config, plan.epoch(step), labels) for step, table in zip(steps, tables, strict=True))
    yield from ahead(stacked, config.data.prefetch)


class ReadSlots:
    """An actor of Ray Data that reads this worker's slots (steps), one Arrow table each; it keeps the footers."""

    def __init__(self, reader: shards.Reader, plan: Plan, first: int, rank: int, world_size: int):
        self.reader, self.plan, self.first = reader, plan, first
        self.rank, self.world_size = rank, world_size

    def __call__(self, slots: pa.Table) -> Iterator[pa.Table]:
        for slot in slots.column("item").to_pylist():
            yield self.reader.read(self.plan.share(self.first + slot, self.rank, self.world_size))


def _read_with_ray(
    config: RunConfig, reader: shards.Reader, plan: Plan, steps: range, rank: int, world_size: int
) -> Iterator[pa.Table]:
    import ray
    from ray.data import ActorPoolStrategy, ExecutionResources

    share = plan.global_batch // world_size
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # Else Ray Data reads ahead until the object store is full, and takes the processors from training meanwhile.
    bytes_ahead = (config.data.prefetch + 2) * config.data.readers * share * reader.bytes_per_row
    context.execution_options.resource_limits = ExecutionResources(
        object_store_memory=max(bytes_ahead, MIN_AHEAD_BYTES)
    )
    context.target_max_block_size = max(share * reader.bytes_per_row, 1 << 20)  # else 128 MiB gather before the first
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.custom_execution_callback_classes = [Breathe]
    # One reader streams all slots out of one block. from_items, since range and from_arrow run tasks that want a whole
    # CPU, which workers and readers may have taken. An actor, since Ray ends idle task processes, and starting one
    # costs seconds.
    readers = config.data.readers
    blocks = 1 if readers == 1 else min(-(-len(steps) // SLOTS_PER_BLOCK), MAX_BLOCKS)
    dataset = ray.data.from_items(list(range(len(steps))), override_num_blocks=blocks).map_batches(
        ReadSlots,
        fn_constructor_args=(reader, plan, steps.start, rank, world_size),
        compute=ActorPoolStrategy(size=readers),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=config.data.read_cpus,
    )
    try:
        yield from dataset.iter_batches(batch_size=share, batch_format="pyarrow", prefetch_batches=config.data.prefetch)
    except Exception as error:
        damage = find_cause(error, shards.DamagedShard)
        if damage is None:
            raise
        raise damage from None


class Breathe:
    """A pause in every turn of Ray Data's executor (an `ExecutionCallback` of Ray Data).

    Its loop spins at full load as long as a finished block waits for room, which is always where reading is faster than
    training, and it shares the interpreter lock of the training worker: without the pause that costs half of the steps.
    """

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(EXECUTOR_PAUSE_S)

    def before_execution_starts(self, executor: Any) -> None:
        pass

    def after_execution_succeeds(self, executor: Any) -> None:
        pass

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        pass


def _read_with_threads(
    config: RunConfig, reader: shards.Reader, plan: Plan, steps: range, rank: int, world_size: int
) -> Iterator[pa.Table]:
    def read(step: int) -> pa.Table:
        return reader.read(plan.share(step, rank, world_size))

    with ThreadPoolExecutor(1, thread_name_prefix="kmtr-read") as pool:
        remaining = iter(steps)
        pending: list[Future[pa.Table]] = [pool.submit(read, s) for s in islice(remaining, config.data.prefetch)]
        try:
            while pending:
                table = pending.pop(0).result()
                pending.extend(pool.submit(read, s) for s in islice(remaining, 1))
                yield table
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


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """One shard to write: the items (numbers) whose studies go into it."""

    name: str
    split: str
    items: tuple[int, ...]


def shard_jobs(subject_ids: Sequence[str], rows: int, split: str) -> list[ShardJob]:
    """Distribute items over shards of each split.

    Args:
        subject_ids: pseudonym of each item.
        rows: subjects per shard.
        split: ``config.shards.split``.
    """
    hashed = split == "hash" or (split == "auto" and len(subject_ids) >= shards.MIN_SPLIT_SUBJECTS)
    members: dict[str, list[int]] = {name: [] for name in shards.SPLITS}
    for item, subject_id in enumerate(subject_ids):
        members[shards.split_of(subject_id) if hashed else "train"].append(item)
    return [
        ShardJob(f"{name}-{start // rows:05d}", name, tuple(items[start : start + rows]))
        for name, items in members.items()
        for start in range(0, len(items), rows)
    ]


@dataclasses.dataclass(frozen=True)
class WriteShards:
    """What a Ray Data task does to write shards: skip what is finished, refuse what can't be read, report both."""

    root: str
    jobs: list[ShardJob]
    make: Callable[[int], Study]
    dtype: str

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        import json

        results = []
        for number in block["id"]:
            job = self.jobs[number]
            refused: list[str] = []
            part = shards.finished_shard(self.root, job.name)
            if part is None:
                studies = self._studies(job, refused)
                part = shards.write_shard(self.root, job.name, job.split, studies, self.dtype)
            results.append(json.dumps([dataclasses.asdict(part[0]), part[1], refused]))
        return {"number": list(block["id"]), "result": results}

    def _studies(self, job: ShardJob, refused: list[str]) -> Iterator[Study]:
        for item in job.items:
            try:
                study = self.make(item)
                shards.check_finite(study)
                yield study
            except KmtrError as error:
                refused.append(str(error))


def write_dataset(
    root: str,
    jobs: Sequence[ShardJob],
    make: Callable[[int], Study],
    dtype: str,
    source: str,
    progress: Callable[[int, int], None],
) -> tuple[shards.Manifest, list[str]]:
    """Write all shards with Ray Data over the cluster, then the manifest. Finished shards of an earlier run are kept.

    Args:
        make: item number -> Study; pure, runs in a Ray task. A KmtrError refuses that subject, not the others.
        progress: called with (subjects done, subjects in all).

    Returns:
        The manifest, and one line for each refused subject.

    Raises:
        InputError: every subject was refused (the first one's reason).
    """
    import json

    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    write = WriteShards(root, list(jobs), make, dtype)
    dataset = ray.data.range(len(jobs), override_num_blocks=min(len(jobs), MAX_BLOCKS)).map_batches(
        write.__call__, batch_size=1, num_cpus=1
    )
    parts: dict[int, tuple[shards.Shard, dict[str, Any]]] = {}
    refused: list[str] = []
    done, total = 0, sum(len(job.items) for job in jobs)
    for row in dataset.iter_rows():
        shard, summary, bad = json.loads(row["result"])
        number = int(row["number"])
        parts[number] = (shards.Shard(**shard), summary)
        refused += bad
        done += len(jobs[number].items)
        progress(done, total)
    if not any(shard.rows for shard, _ in parts.values()):
        raise shards.InputError(refused[0] if refused else "source: expected at least one subject, got none")
    return shards.write_manifest(root, [parts[n] for n in sorted(parts)], dtype, source), refused


def read_in_order(
    reader: shards.Reader,
    rows: Iterable[int],
    size: int,
    config: RunConfig,
    labels: Sequence[str] = (),
    purpose: int = 4,
) -> Iterator[HostBatch]:
    """Batches of up to `size` subjects in the order given, patterns of epoch 0: for statistics,
    validation, evaluation.
    """
    numbers = list(rows)
    chunks = (numbers[i : i + size] for i in range(0, len(numbers), size))
    yield from ahead((collate(reader.read(c), config, 0, labels, purpose) for c in chunks), config.data.prefetch)
