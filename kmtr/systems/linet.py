"""LI-Net in style (Schlemper et al., MICCAI 2018), from its description: latents of aliased frames mended over time.

An encoder and a decoder go from a clean image to its mask by a latent without shortcuts; a temporal model maps the
latents of the zero-filled frames of a slice to those that the clean frames would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.inputs import standardised
from kmtr.model.packing import Lengths, Pending, gather
from kmtr.model.transformer import Block
from kmtr.systems.base import Lesson, Reading
from kmtr.systems.unet import Maps, plan


@dataclass(frozen=True)
class Interpolated(Maps):
    """Maps of the chosen slices and frames, whose `deepest` is the latent."""

    lesson: Lesson | None = None


def _stage(inputs: int, outputs: int, stride: tuple[int, int]) -> nn.Sequential:
    """Two convolutions, the first with the stride, instance norm and leaky ReLU after each, as the U-Net's."""
    layers: list[nn.Module] = []
    for width, step in ((inputs, stride), (outputs, (1, 1))):
        layers += [nn.Conv2d(width, outputs, 3, step, 1, bias=False), nn.InstanceNorm2d(outputs, affine=True)]
        layers.append(nn.LeakyReLU(0.01))
    return nn.Sequential(*layers)


class LatentInterpolation(nn.Module):
    """The stages of the U-Net without its shortcuts, and a transformer over the latents of a slice's frames, which
    begins at the latents themselves.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        data, model = config.data, config.model
        self.matrix = data.matrix
        widths, strides = plan(data.matrix, config.task.unet_width, "linet")
        down = zip((1, *widths), widths, strides, strict=False)
        self.down = nn.Sequential(*(_stage(inputs, outputs, stride) for inputs, outputs, stride in down))
        up = list(zip(widths[1:], widths, strides[1:], strict=False))[::-1]
        self.wide = nn.ModuleList(nn.ConvTranspose2d(a, b, step, step, bias=False) for a, b, step in up)
        self.up = nn.ModuleList(_stage(b, b, (1, 1)) for _, b, _ in up)
        side = list(data.matrix)
        for stride in strides:
            side = [n // step for n, step in zip(side, stride, strict=True)]
        self.latent = (widths[-1], *side)
        numbers = widths[-1] * side[0] * side[1]
        self.embed, self.position = nn.Linear(numbers, model.width), nn.Embedding(data.frames, model.width)
        nn.init.normal_(self.position.weight, std=0.02)
        heads = model.width // model.head_width
        self.blocks = nn.ModuleList(Block(model.width, heads, model.mlp_ratio) for _ in range(model.depth))
        self.norm, self.out = nn.LayerNorm(model.width), nn.Linear(model.width, numbers)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        images: Float[Tensor, "frame y x"],
        times: Int[Tensor, " frame"],
        rows: Lengths,
        picked: Int[Tensor, " cell"],
        cells: Lengths,
        clean: Float[Tensor, "cell y x"] | None = None,
        known: Bool[Tensor, " cell"] | None = None,
    ) -> Interpolated:
        """
        Args:
            images: zero-filled, all frames of the slices in which something is chosen, all subjects of the first slice
                first.
            times: their places in the cycle.
            rows: frames of each slice, as in `images`.
            picked: the chosen ones among them.
            cells: so many of each subject.
            clean: fully sampled images of the chosen, while the system learns.
            known: those of them that are known.
        """
        aliased = self._encoded(images)
        x = self.embed(aliased.flatten(1)) + self.position(times)
        for block in self.blocks:
            x = block(x, rows)
        found = (aliased + self.out(self.norm(x)).unflatten(1, self.latent))[picked]
        levels = self._decoded(found)
        if clean is None or known is None:
            return Interpolated(levels, found, cells)
        aim = self._encoded(clean)
        target, there = aim.detach().float(), known[:, None, None, None]

        def of_subjects(values: Float[Tensor, "cell channel _ _"]) -> Float[Tensor, " batch"]:
            each = (values.square() * there).flatten(1).sum(1)
            return each.new_zeros(len(cells.host)).index_put((cells.subject,), each, accumulate=True)

        gap = of_subjects(found.float() - target) / of_subjects(target).clamp(min=torch.finfo(torch.float32).tiny)
        return Interpolated(levels, found, cells, Lesson(self._decoded(aim), known, gap))

    def _encoded(self, images: Float[Tensor, "image y x"]) -> Float[Tensor, "image channel _ _"]:
        """Latents; without images still a function of all weights, so that each gets a gradient on every worker."""
        count = len(images)
        whole = images if count else images.new_zeros(1, *self.matrix)
        found: Tensor = self.down(whole[:, None].to(self.embed.weight.dtype))
        return found[:count]

    def _decoded(self, latents: Float[Tensor, "image channel _ _"]) -> tuple[Float[Tensor, "image _ _ _"], ...]:
        """Maps, finest first; the coarsest is left out, as the U-Net's."""
        count = len(latents)
        x = latents if count else latents.new_zeros(1, *self.latent)
        levels: list[Tensor] = []
        for wide, stage in zip(self.wide, self.up, strict=True):
            x = stage(wide(x))
            levels.insert(0, x[:count])
        return tuple(levels[:-1])


class LatentReader:
    """Batch -> standardised zero-filled images of all frames of the slices that are shown, and, to learn from, full
    images of the slices and frames that are.
    """

    readout = None

    def __init__(self, config: RunConfig):
        self.matrix = config.data.matrix

    def __call__(
        self,
        batch: Batch,
        shown: Bool[Tensor, "batch slice t"] | None = None,
        number: int = 0,
        learns: bool = True,
    ) -> Pending[Reading]:
        """Images of the `shown` slices and frames, all that hold data where not given."""
        chosen = ~batch.padded if shown is None else shown
        whole = ~batch.padded & chosen.any(2, keepdim=True)

        def make(lengths: Sequence[Lengths]) -> Reading:
            cells, rows = gather(chosen, lengths[0]), Lengths.joined(lengths[1:])
            place = subject, z, t = (cells.lengths.subject, *cells.index.unbind(-1))
            frames = whole.transpose(0, 1)
            times = gather(frames.flatten(0, 1), rows).index[:, 0]
            images = standardised("zerofilled", batch, self.matrix).transpose(0, 1).flatten(0, 1)[rows.subject, times]
            picked = (frames.flatten().cumsum(0) - 1).unflatten(0, frames.shape)[z, subject, t]
            arguments: tuple[Any, ...] = (images, times, rows, picked, cells.lengths)
            if learns and batch.epoch is not None:
                arguments += (standardised("full", batch, self.matrix)[place], batch.complete[place])
            return Reading("linet", arguments, learns)

        return Pending((chosen, *whole.unbind(1)), make)


class LINet:
    """`linet` of `task.system`. Its features are `Interpolated`."""

    inputs, tokens = ("zerofilled",), False

    def module(self, config: RunConfig) -> nn.Module:
        return LatentInterpolation(config)

    def channels(self, config: RunConfig) -> int:
        return plan(config.data.matrix, config.task.unet_width, "linet")[0][-1]

    def maps(self, config: RunConfig) -> tuple[int, ...]:
        return tuple(plan(config.data.matrix, config.task.unet_width, "linet")[0][:-2])

    def reader(self, config: RunConfig, tables: Mapping[str, Tensor], device: torch.device) -> LatentReader:
        return LatentReader(config)
