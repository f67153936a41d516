"""Inputs: what a system sees of a subject, each a named function of a batch. Only `full` sees what was not acquired."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor
from torch.nn.functional import pad

from kmtr.data.loader.batch import Batch
from kmtr.physics import lines
from kmtr.physics.fourier import centred, crop_or_pad, fft2c, magnitude_image
from kmtr.physics.images import rms, scale_image
from kmtr.physics.lines import phase_gain
from kmtr.physics.lowrank import low_rank_sparse

KSpace = Complex[Tensor, "batch slice coil t ky kx"]
Image = Float[Tensor, "batch slice t y x"]


def acquired(batch: Batch) -> KSpace:
    """Lines that the scanner acquired, zeros in place of the others."""
    return torch.where(batch.sampled[:, :, None, :, :, None], batch.kspace, 0)


def view_shared(batch: Batch) -> KSpace:
    """k-space in which a line that a frame lacks is the mean over the frames that have it; what no frame has is zero.

    Phase and gain are removed first.
    """
    return lines.view_shared(_canonical(batch), batch.sampled)


def lowrank(batch: Batch) -> KSpace:
    """k-space of the low-rank + sparse reconstruction that begins at `view_shared`, which removes phase and gain. A
    padded frame counts as one in which nothing was acquired.
    """
    kspace = _canonical(batch)
    found = low_rank_sparse(kspace, batch.sampled, lines.view_shared(kspace, batch.sampled))
    height, width = kspace.shape[-2:]
    return torch.where(existing(batch, (height, width))[:, :, None, None], found, 0)


def _canonical(batch: Batch) -> KSpace:
    return batch.kspace / phase_gain(batch.kspace, batch.sampled)[..., None, None, None]


def _image(kspace: KSpace, batch: Batch) -> Image:
    return scale_image(magnitude_image(kspace), batch.padded)


def zerofilled(batch: Batch) -> Image:
    """Magnitude image of the acquired lines, each frame by itself, of unit RMS per subject: aliased as it is."""
    return _image(acquired(batch), batch)


@dataclass(frozen=True)
class Shared:
    """`view_shared` and its magnitude image, of unit RMS per subject, and what leads back to the source's numbers.

    Attributes:
        unit: the source's number for 1 in `image`; known from acquired lines alone, like all here.
    """

    kspace: KSpace
    image: Image
    unit: Float[Tensor, " batch"]

    @staticmethod
    def of(batch: Batch, matrix: tuple[int, int]) -> Shared:
        """
        Args:
            matrix: that k-space is cropped or filled up with zeros to.
        """
        gain = phase_gain(batch.kspace, batch.sampled)
        kspace = crop_or_pad(view_shared(batch), matrix, (-2, -1))
        image = magnitude_image(kspace)
        scale = rms(image, batch.padded)
        inverse = (1 / scale)[:, None, None, None, None]
        return Shared(kspace * inverse[..., None], image * inverse, scale * gain[:, 0, 0].abs())

    def still(self, there: Bool[Tensor, "batch slice t"]) -> Float[Tensor, "batch slice 1 y x"]:
        """Mean of the image over the frames that are `there`."""
        present = there[..., None, None]
        return (self.image * present).sum(2, keepdim=True) / present.sum(2, keepdim=True).clamp(min=1)


def full(batch: Batch) -> Image:
    """Magnitude image of all that the source has, of unit RMS per subject."""
    return _image(batch.kspace, batch)


def full_image(batch: Batch, matrix: tuple[int, int]) -> Image:
    """Magnitude image of all that the source has, in its own numbers, k-space cropped or filled up to a matrix."""
    return magnitude_image(crop_or_pad(batch.kspace, matrix, (-2, -1)))


def known_image(batch: Batch, matrix: tuple[int, int]) -> Image:
    """`full_image`, NaN in slices and frames that the scanner undersampled, whose image nobody knows."""
    return full_image(batch, matrix).masked_fill(~batch.complete[..., None, None], torch.nan)


def known_peak(image: Image, batch: Batch) -> Float[Tensor, " batch"]:
    """Maximum of each subject's images that are known; 0 where none is."""
    return image.masked_fill(~batch.complete[..., None, None], 0.0).amax((1, 2, 3, 4))


def source(batch: Batch) -> KSpace:
    """All that the source has."""
    return batch.kspace


def whole_cycle(batch: Batch, frames: int) -> Batch:
    """The batch filled up to so many frames with padding, in what is acquired; fewer are in batches of short cycles."""
    more = frames - batch.kspace.shape[3]
    return replace(
        batch,
        kspace=pad(batch.kspace, (0, 0, 0, 0, 0, more)),
        acquired=pad(batch.acquired, (0, 0, 0, more)),
        sampled=pad(batch.sampled, (0, 0, 0, more)),
        padded=pad(batch.padded, (0, more), value=True),
    )


def existing(batch: Batch, matrix: tuple[int, int]) -> Bool[Tensor, "batch slice ky kx"]:
    """Samples of a matrix that a slice's own scan has: one of a smaller matrix fills its middle alone."""
    ny, nx = (centred(batch.extent[..., i], n) for i, n in zip((1, 2), matrix, strict=True))
    return ny[..., None] & nx[..., None, :]


def of_images(batch: Batch, image: Image) -> Batch:
    """The batch as if a single coil had acquired every line of these magnitude images, so that `full` is they.

    Args:
        image: NaN where nothing is there.
    """
    kspace = fft2c(image.nan_to_num().to(torch.complex64))[:, :, None]
    there = (~batch.padded)[..., None].expand(-1, -1, -1, kspace.shape[-2])
    return replace(batch, kspace=kspace, acquired=there, sampled=there)


INPUTS: dict[str, Callable[[Batch], KSpace]] = {
    "acquired": acquired,
    "zerofilled": acquired,
    "shared": view_shared,
    "lowrank": lowrank,
    "full": source,
}
"""Name (as in `task.input`) -> k-space that a system sees, itself or as an image. Adding one is a function and a line.
"""


def standardised(name: str, batch: Batch, matrix: tuple[int, int]) -> Image:
    """Magnitude image of an input on a matrix, of mean 0 and variance 1 over each subject's pixels, 0 where padded: as
    nnU-Net takes images (Isensee et al., Nature Methods 2021).

    Args:
        matrix: that k-space is cropped or filled up with zeros to.
    """
    image = magnitude_image(crop_or_pad(INPUTS[name](batch), matrix, (-2, -1)))
    present = (~batch.padded)[..., None, None].expand(image.shape)
    count, axes = present.sum((1, 2, 3, 4), keepdim=True).clamp(min=1), (1, 2, 3, 4)
    mean = (image * present).sum(axes, keepdim=True) / count
    away = (image - mean) * present
    sd = (away.square().sum(axes, keepdim=True) / count).sqrt().clamp(min=torch.finfo(image.dtype).tiny)
    return away / sd
