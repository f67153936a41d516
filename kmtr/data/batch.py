"""From stored rows to a `Batch` on the worker's device: choose slices and frames, cast, scale, draw what is seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from kmtr.config import Data, RunConfig
from kmtr.data.shards import Manifest, raw_kspace, unpack
from kmtr.physics import sampling
from kmtr.physics.fourier import crop_or_pad, fft2c, fftc, ifft2c, ifftc
from kmtr.types import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Subjects of one step on one device.

    Attributes:
        kspace: as stored, everything the source acquired; zeros where padded.
        sampled: lines that the (simulated) scanner acquired.
        hidden: acquired lines withheld from the encoder in masked pretraining.
        hidden_patches: image patches withheld from the image encoder.
        padded: slots of slice and frame that hold no data.
        labels: float, NaN = unknown; in the order of the labels that were asked for.
        key: stable key of each subject (`physics.sampling.subject_key`), as signed 64 bit; equal keys = same subject.
    """

    kspace: Complex[Tensor, "batch slice coil t ky kx"]
    sampled: Bool[Tensor, "batch slice t ky"]
    hidden: Bool[Tensor, "batch slice t ky"]
    hidden_patches: Bool[Tensor, "batch slice pt py px"]
    padded: Bool[Tensor, "batch slice t"]
    labels: Float[Tensor, "batch label"]
    key: Int[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.key)

    def __getitem__(self, index: slice) -> Batch:
        return Batch(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


@dataclass(frozen=True)
class HostBatch:
    """What `collate` leaves for the device: stored values ``batch slice coil t ky kx 2`` and one scale per subject."""

    stored: Tensor
    scale: Tensor
    rest: dict[str, Tensor]

    def to(self, device: torch.device) -> Batch:
        """One (pinned) copy, then cast and scale where the batch will live."""
        if device.type == "cuda":
            stored = self.stored.pin_memory().to(device, non_blocking=True)
        else:
            stored = self.stored.to(device)
        values = stored.float() * self.scale.to(device)[:, None, None, None, None, None, None]
        return Batch(kspace=torch.view_as_complex(values), **{k: v.to(device) for k, v in self.rest.items()})


def check_shapes(data: Data, manifest: Manifest) -> None:
    """Whether a dataset can feed this configuration, found before a worker starts.

    Raises:
        InputError: a view is missing, or coils or matrix differ from the configuration's.
    """
    for view in data.views:
        if view not in manifest.shapes:
            have = ",".join(manifest.shapes)
            raise InputError(f"data.views: expected views of the dataset ({have}), got {view}; set data.views={have}")
        for slices, coils, frames, ny, nx in manifest.shapes[view]:
            if coils != data.coils:
                raise InputError(f"data.coils: {view} of the dataset has {coils} coils, got data.coils={data.coils}")
            if (ny, nx) != data.matrix and not data.crop:
                raise InputError(
                    f"data.matrix: {view} of the dataset is {ny} x {nx}, got {data.matrix[0]} x {data.matrix[1]}; "
                    f"set data.matrix={ny},{nx}, or data.crop=true to crop or pad it"
                )
            if ny != data.matrix[0] and view in manifest.undersampled:
                raise InputError(
                    f"data.matrix: {view} is undersampled along ky, so its {ny} lines can't become {data.matrix[0]}"
                )
            if frames < data.frames / 2 or slices == 0:
                raise InputError(
                    f"data.frames: {view} of the dataset has {frames} frames, got data.frames={data.frames}"
                )


def choose(available: int, wanted: int, centred: bool) -> np.ndarray:
    """Indices of `wanted` of `available` items, evenly spread; all of them where there are fewer.

    `centred` takes the middle of equal stretches (slices: neither the outermost base nor apex); else the first of each
    (frames: frame 0 stays).
    """
    if available <= wanted:
        return np.arange(available)
    return np.floor((np.arange(wanted) + (0.5 if centred else 0.0)) * available / wanted).astype(int)


def collate(
    table: pa.Table, config: RunConfig, epoch: int, labels: Sequence[str] = (), purpose: int = sampling.PATTERN
) -> HostBatch:
    """Stack the rows of a table and draw their patterns.

    Args:
        purpose: the stream of the pattern; validation has its own, drawn anew for no epoch.
    """
    data = config.data
    size, slots = len(table), data.slices
    dtype = np.dtype(table.schema.metadata[b"kmtr.dtype"].decode())
    shapes = [shape for v in data.views for shape in table.column(f"shape_{v}").to_pylist() if shape is not None]
    exact = all(shape[-2:] == list(data.matrix) for shape in shapes)
    stored = np.zeros((size, slots, data.coils, data.frames, *data.matrix, 2), dtype if exact else np.float32)
    acquired = np.ones((size, slots, data.frames, data.matrix[0]), bool)
    given = np.zeros((size, slots), bool)
    padded = np.ones((size, slots, data.frames), bool)
    keys = [sampling.subject_key(v.as_py()) for v in table.column("subject_id")]
    for row in range(size):
        slot = 0
        for view in data.views:
            wanted = data.slots(view)
            raw = raw_kspace(table, row, view)
            if raw is not None:
                values = raw[0]
                z = choose(values.shape[0], wanted, centred=True)
                t = choose(values.shape[2], data.frames, centred=False)
                packed = table.column(f"acquired_{view}")[row].as_py()
                chosen = values[z][:, :, t] if len(z) < values.shape[0] or len(t) < values.shape[2] else values
                if values.shape[-3:-1] != data.matrix:
                    chosen = _crop(chosen, data.matrix, undersampled=packed is not None)
                where = slice(slot, slot + len(z))
                stored[row, where, :, : len(t)] = chosen
                padded[row, where, : len(t)] = False
                if packed is not None:
                    pattern = unpack(packed, (values.shape[0], values.shape[2], values.shape[3]))
                    acquired[row, where, : len(t)] = pattern[z][:, t]
                    given[row, where] = True
            slot += wanted
    sampled, hidden, patches = _draw(config, keys, epoch, acquired, given, padded, purpose)
    columns = [table.column(name).to_numpy() for name in labels]
    return HostBatch(
        stored=torch.from_numpy(stored),
        scale=torch.from_numpy(table.column("scale").to_numpy().astype(np.float32)),
        rest={
            "sampled": torch.from_numpy(sampled),
            "hidden": torch.from_numpy(hidden),
            "hidden_patches": torch.from_numpy(patches),
            "padded": torch.from_numpy(padded),
            "labels": torch.from_numpy(np.array(columns, np.float32).reshape(len(labels), size).T.copy()),
            "key": torch.from_numpy(np.array(keys, np.uint64).view(np.int64)),
        },
    )


def _crop(values: np.ndarray, matrix: tuple[int, int], undersampled: bool) -> np.ndarray:
    """Crop or pad in the image domain; of an undersampled source only along the (complete) readout."""
    kspace = torch.view_as_complex(torch.from_numpy(values.astype(np.float32)))
    if undersampled:
        kspace = fftc(crop_or_pad(ifftc(kspace, (-1,)), matrix[1:], (-1,)), (-1,))
    else:
        kspace = fft2c(crop_or_pad(ifft2c(kspace), matrix, (-2, -1)))
    return torch.view_as_real(kspace).numpy()


def _draw(
    config: RunConfig,
    keys: Sequence[int],
    epoch: int,
    acquired: np.ndarray,
    given: np.ndarray,
    padded: np.ndarray,
    purpose: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pattern, hidden lines and hidden patches of each subject: functions of (seed, epoch, subject) alone.

    A source that was undersampled by its scanner (`given`) keeps its own pattern.
    """
    slots, frames, lines = acquired.shape[1:]
    pt, py, px = config.model.patch
    grid = (slots, frames // pt, config.data.matrix[0] // py, config.data.matrix[1] // px)
    sampled, hidden = acquired.copy(), np.zeros_like(acquired)
    patches = np.zeros((len(keys), *grid), bool)
    for row, key in enumerate(keys):
        r = sampling.draw_acceleration(config.sampling.accelerations, config.seed, epoch, key)
        rng = sampling.generator(config.seed, epoch, key, purpose)
        drawn = sampling.gaussian(rng, slots, frames, lines, r, config.sampling.acs_lines)
        sampled[row] = np.where(given[row][:, None, None], acquired[row], drawn) & ~padded[row][..., None]
        rng = sampling.generator(config.seed, epoch, key, sampling.HIDDEN_LINES)
        hidden[row] = sampling.hide(rng, sampled[row], config.reconstruct.mask_ratio)
        present = ~padded[row].reshape(slots, frames // pt, pt).all(-1)
        rng = sampling.generator(config.seed, epoch, key, sampling.HIDDEN_PATCHES)
        candidates = np.broadcast_to(present[:, :, None, None], grid)
        patches[row] = sampling.hide(rng, candidates, config.reconstruct.image_mask_ratio)
    return sampled, hidden, patches


def ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The same items, produced by a background thread up to `depth` ahead; its error is raised here."""
    queue: Queue[tuple[str, Any]] = Queue(depth)
    stopped = Event()

    def put(kind: str, value: Any) -> None:
        while not stopped.is_set():
            try:
                queue.put((kind, value), timeout=0.1)
                return
            except Full:  # look again whether the consumer is still there
                continue

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if stopped.is_set():
                    return
            put("end", None)
        except BaseException as error:  # handed to the consumer, whatever it is
            put("error", error)

    Thread(target=work, daemon=True).start()
    try:
        while True:
            kind, value = queue.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
