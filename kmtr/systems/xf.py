"""An unrolled x-f U-Net: the opponent in reconstruction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.inputs import Shared, existing, whole_cycle
from kmtr.model.packing import Pending
from kmtr.physics.fourier import crop_or_pad, fft2c, ifft2c
from kmtr.systems.base import Reading
from kmtr.systems.unet import PlainUNet, plan

KSpace = Complex[Tensor, "batch slice coil t ky kx"]


@dataclass(frozen=True)
class Reconstructed:
    """A reconstruction.

    Attributes:
        kspace: of all lines, the acquired ones as they were.
        deepest: coarsest map of each slice.
        present: slices that hold data.
    """

    kspace: KSpace
    deepest: Float[Tensor, "batch slice channel y x"]
    present: Bool[Tensor, "batch slice"]

    @property
    def vector(self) -> Float[Tensor, "batch channel"]:
        """Mean of the deepest map over a subject's pixels and slices."""
        each = self.deepest.float().mean((3, 4)) * self.present[..., None]
        return each.sum(1) / self.present.sum(1, keepdim=True).clamp(min=1)


class Cascade(nn.Module):
    """A U-Net over the pixels of each slice whose channels are temporal frequencies (real and imaginary parts); then
    the acquired lines are put back; so several times, each with weights of its own.

    Begins at the k-space that it is given: what a network adds is zero at step 0. Coils are combined for it by
    sensitivities from their mean over time, and what it adds is parted again by them.
    """

    def __init__(self, matrix: tuple[int, int], frames: int, width: int, times: int):
        super().__init__()
        self.nets = nn.ModuleList(PlainUNet(matrix, width, "xf", 2 * frames) for _ in range(times))
        self.out = nn.ModuleList(nn.Conv2d(width, 2 * frames, 1) for _ in range(times))
        for layer in self.out:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(
        self,
        kspace: KSpace,
        sampled: Bool[Tensor, "batch slice t ky"],
        present: Bool[Tensor, "batch slice"],
        exists: Bool[Tensor, "batch slice ky kx"],
    ) -> Reconstructed:
        """
        Args:
            kspace: all lines of all frames; those that are not `sampled` are a first guess.
            present: slices that hold data.
            exists: samples that a slice's scan has (`inputs.existing`); the others stay as they are.
        """
        open = exists[:, :, None, None] & ~sampled[:, :, None, :, :, None]
        images = ifft2c(kspace)
        mean = images.mean(3, keepdim=True)
        total = mean.abs().square().sum(2, keepdim=True).sqrt()
        maps = mean / total.clamp(min=torch.finfo(total.dtype).tiny)
        deepest = images.real
        found = kspace
        for net, out in zip(self.nets, self.out, strict=True):
            x = (images * maps.conj()).sum(2)
            f = torch.fft.fft(x, dim=2, norm="ortho")
            channels = torch.view_as_real(f).permute(0, 1, 2, 5, 3, 4).flatten(2, 3)
            levels, deepest = net.maps(channels.flatten(0, 1))  # type: ignore[operator]
            parts = out(levels[0]).float().unflatten(1, (-1, 2)).movedim(2, -1).contiguous()
            more = torch.fft.ifft(torch.view_as_complex(parts).unflatten(0, f.shape[:2]), dim=2, norm="ortho")
            found = torch.where(open, fft2c(images + maps * more[:, :, None]), kspace)
            images = ifft2c(found)
        return Reconstructed(found, deepest.unflatten(0, kspace.shape[:2]), present)


class XFReader:
    """Batch -> temporally shared k-space of all frames of the configuration, in which acquired lines are as they were,
    of unit RMS.
    """

    readout = None

    def __init__(self, config: RunConfig):
        self.matrix, self.frames = config.data.matrix, config.data.frames

    def __call__(
        self, batch: Batch, shown: Tensor | None = None, number: int = 0, learns: bool = True
    ) -> Pending[Reading]:
        """All that was acquired; nothing of it can be hidden."""

        def make(_: object) -> Reading:
            whole = whole_cycle(batch, self.frames)
            sampled = crop_or_pad(whole.sampled, self.matrix[:1], (-1,))
            kspace, exists = Shared.of(whole, self.matrix).kspace, existing(batch, self.matrix)
            return Reading("xf", (kspace, sampled, ~batch.padded.all(-1), exists), learns)

        return Pending((), make)


class XFUNet:
    """`xf` of `task.system`. Its features are `Reconstructed`."""

    inputs, tokens = ("acquired",), False
    unit: Literal["rms of the temporally shared image"] = "rms of the temporally shared image"

    def module(self, config: RunConfig) -> nn.Module:
        task = config.task
        return Cascade(config.data.matrix, config.data.frames, task.unet_width, task.cascades)

    def channels(self, config: RunConfig) -> int:
        return plan(config.data.matrix, config.task.unet_width, "xf")[0][-1]

    def reader(self, config: RunConfig, tables: Mapping[str, Tensor], device: torch.device) -> XFReader:
        return XFReader(config)
