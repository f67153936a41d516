"""Batches made by actors of Ray Data, streamed to the training worker through the object store."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kmtr.config import RunConfig
from kmtr.data.dataset import pages
from kmtr.data.dataset.manifest import DamagedShard
from kmtr.data.loader.device import HostBatch
from kmtr.data.loader.threads import in_order
from kmtr.ray_start import MAX_BLOCKS
from kmtr.types import find_cause

MIN_AHEAD_BYTES = 64 << 20
"""Object store of a worker's reading: room for blocks that are small beside it."""

EXECUTOR_PAUSE_S = (0.002, 0.02)
"""At least and at most: far above a turn of the executor (1 ms) where steps allow it."""

PAUSES_PER_STEP = 10


class ReadSteps:
    """An actor of Ray Data: steps in, each one's host batch out as one row that Ray neither merges nor splits."""

    def __init__(self, make: Callable[[int], HostBatch]):
        self.make = make

    def __call__(self, steps: pa.Table) -> Iterator[pa.Table]:
        numbers = steps.column("item").to_pylist()
        yield from (pack(batch) for batch in in_order(self.make, numbers, 1, 1))


def stream(make: Callable[[int], HostBatch], steps: int, config: RunConfig, largest: int) -> Iterator[HostBatch]:
    """``make(number)`` of ``range(steps)`` in order, by actors of Ray Data.

    Args:
        largest: bytes of a batch at most.

    Raises:
        DamagedShard: a file is not what the manifest says.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

    data = config.data
    context = DataContext.get_current()
    block_size = context.target_max_block_size
    context.execution_options.preserve_order = True
    # Else Ray Data reads ahead until the object store is full, and takes the processors from training meanwhile.
    context.execution_options.resource_limits = ExecutionResources(
        object_store_memory=max((data.prefetch + 2) * data.readers * largest, MIN_AHEAD_BYTES)
    )
    context.target_max_block_size = 1  # a block is a batch, whatever its size
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.custom_execution_callback_classes = [PausedExecution]
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
            yield unpack(table, config)
            # What the consumer took, not what it waited for: else a slow executor would slow itself down.
            least, most = EXECUTOR_PAUSE_S
            PausedExecution.pause_s = min(max((time.perf_counter() - asked) / PAUSES_PER_STEP, least), most)
    except Exception as error:
        damage = find_cause(error, DamagedShard)
        if damage is None:
            raise
        raise damage from None


class PausedExecution:
    """A pause in every turn of Ray Data's executor (an `ExecutionCallback` of Ray Data).

    Its loop spins at full load as long as a finished block waits for room, which is always where reading is faster than
    training, and it shares the interpreter lock of the training worker: without the pause that costs half of the steps.
    The pause follows the time between the batches that training asks for.
    """

    pause_s = EXECUTOR_PAUSE_S[1]

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(PausedExecution.pause_s)

    def before_execution_starts(self, executor: Any) -> None:
        pass

    def after_execution_succeeds(self, executor: Any) -> None:
        pass

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        pass


def pack(batch: HostBatch) -> pa.Table:
    """A host batch as one row of an Arrow table, without a copy."""
    arrays = {"stored": batch.stored} | batch.meta
    names = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in arrays.items()}
    header = json.dumps({"arrays": names, "shape": batch.shape, "real": batch.real, "purpose": batch.purpose})
    columns = {name: _value(t.numpy().reshape(-1).view(np.uint8).data) for name, t in arrays.items()}
    return pa.table(columns | {"header": pa.array([header])})


def unpack(table: pa.Table, config: RunConfig) -> HostBatch:
    """Inverse of `pack`; the tensors are views of Arrow's (read-only) memory."""
    header = json.loads(table.column("header")[0].as_py())
    tensors = {}
    for name, (dtype, shape) in header["arrays"].items():
        content = pages.payload_of(table.column(name), 0)
        array = np.frombuffer(content if content is not None else b"", dtype).reshape(shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to a host batch
            tensors[name] = torch.from_numpy(array)
    shape = header["shape"]
    return HostBatch(config, tensors.pop("stored"), tensors, tuple(shape), header["real"], header["purpose"])


def _value(content: memoryview) -> pa.Array:
    """One large binary value around existing memory."""
    offsets = pa.py_buffer(np.array([0, len(content)], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(content)])
