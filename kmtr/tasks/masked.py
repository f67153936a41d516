"""Masked pretraining: hidden lines, and hidden patches of the fully sampled image, are predicted from those left.

What is hidden is drawn here, of (seed, epoch, subject) alone: slices are numbered as in the configuration's full shape
and lines from the centre, so that a subject gets the same numbers in a batch of any shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.model.encoder import line_decoder, patch_decoder
from kmtr.model.packing import Lengths, Pending, indices
from kmtr.model.tokenizers import Tokens
from kmtr.physics import random, sampling
from kmtr.systems import Reading
from kmtr.tasks.base import LOSS, Encode, Given, Task
from kmtr.tasks.losses import masked_reconstruction


@dataclass(frozen=True)
class Asked:
    """A reading of what is shown, and the tokens to be predicted from it."""

    shown: Reading
    targets: Tokens


class Masked(Task):
    """Hidden lines of k-space from the visible ones, by the k-space encoder."""

    name, label = "masked", "kspace"
    systems = ("kspace",)

    def head(self) -> nn.Module:
        return line_decoder(self.config.data, self.config.model)

    def ask(self, batch: Batch, given: Given) -> Pending[Asked]:
        hidden, targets = hidden_lines(self.config, batch)
        visible = batch.sampled & ~hidden
        known = batch.acquired if self.config.masked.target == "all" else batch.sampled
        return self.asked(batch, given, visible, targets, known)

    def asked(
        self,
        batch: Batch,
        given: Given,
        visible: Bool[Tensor, "batch slice t ky"],
        targets: Bool[Tensor, "batch slice t ky"],
        known: Bool[Tensor, "batch slice t ky"],
    ) -> Pending[Asked]:
        """The `visible` lines as input, the `targets` to predict.

        Args:
            known: lines that the targets' temporal mean is taken over.
        """
        reader = given.readers["kspace"]
        reading = given.read("kspace", batch, shown=visible, number=0)

        def make(lengths: Sequence[Lengths]) -> Asked:
            values = reader.lines(batch, known=known, chosen=targets, visible=visible, lengths=lengths[-1])
            return Asked(reading.make(lengths[:-1]), values)

        return Pending((*reading.cells, targets), make)

    def forward(self, encode: Encode, head: Any, asked: Asked) -> dict[str, Tensor]:
        targets = asked.targets
        predicted = head(encode(asked.shown), targets)
        kind = self.config.masked.kspace_loss
        return {LOSS: masked_reconstruction(predicted, targets.values, targets.lengths.counts, kind, targets.blank)}

    def predict(self, encode: Encode, head: Any, asked: Asked) -> dict[str, Tensor]:
        """``values`` ``token feature`` at the targets."""
        return {"values": head(encode(asked.shown), asked.targets)}


class MaskedImages(Task):
    """Hidden patches of the fully sampled image from the visible ones, by the image encoder."""

    name, label = "masked_images", "image"
    systems = ("image",)

    def head(self) -> nn.Module:
        return patch_decoder(self.config.data, self.config.model)

    def ask(self, batch: Batch, given: Given) -> Pending[Asked]:
        reader = given.readers["image"]
        present, hidden = reader.patches.present(batch), hidden_patches(self.config, batch)
        images, withheld = reader.patches.images(batch), present & hidden
        reading = given.read("image", batch, shown=present & ~hidden, number=1, images=images)

        def make(lengths: Sequence[Lengths]) -> Asked:
            return Asked(reading.make(lengths[:-1]), reader.patches(batch, images, withheld, lengths[-1]))

        return Pending((*reading.cells, withheld), make)

    def forward(self, encode: Encode, head: Any, asked: Asked) -> dict[str, Tensor]:
        predicted = head(encode(asked.shown), asked.targets)
        return {LOSS: masked_reconstruction(predicted, asked.targets.values, asked.targets.lengths.counts)}


def hidden_lines(
    config: RunConfig, batch: Batch
) -> tuple[Bool[Tensor, "batch slice t ky"], Bool[Tensor, "batch slice t ky"]]:
    """Sampled lines withheld from the encoder, and lines to predict: hidden ones, or also those that only the source
    has (`masked.target=all`).
    """
    goal, lines = config.masked, batch.sampled.shape[-1]
    shape, origin = (config.data.slices, *batch.sampled.shape[2:]), (0, 0, lines // 2)

    def numbers(stream: int) -> Tensor:
        return random.uniform(config.seed, batch.passes, batch.key, stream, shape, origin)[:, _rows(batch)]

    hidden = sampling.hide(numbers(sampling.HIDDEN_LINES), batch.sampled, goal.mask_ratio)
    targets = hidden if goal.target == "acquired" else batch.acquired & ~batch.sampled | hidden
    if goal.target_lines:
        targets = sampling.hide(numbers(sampling.TARGET_LINES), targets, goal.target_lines)
    return hidden, targets


def hidden_patches(config: RunConfig, batch: Batch) -> Bool[Tensor, "batch slice pt py px"]:
    """Image patches withheld from the image encoder, of those of which some frame holds data; images have the
    configuration's full matrix.
    """
    data, (pt, py, px) = config.data, config.model.patch
    grid = (batch.padded.shape[2] // pt, data.matrix[0] // py, data.matrix[1] // px)
    shape = (data.slices, *grid)
    u = random.uniform(config.seed, batch.passes, batch.key, sampling.HIDDEN_PATCHES, shape)[:, _rows(batch)]
    present = ~batch.padded.unflatten(2, (-1, pt)).all(-1)
    return sampling.hide(u, present[..., None, None].expand(u.shape), config.masked.image_mask_ratio)


def _rows(batch: Batch) -> Tensor:
    return indices(batch.slots, batch.key.device)
