"""From stored rows to a `Batch` on the worker's device: fetch, stack and pad here; cast, augment and draw there."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from kmtr.config import Augment, Data, RunConfig
from kmtr.data.dataset import pages, record
from kmtr.data.dataset.files import run_many
from kmtr.data.dataset.reader import Dataset, Samples
from kmtr.data.loader import patterns
from kmtr.data.loader.buckets import Shape
from kmtr.physics import random, sampling
from kmtr.physics.augment import augment
from kmtr.physics.fourier import centred, crop_or_pad, fft2c, fftc, ifft2c, ifftc
from kmtr.types import InputError


@dataclass(frozen=True)
class Batch:
    """Subjects of one step on one device.

    Smaller subjects are padded: slices and frames at the end, lines and readout around the centre of k-space, coils at
    the end.

    Attributes:
        kspace: as stored (augmented where asked for), everything the source acquired; zeros where padded.
        acquired: lines that the source has.
        sampled: those of them that the (simulated) scanner acquired.
        hidden: sampled lines withheld from the encoder in masked pretraining.
        targets: lines that masked pretraining predicts: hidden ones, or also those that only the source has.
        hidden_patches: image patches withheld from the image encoder; images have the configuration's full matrix.
        padded: slots of slice and frame that hold no data.
        extent: coils, ny and nx of each slice.
        labels: float, NaN = unknown; in the order of the labels that were asked for.
        key: stable key of each subject (`physics.sampling.subject_key`), as signed 64 bit; equal keys = same subject.
        repeated: subjects that only fill up the last batch of an epoch: no loss counts them.
        slots: slice slot of the configuration that each slice of the batch is.
        real: subjects of the GLOBAL batch that are not repeated.
        same: whether coils and readout of all subjects fill the batch.
        visit: which pass over each subject this is, in training; None elsewhere: nothing is drawn anew.
    """

    kspace: Complex[Tensor, "batch slice coil t ky kx"]
    acquired: Bool[Tensor, "batch slice t ky"]
    sampled: Bool[Tensor, "batch slice t ky"]
    hidden: Bool[Tensor, "batch slice t ky"]
    targets: Bool[Tensor, "batch slice t ky"]
    hidden_patches: Bool[Tensor, "batch slice pt py px"]
    padded: Bool[Tensor, "batch slice t"]
    extent: Int[Tensor, "batch slice 3"]
    labels: Float[Tensor, "batch label"]
    key: Int[Tensor, " batch"]
    repeated: Bool[Tensor, " batch"]
    slots: tuple[int, ...]
    real: int
    same: bool
    visit: Int[Tensor, " batch"] | None = None

    def __len__(self) -> int:
        return len(self.key)

    def __getitem__(self, index: slice) -> Batch:
        tensors: dict[str, Any] = {
            f.name: v[index] for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)

    @property
    def existing(self) -> Bool[Tensor, "batch slice t ky"]:
        """Lines that a fully sampled scan would have: those of no padding."""
        return existing(self.padded, self.extent[..., 1], self.kspace.shape[-2])


def existing(
    padded: Bool[Tensor, "batch slice t"], ny: Int[Tensor, "batch slice"], lines: int
) -> Bool[Tensor, "batch slice t ky"]:
    """Lines that are no padding, of slices with `ny` lines in the middle of `lines`."""
    return ~padded[..., None] & centred(ny, lines)[:, :, None]


@dataclass(frozen=True)
class HostBatch:
    """What `collate` leaves for the device: stored values, and what the draws need.

    Attributes:
        stored: float16 or float32 ``batch slice coil t ky kx 2``.
        meta: ``scale``, ``acquired`` (of the source), ``given`` (slices whose source was undersampled), ``padded``,
            ``extent``, ``labels``, ``key``, ``visit``, ``repeated``.
        shape: of the batch.
        real: subjects of the global batch that are not repeated.
        purpose: the stream of the pattern.
    """

    config: RunConfig
    stored: Tensor
    meta: dict[str, Tensor]
    shape: Shape
    real: int
    purpose: int

    def __len__(self) -> int:
        return len(self.stored)

    def to(self, device: torch.device, readout: int | None = None) -> Batch:
        """One (pinned) copy; cast, scale, augmentation, pattern and hiding where the batch will live.

        Args:
            readout: central kx samples that are needed; None: all, as images do. What is not needed is not even cast.
        """
        stored = self.stored
        if readout is not None and readout < stored.shape[-2] and self.config.augment == Augment():
            first = stored.shape[-2] // 2 - readout // 2
            stored = stored[..., first : first + readout, :]
        if device.type == "cuda" and not stored.is_pinned():
            stored = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=True).copy_(stored)
        meta = {name: tensor.to(device, non_blocking=True) for name, tensor in self.meta.items()}
        values = stored.to(device, non_blocking=True).float() * meta["scale"].view(-1, *[1] * (stored.ndim - 1))
        kspace, acquired, given = torch.view_as_complex(values), meta["acquired"], meta["given"]
        config, key, visit = self.config, meta["key"], meta["visit"]
        if self.purpose == sampling.PATTERN:
            kspace, acquired = augment(
                kspace, acquired, meta["extent"][..., 1:].amax(1), config.augment, config.seed, visit, key, given.any(1)
            )
        slots = slots_of(config.data, self.shape[0])
        sampled, hidden, targets, patches = draw(
            config, meta["extent"][..., 1], acquired, given, meta["padded"], slots, key, visit, self.purpose
        )
        return Batch(
            kspace=kspace,
            acquired=acquired,
            sampled=sampled,
            hidden=hidden,
            targets=targets,
            hidden_patches=patches,
            padded=meta["padded"],
            extent=meta["extent"],
            labels=meta["labels"],
            key=key,
            repeated=meta["repeated"],
            slots=slots,
            real=self.real,
            same=self._same,
            visit=visit if self.purpose == sampling.PATTERN else None,
        )

    @property
    def _same(self) -> bool:
        extent = self.meta["extent"][~self.meta["padded"].all(-1)]
        return bool((extent[:, 0] == self.shape[1]).all() and (extent[:, 2] == self.shape[4]).all())

    @property
    def padding(self) -> float:
        """Share of `stored` that is padding."""
        cells = int(((~self.meta["padded"]).sum(2) * self.meta["extent"].prod(2)).sum())
        return 1 - 2 * cells / self.stored.numel()


# ------------------------------------------------------------------------------------------------------------- shapes


def full_shape(data: Data) -> Shape:
    """The largest batch shape of a configuration."""
    return (data.sax_slices if "sax" in data.views else 0, data.coils, data.frames, *data.matrix)


def shape_of(config: RunConfig, subject: dict[str, list[int]]) -> Shape:
    """The smallest batch shape that holds a subject (view -> ``slice coil t ky kx``)."""
    data, patch = config.data, config.model.patch[0]
    views = [subject[view] for view in data.views if view in subject]
    if not views:
        return (1 if "sax" in data.views else 0, 1, patch, 8, 8)
    sax = min(subject["sax"][0], data.sax_slices) if "sax" in subject else 1
    frames = min(max(view[2] for view in views), data.frames)
    matrix = data.matrix if data.crop else (max(view[3] for view in views), max(view[4] for view in views))
    coils = max(view[1] for view in views)
    return (sax if "sax" in data.views else 0, coils, -(-frames // patch) * patch, *matrix)


def cells_of(config: RunConfig, subject: dict[str, list[int]]) -> int:
    """Complex samples of a subject that enter a batch."""
    data, cells = config.data, 0
    for view in data.views:
        if view in subject:
            slices, coils, frames, ny, nx = subject[view]
            ny, nx = data.matrix if data.crop else (ny, nx)
            cells += min(slices, data.slots(view)) * coils * min(frames, data.frames) * ny * nx
    return cells


def cells_in(data: Data, shapes: np.ndarray) -> np.ndarray:
    """Complex samples of one subject in batches of these shapes, ``... 5`` -> ``...``."""
    long_axis = sum(view != "sax" for view in data.views)
    return (shapes[..., 0] + long_axis) * np.prod(shapes[..., 1:], axis=-1, dtype=np.int64)


def slots_of(data: Data, sax_slices: int) -> tuple[int, ...]:
    """Slice slot of the configuration that each slice of a batch with so many short-axis slices is."""
    slots: list[int] = []
    first = 0
    for view in data.views:
        slots += range(first, first + (sax_slices if view == "sax" else 1))
        first += data.slots(view)
    return tuple(slots)


def check_shapes(config: RunConfig, dataset: Dataset) -> None:
    """Whether a dataset can feed this configuration, found before a worker starts.

    Raises:
        InputError: a view is missing, there are more coils than the configuration has, a matrix is larger, too few
            lines would be left, or the pattern file is of another number of lines.
    """
    data = config.data
    patterns.check(config)
    table = patterns.table(config.sampling)
    for view in data.views:
        if view not in dataset.shapes:
            have = ",".join(dataset.shapes)
            raise InputError(f"data.views: expected views of the dataset ({have}), got {view}; set data.views={have}")
        for slices, coils, frames, ny, nx in dataset.shapes[view]:
            if coils > data.coils:
                raise InputError(f"data.coils: {view} of the dataset has {coils} coils, got data.coils={data.coils}")
            if (ny > data.matrix[0] or nx > data.matrix[1]) and not data.crop:
                raise InputError(
                    f"data.matrix: {view} of the dataset is {ny} x {nx}, got {data.matrix[0]} x {data.matrix[1]}; "
                    f"set data.matrix={ny},{nx}, or data.crop=true to crop or pad it"
                )
            if ny != data.matrix[0] and data.crop and view in dataset.undersampled:
                raise InputError(
                    f"data.matrix: {view} is undersampled along ky, so its {ny} lines can't become {data.matrix[0]}"
                )
            if frames < data.frames / 2 or slices == 0:
                raise InputError(
                    f"data.frames: {view} of the dataset has {frames} frames, got data.frames={data.frames}"
                )
            lines = data.matrix[0] if data.crop else ny
            if table is not None:
                patterns.check_lines(table, view, lines)
                continue
            for key in ("sampling", "evaluate"):
                for r in getattr(config, key).accelerations:
                    try:
                        sampling.check(lines, r, config.sampling.acs_lines, config.sampling.family)
                    except InputError as error:
                        raise InputError(f"{key}.accelerations: {view}: {error}") from None


def unreached(data: Data, dataset: Dataset) -> str:
    """What of the configuration's full shape no subject fills, as a line of advice; empty: all is filled."""
    shapes = [shape for view in data.views for shape in dataset.shapes.get(view, [])]
    if not shapes or data.crop:
        return ""
    _, coils, _, ny, nx = (max(sizes) for sizes in zip(*shapes, strict=True))
    if coils < data.coils:
        return f"data.coils: no subject has more than {coils} coils, got {data.coils}; set data.coils={coils}"
    if (ny, nx) != data.matrix:
        return (
            f"data.matrix: no subject is larger than {ny} x {nx}, got {data.matrix[0]} x {data.matrix[1]}, so images "
            f"are interpolated; set data.matrix={ny},{nx}"
        )
    return ""


def choose(available: int, wanted: int, centred: bool) -> np.ndarray:
    """Indices of `wanted` of `available` items, evenly spread; all of them where there are fewer.

    `centred` takes the middle of equal stretches (slices: neither the outermost base nor apex); else the first of each
    (frames: frame 0 stays).
    """
    if available <= wanted:
        return np.arange(available)
    return np.floor((np.arange(wanted) + (0.5 if centred else 0.0)) * available / wanted).astype(int)


# ------------------------------------------------------------------------------------------------------------ collate


def collate(
    samples: Samples,
    config: RunConfig,
    shape: Shape | None = None,
    visit: int | np.ndarray = 0,
    labels: Sequence[str] = (),
    purpose: int = sampling.PATTERN,
    repeated: np.ndarray | None = None,
    real: int | None = None,
    pin: bool = False,
) -> HostBatch:
    """Fetch samples into one buffer.

    Args:
        shape: of the batch; the configuration's full shape where not given.
        visit: which pass over the data this is, of all or of each sample; seeds every draw.
        purpose: the stream of the pattern; validation has its own, drawn anew for no epoch.
        repeated: samples that only fill up the batch.
        real: see `HostBatch`; all of these samples where not given.
        pin: page-locked memory, for a copy to the device that does not wait.
    """
    patterns.check(config)
    data, table = config.data, patterns.table(config.sampling)
    shape = full_shape(data) if shape is None else shape
    sax, coils, frames, ny, nx = shape
    meta, slots = samples.meta, slots_of(data, sax)
    size = len(meta)
    exact = not data.crop or all(
        s is None or s[-2:] == list(data.matrix) for v in data.views for s in meta.column(f"shape_{v}").to_pylist()
    )
    dtype = samples.dtype if exact else np.dtype(np.float32)
    whole = (size, len(slots), coils, frames, ny, nx, 2)
    if pin:
        tensor = torch.empty(whole, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True)
    else:
        tensor = torch.from_numpy(buffer(math.prod(whole) * dtype.itemsize).view(dtype).reshape(whole))
    stored = tensor.numpy()
    acquired = np.zeros((size, len(slots), frames, ny), bool)
    given = np.zeros((size, len(slots)), bool)
    padded = np.ones((size, len(slots), frames), bool)
    extent = np.zeros((size, len(slots), 3), np.int64)
    reads: list[Callable[[], object]] = []
    columns = {c: meta.column(c).to_pylist() for v in data.views for c in (f"shape_{v}", f"acquired_{v}")}
    for row in range(size):
        first = 0
        for view in data.views:
            count = sax if view == "sax" else 1
            source = columns[f"shape_{view}"][row]
            here = stored[row, first : first + count]
            slot, first = first, first + count
            if source is None:
                here[...] = 0
                continue
            packed = columns[f"acquired_{view}"][row]
            if list(here.shape[:-1]) == source:
                reads.append(partial(samples.fetch, row, view, source, here))
                z, t = np.arange(count), np.arange(frames)
                y0, lines, seen = 0, ny, (coils, ny, nx)
            else:
                z, t = choose(source[0], count, centred=True), choose(source[2], frames, centred=False)
                values = samples.fetch(row, view, source)
                assert values is not None
                values = values[z][:, :, t]
                if data.crop:
                    values = _crop(values, data.matrix, undersampled=packed is not None)
                lines, readout = values.shape[-3:-1]
                y0, x0 = ny // 2 - lines // 2, nx // 2 - readout // 2
                here[...] = 0
                here[: len(z), : source[1], : len(t), y0 : y0 + lines, x0 : x0 + readout] = values
                seen = (source[1], lines, readout)
            where = slice(slot, slot + len(z))
            extent[row, where] = seen
            padded[row, where, : len(t)] = False
            if packed is None:
                if table is not None:
                    patterns.check_lines(table, view, lines)
                acquired[row, where, : len(t), y0 : y0 + lines] = True
            else:
                pattern = record.unpack(packed, (source[0], source[2], source[3]))
                acquired[row, where, : len(t), y0 : y0 + lines] = pattern[z][:, t]
                given[row, where] = True
    run_many(reads, samples.in_flight)
    keys = [sampling.subject_key(value) for value in meta.column("subject_id").to_pylist()]
    named = [meta.column(name).to_numpy() for name in labels]
    arrays = {
        "scale": meta.column("scale").to_numpy().astype(np.float32),
        "acquired": acquired,
        "given": given,
        "padded": padded,
        "extent": extent,
        "labels": np.array(named, np.float32).reshape(len(labels), size).T.copy(),
        "key": np.array(keys, np.uint64).view(np.int64),
        "visit": np.broadcast_to(np.asarray(visit, np.int64), size).copy(),
        "repeated": np.zeros(size, bool) if repeated is None else repeated,
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return HostBatch(config, tensor, tensors, shape, size if real is None else real, purpose)


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


def draw(
    config: RunConfig,
    ny: Int[Tensor, "batch slice"],
    acquired: Bool[Tensor, "batch slice t ky"],
    given: Bool[Tensor, "batch slice"],
    padded: Bool[Tensor, "batch slice t"],
    slots: tuple[int, ...],
    key: Int[Tensor, " batch"],
    visit: Int[Tensor, " batch"],
    purpose: int,
) -> tuple[
    Bool[Tensor, "batch slice t ky"],
    Bool[Tensor, "batch slice t ky"],
    Bool[Tensor, "batch slice t ky"],
    Bool[Tensor, "batch slice pt py px"],
]:
    """Pattern, hidden and target lines, hidden patches of each subject: functions of (seed, visit, subject) alone.

    Slices are numbered as in the configuration's full shape and lines from the centre, so that a subject gets the same
    numbers in a batch of any shape. A source that was undersampled by its scanner (`given`) keeps its own pattern.
    """
    data, seed = config.data, config.seed
    frames, lines = acquired.shape[2:]
    rows = torch.tensor(slots, device=acquired.device)
    grid, centre = (data.slices, frames, lines), (0, 0, lines // 2)

    def numbers(stream: int) -> Float[Tensor, "batch slice t ky"]:
        return random.uniform(seed, visit, key, stream, grid, centre)[:, rows]

    how = config.sampling
    if (table := patterns.table(how)) is not None:
        drawn = sampling.repeat(table.to(acquired.device), acquired.shape)
    else:
        r = sampling.draw_acceleration(how.accelerations, seed, visit, key)
        each = r.repeat_interleave(len(slots))  # slices as subjects: views may differ in their lines
        u = numbers(purpose).flatten(0, 1)[:, None]
        drawn = sampling.pattern(u, each, ny.flatten(), how.acs_lines, how.family).view(acquired.shape)
    sampled = torch.where(given[..., None, None], acquired, drawn) & existing(padded, ny, lines)
    goal = config.masked
    hidden = sampling.hide(numbers(sampling.HIDDEN_LINES), sampled, goal.mask_ratio)
    targets = hidden if goal.target == "acquired" else acquired & ~sampled | hidden
    if goal.target_lines:
        targets = sampling.hide(numbers(sampling.TARGET_LINES), targets, goal.target_lines)
    pt, py, px = config.model.patch
    patches = (frames // pt, data.matrix[0] // py, data.matrix[1] // px)
    u = random.uniform(seed, visit, key, sampling.HIDDEN_PATCHES, (data.slices, *patches))[:, rows]
    present = ~padded.unflatten(2, (-1, pt)).all(-1)
    candidates = present[..., None, None].expand(u.shape)
    return sampled, hidden, targets, sampling.hide(u, candidates, goal.image_mask_ratio)


# ------------------------------------------------------------------------------------------------------------ transport


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
