"""The cardiac cycle: what of a gated series stands still, and what moves."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from kmtr.physics.fourier import crop_or_pad, magnitude_image
from kmtr.physics.images import scale_image

SIDE = 16
"""Pixels along each side of the image whose parts `clean_parts` takes: about 2 cm each on a usual field of view."""


def static_dynamic(
    frames: Float[Tensor, "batch slice t channel"], absent: Bool[Tensor, "batch slice t"]
) -> tuple[Float[Tensor, "batch slice channel"], Float[Tensor, "batch slice channel2"]]:
    """Static and dynamic part of each slice: the temporal mean, and the first cosine and sine over the cycle.

    Cine is gated: frame 0 is end-diastole, so the first harmonic holds the contraction. Computed in fp32.
    """
    present = (~absent).float()[..., None]
    x = frames.float()
    mean = (x * present).sum(2) / present.sum(2).clamp(min=1)
    deviation = (x - mean[:, :, None]) * present
    count = present.sum(2).clamp(min=1)  # frames of the cycle: a shorter series is padded at its end
    t = torch.arange(frames.shape[2], device=frames.device)
    angle = 2 * math.pi * (t + 0.5) / count
    basis = torch.stack([angle.cos(), angle.sin()], dim=-1)
    harmonic = torch.einsum("bstc,bstk->bskc", deviation, basis) * (2 / count[..., None])
    return mean, harmonic.flatten(2)


def clean_parts(
    kspace: Complex[Tensor, "batch slice coil t ky kx"], padded: Bool[Tensor, "batch slice t"]
) -> tuple[Float[Tensor, "batch slice pixel"], Float[Tensor, "batch slice pixel2"]]:
    """Static and dynamic part of the fully sampled magnitude image at SIDE x SIDE, of unit RMS per subject."""
    image = magnitude_image(crop_or_pad(kspace, (SIDE, SIDE), (-2, -1)))
    return static_dynamic(scale_image(image, padded).flatten(3), padded)
