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
from kmtr.inputs import Shared, full_image, known_peak
from kmtr.tasks.losses import absolute_and_structural, cross_entropy_and_dice
from kmtr.types import SEGMENTATION_CLASSES, UNLABELLED

MAX_SUBJECTS = 256
"""Training subjects that a mean is taken over."""
CHUNK = 16
RAREST = 1e-3
"""Least frequency of a class: a logit begins no lower."""
UNDRAWN = 1e-8
"""That of a class that no source draws in a view: its background may be the class, so the loss alone would not keep it
out of predictions; a subject that draws it all the same can still teach it.
"""


def contoured(config: RunConfig, reader: Reader, rows: Sequence[int], most: int = MAX_SUBJECTS) -> list[int]:
    """Up to `most` of these rows with a labelled pixel in the slices and frames that are chosen, by the seed: a few
    contoured among many are found.
    """
    order, found = permutation(config.seed, 0, len(rows)), list[int]()
    for first in range(0, len(order), CHUNK):
        some = [rows[i] for i in order[first : first + CHUNK]]
        drawn = [row for row in some if _has_masks(config, reader, row)]
        for masks, _ in _masks(config, reader, drawn):
            labelled = (masks != UNLABELLED).flatten(1).any(1).tolist()
            found += [row for row, there in zip(drawn, labelled, strict=True) if there]
        if len(found) >= most:
            break
    return found[:most]


def complete(config: RunConfig, reader: Reader, rows: Sequence[int], most: int = MAX_SUBJECTS) -> list[int]:
    """Up to `most` of these rows of which the scanner acquired every line of a view, by the seed."""
    found: list[int] = []
    for i in permutation(config.seed, 0, len(rows)):
        if len(found) == most:
            break
        meta = reader.samples([rows[i]]).meta
        if any(
            meta.column(f"shape_{view}")[0].is_valid and not meta.column(f"acquired_{view}")[0].is_valid
            for view in config.data.views
        ):
            found.append(rows[i])
    return found


def mask_log_prior(config: RunConfig, reader: Reader, rows: Sequence[int]) -> Float[Tensor, "slice class y x"]:
    """Log of each class's frequency at every pixel of every slice slot, over all frames.

    Over the labelled pixels whose source draws the class; the background has the rest. A class that no source draws in
    a view begins so low that it is never predicted there.
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
    views = torch.tensor(data.view_types)
    drawn = asked.sum((2, 3)) > 0
    drawn = torch.stack([drawn[:, views == view].any(1) for view in data.view_types], dim=1)
    drawn[0] = True
    share = torch.maximum(share, torch.where(drawn, RAREST, UNDRAWN)[..., None, None])
    return (share / share.sum(0)).log().float().movedim(0, 1).contiguous()


def mask_constant(
    config: RunConfig, reader: Reader, rows: Sequence[int], prior: Float[Tensor, "slice class y x"]
) -> Float[Tensor, ""]:
    """Loss of segmentation that `prior` has, mean over the subjects with a labelled pixel.

    Raises:
        ValueError: no subject has one.
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
        raise ValueError("mask_constant: expected a subject with a labelled pixel")
    return torch.cat(losses).mean()


def image_constant(
    config: RunConfig, reader: Reader, rows: Sequence[int], mean: Float[Tensor, "slice y x"]
) -> Float[Tensor, ""]:
    """Loss of reconstruction that the population's mean image has, mean over subjects, in units of `Shared`; over the
    slices and frames whose image is known (`Batch.complete`).
    """
    losses = []
    for host in pipeline.read_in_order(reader, rows, CHUNK, config):
        batch = host.to(torch.device("cpu"))
        seen = Shared.of(batch, config.data.matrix)
        truth = full_image(batch, config.data.matrix) / seen.unit[:, None, None, None, None]
        cells = batch.complete
        guess = mean[torch.tensor(batch.slots)][None, :, None].expand(truth.shape)
        counts = cells.sum((1, 2))
        loss = absolute_and_structural(guess[cells], truth[cells], known_peak(truth, batch), counts)
        losses.append(loss[counts > 0])
    return torch.cat(losses).mean()


def _has_masks(config: RunConfig, reader: Reader, row: int) -> bool:
    samples = reader.samples([row])
    shapes = {view: samples.meta.column(f"shape_{view}")[0].as_py() for view in config.data.views}
    return any(shape and samples.fetch_masks(0, view, shape) is not None for view, shape in shapes.items())


def _masks(
    config: RunConfig, reader: Reader, rows: Sequence[int]
) -> Iterator[tuple[UInt8[Tensor, "batch slice t y x"], Bool[Tensor, "batch slice class"]]]:
    """Masks of these subjects and the classes that their sources draw."""
    for first in range(0, len(rows), CHUNK):
        read = read_masks(reader.samples(list(rows[first : first + CHUNK])), config.data, full_shape(config.data))
        yield read["masks"], read["contoured"]
