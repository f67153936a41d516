"""What is known of masks and images before any k-space is looked at: the training subjects' means, and their loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader import pipeline
from kmtr.data.loader.masks import read_masks
from kmtr.data.loader.order import permutation
from kmtr.data.loader.shapes import full_shape
from kmtr.inputs import Shared, full_image
from kmtr.tasks.losses import absolute_and_structural, cross_entropy_and_dice
from kmtr.types import SEGMENTATION_CLASSES, UNLABELLED, InputError

MAX_SUBJECTS = 256
"""Training subjects that a mean is taken over."""
CHUNK = 16
RAREST = 1e-3
"""Least frequency of a class: a logit begins no lower."""


def chosen(config: RunConfig, rows: Sequence[int]) -> list[int]:
    """Up to `MAX_SUBJECTS` of the training rows, by the seed."""
    return [rows[i] for i in permutation(config.seed, 0, len(rows))[:MAX_SUBJECTS]]


def mask_log_prior(config: RunConfig, reader: Reader, rows: Sequence[int]) -> Float[Tensor, "slice class y x"]:
    """Log of each class's frequency at every pixel of every slice slot, over all frames.

    Over the labelled pixels whose source draws the class; the background has the rest.
    """
    data, classes = config.data, range(1, len(SEGMENTATION_CLASSES))
    found = torch.zeros(len(SEGMENTATION_CLASSES), data.slices, *data.matrix, dtype=torch.float64)
    asked = torch.zeros_like(found)
    for masks, drawn in _masks(config, reader, rows):
        labelled = (masks != UNLABELLED).sum(2)
        for value in classes:
            found[value] += (masks == value).sum((0, 2))
            asked[value] += (labelled * drawn[:, :, value, None, None]).sum(0)
    share = found / asked.clamp(min=1)
    share[0] = 1 - share[1:].sum(0)
    share = share.clamp(min=RAREST)
    return (share / share.sum(0)).log().float().movedim(0, 1).contiguous()


def mask_constant(
    config: RunConfig, reader: Reader, rows: Sequence[int], prior: Float[Tensor, "slice class y x"]
) -> Float[Tensor, ""]:
    """Loss of segmentation that `prior` has, mean over the subjects with a labelled pixel.

    Raises:
        InputError: no subject has one.
    """
    losses = []
    for masks, drawn in _masks(config, reader, rows):
        for truth, classes in zip(masks, drawn, strict=True):
            cells = (truth != UNLABELLED).any(-1).any(-1)
            if bool(cells.any()):
                z = cells.nonzero()[:, 0]
                counts = torch.tensor([len(z)])
                losses.append(cross_entropy_and_dice(prior[z], truth[cells], classes[z], counts))
    if not losses:
        raise InputError("task.tasks: expected training subjects with masks for segmentation, the dataset has none")
    return torch.cat(losses).mean()


def image_constant(
    config: RunConfig, reader: Reader, rows: Sequence[int], mean: Float[Tensor, "slice y x"]
) -> Float[Tensor, ""]:
    """Loss of reconstruction that the population's mean image has, mean over subjects, in units of `Shared`."""
    losses = []
    for host in pipeline.read_in_order(reader, rows, CHUNK, config):
        batch = host.to(torch.device("cpu"))
        seen = Shared.of(batch, config.data.matrix)
        truth = full_image(batch, config.data.matrix) / seen.unit[:, None, None, None, None]
        cells = ~batch.padded
        guess = mean[torch.tensor(batch.slots)][None, :, None].expand(truth.shape)
        counts = cells.sum((1, 2))
        losses.append(absolute_and_structural(guess[cells], truth[cells], truth.amax((1, 2, 3, 4)), counts))
    return torch.cat(losses).mean()


def _masks(
    config: RunConfig, reader: Reader, rows: Sequence[int]
) -> Iterator[tuple[UInt8[Tensor, "batch slice t y x"], Bool[Tensor, "batch slice class"]]]:
    """Masks of these subjects and the classes that their sources draw."""
    for first in range(0, len(rows), CHUNK):
        read = read_masks(reader.samples(list(rows[first : first + CHUNK])), config.data, full_shape(config.data))
        yield read["masks"], read["contoured"]
