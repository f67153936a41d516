"""The image encoder: 3D patches (t, y, x) of the fully sampled magnitude image as tokens of a transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.model.encoder import on_grid, patch_encoder
from kmtr.model.packing import Lengths, Pending, gather
from kmtr.model.tokenizers import PatchTokenizer
from kmtr.systems.base import Reading, depth_draws


class PatchReader:
    """Batch -> tokens of the image patches that are shown.

    Attributes:
        patches: tokens of patches.
    """

    readout = None

    def __init__(self, config: RunConfig, tables: Mapping[str, Tensor], device: torch.device):
        self.config = config
        self.patches = PatchTokenizer(config.data, config.model, dict(tables), device)

    def __call__(
        self,
        batch: Batch,
        shown: Bool[Tensor, "batch slice pt py px"] | None = None,
        number: int = 0,
        learns: bool = True,
        images: Float[Tensor, "batch slice t y x"] | None = None,
    ) -> Pending[Reading]:
        """Tokens of the `shown` patches, all that hold data where not given.

        Args:
            images: those of the batch, where they are made already (`PatchTokenizer.images`).
        """
        chosen = self.patches.present(batch) if shown is None else shown
        absent = self.absent(batch)

        def make(lengths: Sequence[Lengths]) -> Reading:
            seen = self.patches.images(batch) if images is None else images
            tokens = self.patches(batch, seen, chosen, lengths[1])
            draws = depth_draws(self.config, batch, number) if learns else None
            return Reading("image", ([tokens], gather(~absent, lengths[0]), absent, draws), learns)

        return Pending((~absent, chosen), make)

    def absent(self, batch: Batch) -> Bool[Tensor, "batch slice pt"]:
        """(slice, temporal position) of the configuration's grid of patches without data."""
        every, data = self.config.model.patch[0], self.config.data
        absent = batch.padded.unflatten(2, (-1, every)).all(-1)
        return on_grid(absent, batch.slots, (data.slices, data.frames // every))


class ImageEncoder:
    """`image` of `task.system`: the encoder of fully sampled images. Its features are `model.encoder.Encoded`."""

    inputs, tokens = ("full",), True

    def module(self, config: RunConfig) -> nn.Module:
        return patch_encoder(config.data, config.model)

    def channels(self, config: RunConfig) -> int:
        return 3 * config.model.width * config.data.slices

    def reader(self, config: RunConfig, tables: Mapping[str, Tensor], device: torch.device) -> PatchReader:
        return PatchReader(config, tables, device)
