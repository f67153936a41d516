"""What is known of masks and images before any k-space is looked at: the training subjects' means, and their loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from kmtr.config import Data
from kmtr.data.loader.batch import Batch
from kmtr.inputs import Shared, full_image
from kmtr.tasks.losses import absolute_and_structural, cross_entropy_and_dice
from kmtr.types import SEGMENTATION_CLASSES, UNLABELLED, InputError

RAREST = 1e-3
"""Least frequency of a class: a logit begins no lower."""


def mask_log_prior(data: Data, batches: Iterable[Batch]) -> Float[Tensor, "slice class y x"]:
    """Log of each class's frequency at every pixel of every slice slot, over all frames.

    Over the labelled pixels whose source draws the class; the background has the rest.
    """
    found = torch.zeros(len(SEGMENTATION_CLASSES), data.slices, *data.matrix, dtype=torch.float64)
    asked = torch.zeros_like(found)
    for batch in batches:
        assert batch.masks is not None
        assert batch.contoured is not None
        labelled, slots = (batch.masks != UNLABELLED).sum(2), list(batch.slots)
        for value in range(1, len(SEGMENTATION_CLASSES)):
            found[value, slots] += (batch.masks == value).sum((0, 2))
            asked[value, slots] += (labelled * batch.contoured[:, :, value, None, None]).sum(0)
    share = found / asked.clamp(min=1)
    share[0] = 1 - share[1:].sum(0)
    share = share.clamp(min=RAREST)
    return (share / share.sum(0)).log().float().movedim(0, 1).contiguous()


def mask_constant(batches: Iterable[Batch], prior: Float[Tensor, "slice class y x"]) -> Float[Tensor, ""]:
    """Loss of segmentation that `prior` has, mean over the subjects with a labelled pixel.

    Raises:
        InputError: no subject has one.
    """
    losses = []
    for batch in batches:
        assert batch.masks is not None
        assert batch.contoured is not None
        slots = torch.tensor(batch.slots)
        for truth, classes in zip(batch.masks, batch.contoured, strict=True):
            cells = (truth != UNLABELLED).any(-1).any(-1)
            if bool(cells.any()):
                z = cells.nonzero()[:, 0]
                counts = torch.tensor([len(z)])
                losses.append(cross_entropy_and_dice(prior[slots[z]], truth[cells], classes[z], counts))
    if not losses:
        raise InputError("task.tasks: expected training subjects with masks for segmentation, the dataset has none")
    return torch.cat(losses).mean()


def image_constant(data: Data, batches: Iterable[Batch], mean: Float[Tensor, "slice y x"]) -> Float[Tensor, ""]:
    """Loss of reconstruction that the population's mean image has, mean over subjects, in units of `Shared`."""
    losses = []
    for batch in batches:
        seen = Shared.of(batch, data.matrix)
        truth = full_image(batch, data.matrix) / seen.unit[:, None, None, None, None]
        cells = ~batch.padded
        guess = mean[torch.tensor(batch.slots)][None, :, None].expand(truth.shape)
        counts = cells.sum((1, 2))
        losses.append(absolute_and_structural(guess[cells], truth[cells], truth.amax((1, 2, 3, 4)), counts))
    return torch.cat(losses).mean()
