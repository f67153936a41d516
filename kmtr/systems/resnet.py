"""ResNet-50 over all slices and frames as channels: the opponent in phenotypes and diseases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.inputs import standardised
from kmtr.model.packing import Pending, indices
from kmtr.systems.base import Reading
from kmtr.systems.monai import networks

CHANNELS = 2048
GROUPS = 32


@dataclass(frozen=True)
class Pooled:
    """The vector alone."""

    vector: Float[Tensor, "batch channel"]


class Stacked(nn.Module):
    """ResNet-50 (He et al., CVPR 2016) whose first convolution takes ``slice * t`` channels; from MONAI.

    Group norm stands in place of batch norm (Wu and He, ECCV 2018): no subject's numbers depend on who shares its
    batch, so that one worker and many compute the same.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.net = networks("resnet50").resnet50(
            spatial_dims=2, n_input_channels=channels, conv1_t_stride=2, feed_forward=False
        )
        for module in list(self.net.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.GroupNorm(GROUPS, child.num_features))

    def forward(self, images: Float[Tensor, "batch slice t y x"]) -> Pooled:
        return Pooled(self.net(images.flatten(1, 2).to(self.net.conv1.weight.dtype)).float())


class StackReader:
    """Batch -> standardised images on the whole grid of the configuration, zeros where a subject has none.

    Args:
        name: of the input.
    """

    readout = None

    def __init__(self, config: RunConfig, name: str):
        self.data, self.name = config.data, name

    def __call__(
        self, batch: Batch, shown: Tensor | None = None, number: int = 0, learns: bool = True
    ) -> Pending[Reading]:
        """All images; no part of them can be hidden."""
        seen = standardised(self.name, batch, self.data.matrix)
        whole = seen.new_zeros(len(seen), self.data.slices, self.data.frames, *self.data.matrix)
        whole[:, indices(batch.slots, seen.device), : seen.shape[2]] = seen
        return Pending((), lambda _: Reading("resnet50", (whole,), learns))


class ResNet50:
    """`resnet50` of `task.system`. Its features are a vector."""

    inputs, tokens = ("zerofilled", "shared", "lowrank", "full"), False

    def module(self, config: RunConfig) -> nn.Module:
        return Stacked(config.data.slices * config.data.frames)

    def channels(self, config: RunConfig) -> int:
        return CHANNELS

    def reader(self, config: RunConfig, tables: Mapping[str, Tensor], device: torch.device) -> StackReader:
        return StackReader(config, config.task.input or self.inputs[0])
