"""The writing of a dataset with Ray Data: a task per shard, over the whole cluster."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from kmtr.data.dataset import writing
from kmtr.data.dataset.manifest import Manifest, Shard, shard_of
from kmtr.data.dataset.storage import StoreError
from kmtr.ray_start import MAX_BLOCKS
from kmtr.types import InputError, find_cause


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
    """Task of Ray Data: numbers of missing shards in, what became of them out."""

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
