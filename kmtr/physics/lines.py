"""What a line of k-space says apart from where the scanner's phase and gain happened to be.

Three steps that training, statistics and reconstruction share, all estimated from the lines that `visible` allows, so that
nothing hidden or unacquired leaks:

    canonical        each slice and coil rotated so that its summed centre is real, each subject scaled to its own gain
    static_dynamic   a line as the mean over the frames that saw it, and its deviation from that mean

METHOD's pilot: these two decide more than the network does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Complex
from torch import Tensor

CENTRE = 4
"""Central samples along ky (and kx) that phase and gain are estimated from: the usual ACS lines."""


@dataclass(frozen=True)
class Gauge:
    """What `canonical` divided by: k-space = canonical * factor, factor complex ``batch slice coil 1 1 1``."""

    factor: Complex[Tensor, "batch slice coil 1 1 1"]

    def undo(self, kspace: Complex[Tensor, "batch slice coil t ky kx"]) -> Complex[Tensor, "batch slice coil t ky kx"]:
        return kspace * self.factor


def canonical(
    kspace: Complex[Tensor, "batch slice coil t ky kx"], visible: Bool[Tensor, "batch slice t ky"]
) -> tuple[Complex[Tensor, "batch slice coil t ky kx"], Gauge]:
    """Remove each slice's and coil's phase and each subject's gain, estimated from the visible central lines.

    The phase is that of the sum over the central 4 x 4 samples (the image near the field of view's centre, blurred); the
    gain is the RMS of the central lines, averaged over ky first so that it depends little on which of them are visible.
    """
    ny, nx = kspace.shape[-2:]
    ky = slice(ny // 2 - CENTRE // 2, ny // 2 + CENTRE // 2)
    kx = slice(nx // 2 - CENTRE // 2, nx // 2 + CENTRE // 2)
    seen = visible[:, :, None, :, ky, None]
    centre = kspace[..., ky, :] * seen
    summed = centre[..., kx].sum((-3, -2, -1))
    phase = torch.polar(torch.ones_like(summed.real), summed.angle())
    count = seen.sum((1, 2, 3, 5))
    energy = centre.abs().square().mean(-1).sum((1, 2, 3)) / count.clamp(min=1)
    gain = (energy.sum(-1) / (count > 0).sum(-1).clamp(min=1)).sqrt()
    gain = torch.where(gain > 0, gain, torch.ones_like(gain))
    factor = (phase * gain[:, None, None])[..., None, None, None]
    return kspace / factor, Gauge(factor)


def static_dynamic(
    kspace: Complex[Tensor, "batch slice coil t ky kx"], visible: Bool[Tensor, "batch slice t ky"]
) -> tuple[Complex[Tensor, "batch slice coil 1 ky kx"], Complex[Tensor, "batch slice coil t ky kx"]]:
    """Mean over the frames in which a line is visible, and every line's deviation from it (zero mean where never seen)."""
    seen = visible[:, :, None, :, :, None]
    count = seen.sum(3, keepdim=True).clamp(min=1)
    static = torch.where(seen, kspace, 0).sum(3, keepdim=True) / count
    return static, kspace - static
