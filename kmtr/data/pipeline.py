"""Every Ray Data graph: the plan to batches for training, and items to Parquet shards. The only file with ray.data."""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class ReadSlots:
    """Rows of this worker's slots (steps), as one Arrow table: what a Ray Data task does."""

    reader: shards.Reader
    plan: Plan
    first: int
    rank: int
    world_size: int

    def __call__(self, slots: pa.Table) -> pa.Table:
        steps = slots.column("id").to_pylist()
        rows = [self.plan.share(self.first + step, self.rank, self.world_size) for step in steps]
        return self.reader.read(np.concatenate(rows))


def _read_with_ray(
    config: RunConfig, reader: shards.Reader, plan: Plan, steps: range, rank: int, world_size: int
) -> Iterator[pa.Table]:
    import ray

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    slots = ray.data.range(len(steps), override_num_blocks=min(len(steps), MAX_BLOCKS))
    dataset = slots.map_batches(
        ReadSlots(reader, plan, steps.start, rank, world_size).__call__,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=config.data.read_cpus,
    )
    try:
        yield from dataset.iter_batches(
            batch_size=plan.global_batch // world_size, batch_format="pyarrow", prefetch_batches=config.data.prefetch
        )
    except Exception as error:
        damage = find_cause(error, shards.DamagedShard)
        if damage is None:
            raise
        raise damage from None


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
            return kind(str(error).strip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__name__}: "))
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
    """Batches of up to `size` subjects in the order given, patterns of epoch 0: for statistics, validation, evaluation."""
    numbers = list(rows)
    chunks = (numbers[i : i + size] for i in range(0, len(numbers), size))
    yield from ahead((collate(reader.read(c), config, 0, labels, purpose) for c in chunks), config.data.prefetch)
