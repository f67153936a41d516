"""What is known of masks and images before any k-space is looked at: the training subjects' means, and their loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from kmtr.config import Data
from kmtr.data.loader.batch import Batch
from kmtr.inputs import Shared, full_image, known_peak
from kmtr.tasks.losses import absolute_and_structural, cross_entropy_and_dice, told
from kmtr.types import SEGMENTATION_CLASSES, UNLABELLED

RAREST = 1e-3
"""Least frequency of a class: a logit begins no lower."""
UNDRAWN = 1e-8
"""That of a class that no source draws in a view: its background may be the class, so the loss alone would not keep it
out of predictions; a subject that draws it all the same can still teach it.
"""


def mask_log_prior(data: Data, batches: Iterable[Batch]) -> Float[Tensor, "slice class y x"]:
    """Log of each class's frequency at every pixel of every slice slot, over all frames.

    Over the labelled pixels whose source draws the class; the background has the rest. A class that no source draws in
    a view begins so low that it is never predicted there.
    """
    found = torch.zeros(len(SEGMENTATION_CLASSES), data.slices, *data.matrix, dtype=torch.float64)
    asked = torch.zeros_like(found)
    for batch in batches:
        assert batch.masks is not None
        assert batch.contoured is not None
        cells = (*batch.masks.shape[:3], len(SEGMENTATION_CLASSES))
        truth, drawn = told(batch.masks, batch.contoured[:, :, None].expand(cells))
        labelled, slots = truth != UNLABELLED, list(batch.slots)
        for value in range(1, len(SEGMENTATION_CLASSES)):
            found[value, slots] += (truth == value).sum((0, 2))
            asked[value, slots] += (labelled & drawn[..., value, None, None]).sum((0, 2))
    share = found / asked.clamp(min=1)
    share[0] = 1 - share[1:].sum(0)
    views = torch.tensor(data.view_types)
    seen = asked.sum((2, 3)) > 0
    seen = torch.stack([seen[:, views == view].any(1) for view in data.view_types], dim=1)
    seen[0] = True
    share = torch.maximum(share, torch.where(seen, RAREST, UNDRAWN)[..., None, None])
    return (share / share.sum(0)).log().float().movedim(0, 1).contiguous()


def mask_constant(batches: Iterable[Batch], prior: Float[Tensor, "slice class y x"]) -> Float[Tensor, ""]:
    """Loss of segmentation that `prior` has, mean over the subjects with a labelled pixel.

    Raises:
        ValueError: no subject has one.
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
        raise ValueError("mask_constant: expected a subject with a labelled pixel")
    return torch.cat(losses).mean()


def moving_sd(data: Data, batches: Iterable[Batch]) -> Float[Tensor, ""]:
    """SD over all pixels of what moves in the temporally shared images, a frame less `Shared.still`, in units of
    `Shared`.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        seen, there = Shared.of(batch, data.matrix), ~batch.padded
        total += ((seen.image - seen.still(there)) * there[..., None, None]).double().square().sum()
        count += int(there.sum()) * data.matrix[0] * data.matrix[1]
    return (total / max(count, 1)).clamp(min=1e-12).sqrt().float()


def image_constant(data: Data, batches: Iterable[Batch], mean: Float[Tensor, "slice y x"]) -> Float[Tensor, ""]:
    """Loss of reconstruction that the population's mean image has, mean over subjects, in units of `Shared`; over the
    slices and frames whose image is known (`Batch.complete`).
    """
    losses = []
    for batch in batches:
        seen = Shared.of(batch, data.matrix)
        truth = full_image(batch, data.matrix) / seen.unit[:, None, None, None, None]
        cells = batch.complete
        guess = mean[torch.tensor(batch.slots)][None, :, None].expand(truth.shape)
        counts = cells.sum((1, 2))
        loss = absolute_and_structural(guess[cells], truth[cells], known_peak(truth, batch), counts)
        losses.append(loss[counts > 0])
    return torch.cat(losses).mean()
