"""Subjects of one step as they lie on the device of a worker."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Complex, Float, Int, UInt8
from torch import Tensor

from kmtr.physics.fourier import centred
from kmtr.types import LABELS, InputError


@dataclass(frozen=True)
class Wanted:
    """Columns that a batch carries beside k-space; what is not asked for is not read.

    Attributes:
        labels: of `kmtr.types.LABELS`, in this order.
        masks: segmentation, the classes that its source draws, and spacing.
        spacing: for those who want no masks.

    Raises:
        InputError: there is no such label.
    """

    labels: tuple[str, ...] = ()
    masks: bool = False
    spacing: bool = False

    def __post_init__(self) -> None:
        for name in self.labels:
            if name not in LABELS:
                raise InputError(f"labels: unknown label {name!r}, expected one of {', '.join(LABELS)}")


NOTHING = Wanted()
"""K-space alone."""


@dataclass(frozen=True)
class Batch:
    """Subjects of one step on one device.

    Smaller subjects are padded: slices and frames at the end, lines and readout around the centre of k-space, coils at
    the end.

    Attributes:
        kspace: as stored (augmented where asked for), everything the source acquired; zeros where padded.
        acquired: lines that the source has.
        sampled: those of them that the (simulated) scanner acquired.
        padded: slots of slice and frame that hold no data.
        extent: coils, ny and nx of each slice.
        labels: float, NaN = unknown; in the order of the labels that were asked for.
        key: stable key of each subject (`physics.sampling.subject_key`), as signed 64 bit; equal keys = same subject.
        repeated: subjects that only fill up the last batch of an epoch: no loss counts them.
        slots: slice slot of the configuration that each slice of the batch is.
        real: subjects of the GLOBAL batch that are not repeated.
        same: whether coils and readout of all subjects fill the batch.
        epoch: which pass over each subject this is, in training; None elsewhere: nothing is drawn anew.
        masks: classes on the pixels of the image of the configuration's matrix, moved by augmentation with k-space;
            UNLABELLED where nobody contoured, in padding and beyond the field of view. None: not asked for.
        contoured: by segmentation value, the classes that the slice's source draws: what is not among them may be
            anywhere in its background, which itself (0) counts as drawn. All False: no masks. None: not asked for.
        spacing_mm: distance between the chosen slices (the stretch of the stack that each of them stands for), height
            and width of a pixel of `masks`; NaN: unknown, or padding. None: not asked for.
    """

    kspace: Complex[Tensor, "batch slice coil t ky kx"]
    acquired: Bool[Tensor, "batch slice t ky"]
    sampled: Bool[Tensor, "batch slice t ky"]
    padded: Bool[Tensor, "batch slice t"]
    extent: Int[Tensor, "batch slice 3"]
    labels: Float[Tensor, "batch label"]
    key: Int[Tensor, " batch"]
    repeated: Bool[Tensor, " batch"]
    slots: tuple[int, ...]
    real: int
    same: bool
    epoch: Int[Tensor, " batch"] | None = None
    masks: UInt8[Tensor, "batch slice t y x"] | None = None
    contoured: Bool[Tensor, "batch slice class"] | None = None
    spacing_mm: Float[Tensor, "batch slice 3"] | None = None

    def __len__(self) -> int:
        return len(self.key)

    def __getitem__(self, index: slice) -> Batch:
        tensors: dict[str, Any] = {
            f.name: v[index] for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)

    @property
    def passes(self) -> Int[Tensor, " batch"]:
        """`epoch`, 0 where nothing is drawn anew: what a task's own draws are of."""
        return torch.zeros_like(self.key) if self.epoch is None else self.epoch

    @property
    def existing(self) -> Bool[Tensor, "batch slice t ky"]:
        """Lines that a fully sampled scan would have: those of no padding."""
        return existing(self.padded, self.extent[..., 1], self.kspace.shape[-2])

    @property
    def complete(self) -> Bool[Tensor, "batch slice t"]:
        """Slices and frames of which the source has every line, so that their image is known."""
        return (self.acquired | ~self.existing).all(-1) & ~self.padded

    @property
    def true_acceleration(self) -> Float[Tensor, " batch"]:
        """Lines that exist over those acquired, of every subject; fp64."""
        return self.existing.flatten(1).sum(1).double() / self.sampled.flatten(1).sum(1)


def existing(
    padded: Bool[Tensor, "batch slice t"], ny: Int[Tensor, "batch slice"], lines: int
) -> Bool[Tensor, "batch slice t ky"]:
    """Lines that are no padding, of slices with `ny` lines in the middle of `lines`."""
    return ~padded[..., None] & centred(ny, lines)[:, :, None]
