"""A KMAE-style encoder: k-GIN's transformer over acquired lines, pooled; the lab's other way from k-space to labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.model.packing import Lengths, Pending, gather, indices
from kmtr.systems.base import Reading
from kmtr.systems.kgin import KGINReader, LineEncoder, by_slice, pooled
from kmtr.systems.resnet import Pooled
from kmtr.systems.xf import KSpace


class PooledLines(LineEncoder):
    """The mean of each slice's tokens, one slice after the other."""

    def __init__(self, config: RunConfig):
        super().__init__(config)
        self.slices = config.data.slices

    def forward(
        self,
        kspace: KSpace,
        sampled: Bool[Tensor, "batch slice t ky"],
        envelope: Float[Tensor, "ky kx"],
        lengths: Lengths,
        slots: Int[Tensor, " slice"],
    ) -> Pooled:
        """
        Args:
            lengths: acquired lines of each slice, all subjects of the first slice first.
            slots: slices as the configuration numbers them; zeros stand for the others.
        """
        rows, mask = by_slice(kspace, sampled, envelope, self.coils)
        each = pooled(self.encode(rows, gather(mask, lengths)).float(), lengths)
        found = each.unflatten(0, (kspace.shape[1], kspace.shape[0])).transpose(0, 1)
        whole = found.new_zeros(len(found), self.slices, found.shape[-1]).index_copy(1, slots, found)
        return Pooled(whole.flatten(1))


class KMAEReader(KGINReader):
    """As k-GIN's; no line that was not acquired is looked at."""

    def __call__(
        self, batch: Batch, shown: Tensor | None = None, number: int = 0, learns: bool = True
    ) -> Pending[Reading]:
        """All that was acquired; nothing of it can be hidden."""
        same = super().__call__(batch, shown, number, learns)

        def make(lengths: Sequence[Lengths]) -> Reading:
            reading = same.make(lengths)
            kspace, sampled, _, _, envelope, each = reading.arguments
            slots = indices(batch.slots, kspace.device)
            return replace(reading, system="kmae", arguments=(kspace, sampled, envelope, each, slots))

        return Pending(same.cells, make)


class KMAE:
    """`kmae` of `task.system`. Its features are a vector."""

    inputs, tokens = ("acquired",), False

    def module(self, config: RunConfig) -> nn.Module:
        return PooledLines(config)

    def channels(self, config: RunConfig) -> int:
        return config.model.width * config.data.slices

    def reader(self, config: RunConfig, tables: Mapping[str, Tensor], device: torch.device) -> KMAEReader:
        return KMAEReader(config, device)
