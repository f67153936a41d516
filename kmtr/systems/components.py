"""Principal components of the clean image, still and moving apart: a teacher of alignment that needs no training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.model.packing import Pending, indices
from kmtr.physics.cycle import SIDE, clean_parts
from kmtr.systems.base import Reading

PARTS = ("static", "dynamic")


@dataclass(frozen=True)
class Fixed:
    """Features without weights.

    Attributes:
        parts: components of the static and of the dynamic part of every slice.
    """

    parts: Float[Tensor, "batch slice part channel"]

    @property
    def vector(self) -> Float[Tensor, "batch channel"]:
        return self.parts.float().flatten(1)


class AsTheyAre(nn.Module):
    """No weights: what the reader made."""

    def forward(self, parts: Float[Tensor, "batch slice part channel"]) -> Fixed:
        return Fixed(parts)


class ComponentReader:
    """Half-whitened components of the static and the dynamic part of the fully sampled image, one basis for all slices.

    Half-whitened: a component of variance v counts as sqrt(v), which stands between the image itself, where a few
    directions are everything, and whitening, where noise counts as much as the heart. Each part has unit total
    variance.

    Args:
        tables: `data.loader.statistics.components`.
    """

    readout = SIDE

    def __init__(self, tables: Mapping[str, Tensor], device: torch.device):
        self.mean = {part: tables[f"{part}_clean_mean"].to(device) for part in PARTS}
        self.basis = {part: tables[f"{part}_clean_basis"].to(device) for part in PARTS}

    def __call__(
        self, batch: Batch, shown: Tensor | None = None, number: int = 0, learns: bool = False
    ) -> Pending[Reading]:
        """Components of the whole image; nothing of it can be hidden, and nothing learns."""
        return Pending((), lambda _: Reading("components", (self.of(batch),), learns=False))

    @torch.no_grad()
    def of(self, batch: Batch) -> Float[Tensor, "batch slice part channel"]:
        """Components of every slice of the configuration, zeros where the batch has none, fp32."""
        place = indices(batch.slots, batch.kspace.device)
        parts = zip(PARTS, clean_parts(batch.kspace, batch.padded), strict=True)
        found = torch.stack([(values - self.mean[part][place]) @ self.basis[part] for part, values in parts], dim=2)
        found = found.masked_fill(batch.padded.all(-1)[..., None, None], 0.0)
        slices = len(self.mean["static"])
        if len(place) == slices:
            return found
        return found.new_zeros(len(found), slices, *found.shape[2:]).index_copy(1, place, found)


class CleanComponents:
    """`components` of `align.teacher`: fixed, of as many numbers per part as the space of alignment has."""

    inputs, tokens = ("full",), False

    def module(self, config: RunConfig) -> nn.Module:
        return AsTheyAre()

    def channels(self, config: RunConfig) -> int:
        return len(PARTS) * config.model.projection * config.data.slices

    def reader(self, config: RunConfig, tables: Mapping[str, Tensor], device: torch.device) -> ComponentReader:
        return ComponentReader(tables, device)
