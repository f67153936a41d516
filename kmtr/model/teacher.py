"""A teacher of alignment that needs no training: principal components of the clean image, still and moving apart."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kmtr.model.tokenizers import Acquisition
from kmtr.physics.cycle import clean_parts

PARTS = ("static", "dynamic")


class Components:
    """Half-whitened components of the static and the dynamic part of the fully sampled image, one basis for all slices.

    Half-whitened: a component of variance v counts as sqrt(v), which stands between the image itself, where a few
    directions are everything, and whitening, where noise counts as much as the heart. Each part has unit total
    variance.

    Args:
        tables: `data.loader.statistics.components`.
    """

    def __init__(self, tables: dict[str, Tensor], device: torch.device):
        self.mean = {part: tables[f"{part}_clean_mean"].to(device) for part in PARTS}
        self.basis = {part: tables[f"{part}_clean_basis"].to(device) for part in PARTS}

    @torch.no_grad()
    def __call__(self, batch: Acquisition) -> Float[Tensor, "batch slice part channel"]:
        """Components of every slice of the configuration, zeros where the batch has none, fp32."""
        place = torch.tensor(batch.slots, device=batch.kspace.device)
        parts = zip(PARTS, clean_parts(batch.kspace, batch.padded), strict=True)
        found = torch.stack([(values - self.mean[part][place]) @ self.basis[part] for part, values in parts], dim=2)
        found = found.masked_fill(batch.padded.all(-1)[..., None, None], 0.0)
        slices = len(self.mean["static"])
        if len(place) == slices:
            return found
        return found.new_zeros(len(found), slices, *found.shape[2:]).index_copy(1, place, found)
