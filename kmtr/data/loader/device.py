"""From a host batch to a `Batch` on the worker's device: one copy; cast, augmentation and draws there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kmtr.config import Augment, RunConfig, Sampling
from kmtr.data.loader import patterns
from kmtr.data.loader.batch import Batch, existing
from kmtr.data.loader.buckets import Shape
from kmtr.data.loader.shapes import slots_of
from kmtr.physics import random, sampling
from kmtr.physics.augment import augment, augment_masks


@dataclass(frozen=True)
class HostBatch:
    """What `collate.collate` leaves for the device: stored values, and what the draws need.

    Attributes:
        stored: float16 or float32 ``batch slice coil t ky kx 2``.
        meta: ``scale``, ``acquired`` (of the source), ``given`` (slices whose source was undersampled), ``padded``,
            ``extent``, ``labels``, ``key``, ``epoch``, ``repeated``; where asked for ``masks``, ``contoured`` and
            ``spacing_mm``.
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
        """One (pinned) copy; cast, scale, augmentation and pattern where the batch will live.

        Args:
            readout: central kx samples that are needed; None: all, as images do. What is not needed is not even cast.
        """
        stored = self.stored
        if readout is not None and readout < stored.shape[-2] and self.config.augment == Augment():
            first = stored.shape[-2] // 2 - readout // 2
            stored = stored[..., first : first + readout, :]
        meta = {name: _sent(tensor, device, pin=name == "masks") for name, tensor in self.meta.items()}
        values = _sent(stored, device, pin=True).float() * meta["scale"].view(-1, *[1] * (stored.ndim - 1))
        kspace, acquired, given = torch.view_as_complex(values), meta["acquired"], meta["given"]
        config, key, epoch, masks = self.config, meta["key"], meta["epoch"], meta.get("masks")
        if self.purpose == sampling.PATTERN:
            how = (meta["extent"][..., 1:].amax(1), config.augment, config.seed, epoch, key, given.any(1))
            kspace, acquired = augment(kspace, acquired, *how)
            masks = None if masks is None else augment_masks(masks, *how)
        slots = slots_of(config.data, self.shape[0])
        sampled = draw(config, meta["extent"][..., 1], acquired, given, meta["padded"], slots, key, epoch, self.purpose)
        return Batch(
            kspace=kspace,
            acquired=acquired,
            sampled=sampled,
            padded=meta["padded"],
            extent=meta["extent"],
            labels=meta["labels"],
            key=key,
            repeated=meta["repeated"],
            slots=slots,
            real=self.real,
            same=self._same,
            epoch=epoch if self.purpose == sampling.PATTERN else None,
            masks=masks,
            contoured=meta.get("contoured"),
            spacing_mm=meta.get("spacing_mm"),
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


def _sent(tensor: Tensor, device: torch.device, pin: bool) -> Tensor:
    """A tensor on the device; `pin`: through page-locked memory, which the copy to a GPU does not wait for."""
    if pin and device.type == "cuda" and not tensor.is_pinned():
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)


def draw(
    config: RunConfig,
    ny: Int[Tensor, "batch slice"],
    acquired: Bool[Tensor, "batch slice t ky"],
    given: Bool[Tensor, "batch slice"],
    padded: Bool[Tensor, "batch slice t"],
    slots: tuple[int, ...],
    key: Int[Tensor, " batch"],
    epoch: Int[Tensor, " batch"],
    purpose: int,
) -> Bool[Tensor, "batch slice t ky"]:
    """Pattern of each subject: a function of (seed, epoch, subject) alone.

    Slices are numbered as in the configuration's full shape and lines from the centre, so that a subject gets the same
    numbers in a batch of any shape. A source that was undersampled by its scanner (`given`) keeps its own pattern.
    """
    frames, lines = acquired.shape[2:]
    if (table := patterns.table(config.sampling)) is None:
        grid, centre = (config.data.slices, frames, lines), (0, 0, lines // 2)
        rows = torch.tensor(slots, device=acquired.device)
        r = sampling.draw_acceleration(config.sampling.accelerations, config.seed, epoch, key)
        u = random.uniform(config.seed, epoch, key, purpose, grid, centre)[:, rows]
        drawn = _drawn(config.sampling, u, r, ny)
    else:
        drawn = sampling.repeat(table.to(acquired.device), acquired.shape)
    return torch.where(given[..., None, None], acquired, drawn) & existing(padded, ny, lines)


def _drawn(
    how: Sampling, u: Float[Tensor, "batch slice t ky"], r: Int[Tensor, " batch"], ny: Int[Tensor, "batch slice"]
) -> Bool[Tensor, "batch slice t ky"]:
    """The simulated scanner's pattern of acceleration `r`, drawn with the uniform numbers `u`."""
    each = r.repeat_interleave(u.shape[1])  # slices as subjects: views may differ in their lines
    return sampling.pattern(u.flatten(0, 1)[:, None], each, ny.flatten(), how.acs_lines, how.family).view(u.shape)
