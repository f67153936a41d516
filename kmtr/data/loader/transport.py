"""Host batches between processes: one row of an Arrow table each, without a copy."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pyarrow as pa
import torch

from kmtr.config import RunConfig
from kmtr.data.dataset import pages
from kmtr.data.loader.device import HostBatch


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
