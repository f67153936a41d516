"""Lines of k-space without the arbitrary phase and gain of the scanner.

What training, statistics and reconstruction share, all estimated from the lines that `visible` allows, so that nothing
hidden or unacquired leaks:

    compress       the coils of a slice as the few virtual ones of most energy
    phase_gain          phase of each slice and coil, gain of each subject; k-space divided by it is called canonical
    static_part    mean of a line over the frames that saw it; its deviation from that mean is the dynamic part
    readout        the samples of a line that are used, along kx or, in hybrid space, along x

In pilot runs these two decided more than the network did.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from kmtr.physics.fourier import crop_or_pad, fftc, ifftc, magnitude_image
from kmtr.physics.images import scale_image

CENTRE = 4
"""Central samples along ky (and kx) that phase and gain are estimated from: the usual ACS lines."""


def compression(
    kspace: Complex[Tensor, "batch slice coil t ky kx"],
    visible: Bool[Tensor, "batch slice t ky"],
    coils: int,
    samples: int | None = None,
) -> Complex[Tensor, "batch slice virtual coil"]:
    """Weights of the `coils` most energetic virtual coils of each slice, as `coils.compress` has them; no more than are
    given.

    The leading eigenvectors of the coils' covariance over the visible lines of all frames (Huang 2008), the same in all
    frames. Rows are orthonormal, so that energy kept is the sum of the largest eigenvalues, and the adjoint leads back.
    Each row's largest weight is real and positive. Coils without a signal get none, so that virtual coils beyond a
    slice's own stay silent.

    Args:
        samples: central ones along kx that tell; None: all.
    """
    band = kspace if samples is None else crop_or_pad(kspace, (min(samples, kspace.shape[-1]),), (-1,))
    seen = torch.where(visible[:, :, None, :, :, None], band, 0).flatten(3)
    _, vectors = torch.linalg.eigh((seen @ seen.mH).to(torch.complex128))
    leading = vectors.flip(-1)[..., : min(coils, kspace.shape[2])]
    largest = leading.gather(-2, leading.abs().argmax(-2, keepdim=True))
    return (leading * torch.polar(torch.ones_like(largest.real), -largest.angle())).mH.to(kspace.dtype)


def mix(
    kspace: Complex[Tensor, "batch slice coil t ky kx"], weights: Complex[Tensor, "batch slice other coil"]
) -> Complex[Tensor, "batch slice other t ky kx"]:
    """Linear combinations of the coils of each slice."""
    return (weights @ kspace.flatten(3)).unflatten(3, kspace.shape[3:])


def compress(
    kspace: Complex[Tensor, "batch slice coil t ky kx"],
    visible: Bool[Tensor, "batch slice t ky"],
    coils: int,
    samples: int | None = None,
) -> Complex[Tensor, "batch slice other t ky kx"]:
    """The virtual coils of `compression`; 0: the coils as they are."""
    return mix(kspace, compression(kspace, visible, coils, samples)) if coils else kspace


def phase_gain(
    kspace: Complex[Tensor, "batch slice coil t ky kx"],
    visible: Bool[Tensor, "batch slice t ky"],
    fixes: Literal["phase+gain", "gain", "none"] = "phase+gain",
    samples: int | None = None,
) -> Complex[Tensor, "batch slice coil"]:
    """Phase of each slice and coil and gain of each subject: k-space divided by it is canonical.

    The phase is that of the sum over the visible central 4 x 4 samples (the image near the field of view's centre,
    blurred); the gain is the root of the mean energy of the visible central lines, averaged over ky first so that it
    depends little on which of them are visible. Zeros around k-space change neither.

    Args:
        fixes: what is estimated; the rest is 1.
        samples: central ones along kx whose energy counts, so that k-space cropped to them has the same gain; None:
            all.
    """
    if fixes == "none":
        return torch.ones(kspace.shape[:3], dtype=kspace.dtype, device=kspace.device)
    ny, nx = kspace.shape[-2:]
    ky = slice(ny // 2 - CENTRE // 2, ny // 2 + CENTRE // 2)
    kx = slice(nx // 2 - CENTRE // 2, nx // 2 + CENTRE // 2)
    seen = visible[:, :, None, :, ky, None]
    centre = torch.where(seen, kspace[..., ky, :], 0)
    summed = centre[..., kx].sum((-3, -2, -1))
    count = seen.sum((1, 2, 3, 5))
    band = centre if samples is None else crop_or_pad(centre, (min(samples, nx),), (-1,))
    energy = torch.view_as_real(band).square().sum((-2, -1)).sum((1, 2, 3)) / count.clamp(min=1)
    gain = (energy.sum(-1) / (count > 0).sum(-1).clamp(min=1)).sqrt()
    gain = torch.where(gain > 0, gain, torch.ones_like(gain))
    angle = summed.angle() if fixes == "phase+gain" else torch.zeros_like(summed.real)
    return torch.polar(gain[:, None, None].expand(summed.shape).contiguous(), angle)


def static_part(
    kspace: Complex[Tensor, "batch slice coil t ky kx"], visible: Bool[Tensor, "batch slice t ky"]
) -> Complex[Tensor, "batch slice coil ky kx"]:
    """Mean over the frames in which a line is visible; zero where it never is. The dynamic part is what deviates from
    it.
    """
    weight = visible.to(kspace.real.dtype)
    weight = weight / weight.sum(2, keepdim=True).clamp(min=1)
    seen = torch.where(visible[:, :, None, :, :, None], kspace, 0)  # a weight of 0 would let NaN and infinity through
    mean = torch.einsum("bsctyxk,bsty->bscyxk", torch.view_as_real(seen), weight)
    return torch.view_as_complex(mean.contiguous())


def view_shared(
    kspace: Complex[Tensor, "batch slice coil t ky kx"], visible: Bool[Tensor, "batch slice t ky"]
) -> Complex[Tensor, "batch slice coil t ky kx"]:
    """k-space in which a line that a frame lacks is the mean over the frames that saw it; what none saw is zero."""
    return torch.where(visible[:, :, None, :, :, None], kspace, static_part(kspace, visible)[:, :, :, None])


def shared_centre(
    kspace: Complex[Tensor, "batch slice coil t ky kx"],
    visible: Bool[Tensor, "batch slice t ky"],
    padded: Bool[Tensor, "batch slice t"],
    side: int,
) -> tuple[Float[Tensor, "batch slice t pixel"], Float[Tensor, "batch slice 1 pixel"]]:
    """Magnitude image of the central `side` x `side` of `view_shared`, of unit RMS per subject, and its
    mean over the cycle.
    """
    shared = view_shared(crop_or_pad(kspace, (side, side), (-2, -1)), crop_or_pad(visible, (side,), (-1,)))
    image = scale_image(magnitude_image(shared), padded).flatten(3)
    present = (~padded)[..., None]
    return image, (image * present).sum(2, keepdim=True) / present.sum(2, keepdim=True).clamp(min=1)


def readout(lines: Complex[Tensor, "*axes kx"], samples: int, hybrid: bool = False) -> Complex[Tensor, "*axes readout"]:
    """The central `samples` of each line along kx, zeros around a shorter one; `hybrid`: their inverse transform, x.

    The readout is fully sampled, so x is known line by line: hybrid space (x, ky). The band is cut in kx, not in x.
    Either domain then holds the same information, one being a unitary map of the other: `samples` positions over the
    whole field of view at the band's resolution. A shorter line is interpolated, so that no x is without data.
    """
    central = crop_or_pad(lines, (samples,), (-1,))
    return ifftc(central, (-1,)) if hybrid else central


def readout_inverse(values: Complex[Tensor, "*axes readout"], hybrid: bool = False) -> Complex[Tensor, "*axes readout"]:
    """The central samples along kx that `readout` made `values` of."""
    return fftc(values, (-1,)) if hybrid else values
