"""Stored rows fetched, stacked and padded in the host's memory: a host batch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from kmtr.config import Data, RunConfig
from kmtr.data.dataset import record
from kmtr.data.dataset.files import run_many
from kmtr.data.loader import patterns
from kmtr.data.loader.batch import NOTHING, Wanted
from kmtr.data.loader.buckets import Shape
from kmtr.data.loader.device import HostBatch
from kmtr.data.loader.masks import read_masks, spacing_mm
from kmtr.data.loader.samples import Samples
from kmtr.data.loader.shapes import choose, full_shape, places_of, slots_of
from kmtr.physics import sampling
from kmtr.physics.fourier import crop_or_pad, fft2c, fftc, ifft2c, ifftc


def collate(
    samples: Samples,
    config: RunConfig,
    shape: Shape | None = None,
    epoch: int | np.ndarray = 0,
    wanted: Wanted = NOTHING,
    purpose: int = sampling.PATTERN,
    repeated: np.ndarray | None = None,
    real: int | None = None,
    pin: bool = False,
) -> HostBatch:
    """Fetch samples into one buffer.

    Args:
        shape: of the batch; the configuration's full shape where not given.
        epoch: which pass over the data this is, of all or of each sample; seeds every draw.
        wanted: what the batch carries beside k-space.
        purpose: the stream of the pattern; validation has its own, drawn anew for no epoch.
        repeated: samples that only fill up the batch.
        real: see `HostBatch`; all of these samples where not given.
        pin: page-locked memory, for a copy to the device that does not wait.
    """
    patterns.check(config)
    data = config.data
    shape = full_shape(data) if shape is None else shape
    meta, size = samples.meta, len(samples.meta)
    filled = _Filled.empty(_memory(samples, data, shape, pin))
    columns = {c: meta.column(c).to_pylist() for v in data.views for c in (f"shape_{v}", f"acquired_{v}")}
    reads: list[Callable[[], object]] = []
    for row in range(size):
        for view, slots in places_of(data, shape):
            source, packed = columns[f"shape_{view}"][row], columns[f"acquired_{view}"][row]
            reads += filled.add(samples, config, (row, view), slots, source, packed)
    run_many(reads, samples.in_flight)
    keys = [sampling.subject_key(value) for value in meta.column("subject_id").to_pylist()]
    named = [meta.column(name).to_numpy() for name in wanted.labels]
    arrays = {
        "scale": meta.column("scale").to_numpy().astype(np.float32),
        "acquired": filled.acquired,
        "given": filled.given,
        "padded": filled.padded,
        "extent": filled.extent,
        "labels": np.array(named, np.float32).reshape(len(named), size).T.copy(),
        "key": np.array(keys, np.uint64).view(np.int64),
        "epoch": np.broadcast_to(np.asarray(epoch, np.int64), size).copy(),
        "repeated": np.zeros(size, bool) if repeated is None else repeated,
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if wanted.masks:
        tensors |= read_masks(samples, data, shape, pin)
    if wanted.masks or wanted.spacing:
        tensors["spacing_mm"] = spacing_mm(samples, data, shape)
    return HostBatch(config, filled.tensor, tensors, shape, size if real is None else real, purpose)


def _memory(samples: Samples, data: Data, shape: Shape, pin: bool) -> Tensor:
    """Room for the stored values of a batch, ``batch slice coil t ky kx 2``, not cleared."""
    meta = samples.meta
    exact = not data.crop or all(
        s is None or s[-2:] == list(data.matrix) for v in data.views for s in meta.column(f"shape_{v}").to_pylist()
    )
    dtype = samples.dtype if exact else np.dtype(np.float32)
    whole = (len(meta), len(slots_of(data, shape[0])), *shape[1:], 2)
    if pin:
        return torch.empty(whole, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True)
    return torch.from_numpy(buffer(math.prod(whole) * dtype.itemsize).view(dtype).reshape(whole))


@dataclass(frozen=True)
class _Filled:
    """The arrays of a host batch while its slices are filled one view after the other; see `HostBatch`."""

    tensor: Tensor
    stored: np.ndarray
    acquired: np.ndarray
    given: np.ndarray
    padded: np.ndarray
    extent: np.ndarray

    @staticmethod
    def empty(tensor: Tensor) -> _Filled:
        size, slices, _, frames, ny, _, _ = tensor.shape
        return _Filled(
            tensor,
            tensor.numpy(),
            acquired=np.zeros((size, slices, frames, ny), bool),
            given=np.zeros((size, slices), bool),
            padded=np.ones((size, slices, frames), bool),
            extent=np.zeros((size, slices, 3), np.int64),
        )

    def add(
        self,
        samples: Samples,
        config: RunConfig,
        subject: tuple[int, str],
        slots: slice,
        source: list[int] | None,
        packed: bytes | None,
    ) -> list[Callable[[], object]]:
        """Fill the slots of one view of a subject.

        Args:
            subject: row of the samples, and the view.
            source: shape ``slice coil t ky kx`` as stored; None: the subject lacks the view.
            packed: the source's own pattern, where it was undersampled.

        Returns:
            Reads that are left to do, straight into the batch: those of views of exactly its shape.
        """
        reads: list[Callable[[], object]] = []
        row, view = subject
        here = self.stored[row, slots]
        if source is None:
            here[...] = 0
            return reads
        count, coils, frames, ny, nx = here.shape[:-1]
        if list(here.shape[:-1]) == source:
            reads.append(partial(samples.fetch, row, view, source, here))
            z, t = np.arange(count), np.arange(frames)
            y0, lines, seen = 0, ny, (coils, ny, nx)
        else:
            z, t = choose(source[0], count, centred=True), choose(source[2], frames, centred=False)
            values = samples.fetch(row, view, source)
            assert values is not None
            values = values[z][:, :, t]
            if config.data.crop:
                values = _crop(values, config.data.matrix, undersampled=packed is not None)
            lines, readout = values.shape[-3:-1]
            y0, x0 = ny // 2 - lines // 2, nx // 2 - readout // 2
            here[...] = 0
            here[: len(z), : source[1], : len(t), y0 : y0 + lines, x0 : x0 + readout] = values
            seen = (source[1], lines, readout)
        where = slice(slots.start, slots.start + len(z))
        self.extent[row, where] = seen
        self.padded[row, where, : len(t)] = False
        if packed is None:
            if (table := patterns.table(config.sampling)) is not None:
                patterns.check_lines(table, view, lines)
            self.acquired[row, where, : len(t), y0 : y0 + lines] = True
        else:
            pattern = record.unpack(packed, (source[0], source[2], source[3]))
            self.acquired[row, where, : len(t), y0 : y0 + lines] = pattern[z][:, t]
            self.given[row, where] = True
        return reads


KEPT_BUFFERS = 8
_buffers: list[np.ndarray] = []
_buffers_lock = Lock()


def buffer(size: int) -> np.ndarray:
    """`size` bytes of host memory, used before where possible: fresh pages cost as much as the copy into them.

    A buffer is free again when nobody refers to it or a view of it any more.
    """
    with _buffers_lock:
        for kept in _buffers:
            if kept.nbytes == size and sys.getrefcount(kept) <= 3:  # the list, this loop, the argument
                return kept
        fresh = np.empty(size, np.uint8)
        if len(_buffers) == KEPT_BUFFERS:
            _buffers.pop(0)
        _buffers.append(fresh)
        return fresh


def _crop(values: np.ndarray, matrix: tuple[int, int], undersampled: bool) -> np.ndarray:
    """Crop or pad in the image domain; of an undersampled source only along the (complete) readout."""
    if values.shape[-3:-1] == matrix:
        return values
    kspace = torch.view_as_complex(torch.from_numpy(values.astype(np.float32)))
    if undersampled:
        kspace = fftc(crop_or_pad(ifftc(kspace, (-1,)), matrix[1:], (-1,)), (-1,))
    else:
        kspace = fft2c(crop_or_pad(ifft2c(kspace), matrix, (-2, -1)))
    return torch.view_as_real(kspace).numpy()
