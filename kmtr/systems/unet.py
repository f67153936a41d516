"""A U-Net over single slices and frames, of nnU-Net's plain topology: the opponent in segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.inputs import standardised
from kmtr.model.packing import Lengths, Pending, gather
from kmtr.systems.base import Reading
from kmtr.systems.monai import networks
from kmtr.types import InputError

WIDEST = 512
"""Channels at most, as in nnU-Net's 2D networks."""
LEAST = 4
"""Pixels along an axis of the coarsest map, at least."""


@dataclass(frozen=True)
class Maps:
    """Features of chosen slices and frames.

    Attributes:
        levels: maps of the decoder, finest first, the first of the full matrix; the coarsest is left out, as nnU-Net's
            deep supervision leaves it.
        deepest: the map between encoder and decoder.
        cells: chosen slices and frames of each subject.
    """

    levels: tuple[Float[Tensor, "cell _ _ _"], ...]
    deepest: Float[Tensor, "cell channel y x"]
    cells: Lengths

    @property
    def vector(self) -> Float[Tensor, "batch channel"]:
        """Mean of the deepest map over a subject's pixels, slices and frames."""
        each = self.deepest.float().mean((2, 3))
        summed = each.new_zeros(len(self.cells.host), each.shape[1]).index_add(0, self.cells.subject, each)
        return summed / self.cells.counts.clamp(min=1)[:, None]


def plan(matrix: tuple[int, int], width: int, system: str = "unet") -> tuple[list[int], list[tuple[int, int]]]:
    """Channels and strides of each stage: an axis is halved while `LEAST` pixels remain (nnU-Net's rule).

    Raises:
        InputError: fewer than three stages, or a size that cannot be halved so often.
    """
    sizes, strides = matrix, [(1, 1)]
    while any(n >= 2 * LEAST for n in sizes):
        step = (2 if sizes[0] >= 2 * LEAST else 1, 2 if sizes[1] >= 2 * LEAST else 1)
        if any(n % s for n, s in zip(sizes, step, strict=True)):
            raise InputError(
                f"data.matrix: expected sizes that task.system={system} can halve down to {LEAST} to {2 * LEAST - 1} "
                f"pixels, got {matrix}"
            )
        sizes = (sizes[0] // step[0], sizes[1] // step[1])
        strides.append(step)
    if len(strides) < 3:
        raise InputError(f"data.matrix: expected at least {4 * LEAST} pixels for task.system={system}, got {matrix}")
    return [min(width * 2**stage, WIDEST) for stage in range(len(strides))], strides


class PlainUNet(nn.Module):
    """nnU-Net's PlainConvUNet without heads: two convolutions a stage, instance norm, leaky ReLU, strided convolutions
    down, transposed ones up. The layers are MONAI's `DynUNet`'s, which has no biases before norms.

    Args:
        width: channels of the finest maps.
        system: that it is built for.
        channels: of an image.
    """

    def __init__(self, matrix: tuple[int, int], width: int, system: str = "unet", channels: int = 1):
        super().__init__()
        self.matrix = matrix
        widths, strides = plan(matrix, width, system)
        net = networks(system).DynUNet(2, channels, 1, [3] * len(strides), strides, strides[1:], filters=widths)
        self.first, self.down, self.bottom, self.up = net.input_block, net.downsamples, net.bottleneck, net.upsamples

    def forward(self, images: Float[Tensor, "cell channel y x"], cells: Lengths) -> Maps:
        """Maps of each image by itself."""
        count = len(images)
        if not count:  # all weights get a gradient, as on the other workers
            images = images.new_zeros(1, *images.shape[1:])
        levels, deepest = self.maps(images)
        return Maps(tuple(level[:count] for level in levels[:-1]), deepest[:count], cells)

    def maps(self, images: Float[Tensor, "image channel y x"]) -> tuple[list[Tensor], Tensor]:
        """Maps of the decoder, finest first, and the deepest one."""
        skips = [self.first(images.to(self.first.conv1.conv.weight.dtype))]
        for stage in self.down:
            skips.append(stage(skips[-1]))
        deepest = x = self.bottom(skips[-1])
        levels: list[Tensor] = []
        for stage, skip in zip(self.up, reversed(skips), strict=True):
            x = stage(x, skip)
            levels.insert(0, x)
        return levels, deepest


class SliceReader:
    """Batch -> standardised images of the slices and frames that are shown.

    Args:
        name: of the input.
        motion: each has two more channels, of its slice's mean over the cycle and of what moves.
    """

    readout = None

    def __init__(self, config: RunConfig, name: str, motion: bool = False):
        self.matrix, self.name, self.motion = config.data.matrix, name, motion

    def __call__(
        self,
        batch: Batch,
        shown: Bool[Tensor, "batch slice t"] | None = None,
        number: int = 0,
        learns: bool = True,
    ) -> Pending[Reading]:
        """Images of the `shown` slices and frames, all that hold data where not given."""
        chosen = ~batch.padded if shown is None else shown

        def make(lengths: Sequence[Lengths]) -> Reading:
            cells = gather(chosen, lengths[0])
            images = standardised(self.name, batch, self.matrix)
            place = (cells.lengths.subject, *cells.index.unbind(-1))
            channels = [images, *(moving(images, ~batch.padded) if self.motion else ())]
            return Reading("unet", (torch.stack([one[place] for one in channels], dim=1), cells.lengths), learns)

        return Pending((chosen,), make)


def moving(
    images: Float[Tensor, "batch slice t y x"], present: Bool[Tensor, "batch slice t"]
) -> tuple[Float[Tensor, "batch slice t y x"], Float[Tensor, "batch slice t y x"]]:
    """Mean of each slice over the frames that are there, and what moves, the image less the mean, of variance 1 over
    each subject: it has a tenth of the SD of the image, and ejection fraction is all in it.
    """
    there = present[..., None, None]
    count = there.sum(2, keepdim=True).clamp(min=1)
    still = ((images * there).sum(2, keepdim=True) / count).expand_as(images) * there
    moves, axes = (images - still) * there, (1, 2, 3, 4)
    pixels = there.expand_as(images).sum(axes, keepdim=True).clamp(min=1)
    sd = (moves.square().sum(axes, keepdim=True) / pixels).sqrt().clamp(min=torch.finfo(images.dtype).tiny)
    return still, moves / sd


class UNet:
    """`unet` of `task.system`. Its features are `Maps`."""

    inputs, tokens = ("zerofilled", "shared", "lowrank", "full"), False

    def module(self, config: RunConfig) -> nn.Module:
        return PlainUNet(config.data.matrix, config.task.unet_width, channels=3 if config.task.unet_motion else 1)

    def channels(self, config: RunConfig) -> int:
        return plan(config.data.matrix, config.task.unet_width)[0][-1]

    def maps(self, config: RunConfig) -> tuple[int, ...]:
        return tuple(plan(config.data.matrix, config.task.unet_width)[0][:-2])

    def reader(self, config: RunConfig, tables: Mapping[str, Tensor], device: torch.device) -> SliceReader:
        return SliceReader(config, config.task.input or self.inputs[0], config.task.unet_motion)
