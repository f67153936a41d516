"""Baselines: linear maps from the undersampled k-space, or no input at all, to labels and segmentations.

A claim of the encoder on a dataset has to beat these. Where they are near perfect the dataset is too easy, and nothing
is shown by winning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from kmtr.config import Data, RunConfig, override
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.masks import read_masks
from kmtr.data.loader.shapes import full_shape
from kmtr.evaluate.predictions import MASK_RIDGE, MEAN_MASK, HeldOut, joined, rows
from kmtr.evaluate.predictors import true_accelerations
from kmtr.evaluate.tables import DICE
from kmtr.inputs import view_shared
from kmtr.metrics import dice, ridge_predictions
from kmtr.metrics.segmentation import LV_CAVITY
from kmtr.physics.fourier import crop_or_pad, magnitude_image
from kmtr.physics.lines import phase_gain
from kmtr.types import SEGMENTATION_CLASSES

VERSION = 2
"""Version of the baselines; 1 did not separate static and dynamic part. A result of another one is made anew."""
LOW_RESOLUTION = 16
CENTRE = (4, 8)
"""Lines and samples along each, about the centre of k-space."""
CHUNK = 32
"""Subjects in memory at once."""
MIN_CONTOURED = 3
"""Contoured subjects of a split, below which masks have no score."""
CLASSES = len(SEGMENTATION_CLASSES)


def central(batch: Batch) -> np.ndarray:
    """The central 4 x 8 complex samples of every slice and frame, zero where not sampled, as `still_and_moving`."""
    kspace = batch.kspace / phase_gain(batch.kspace, batch.sampled)[..., None, None, None]
    kept = torch.where(batch.sampled[:, :, None, :, :, None], kspace, 0)
    ky, kx = (slice(n // 2 - size // 2, n // 2 + size // 2) for n, size in zip(kept.shape[-2:], CENTRE, strict=True))
    return still_and_moving(torch.view_as_real(kept[..., ky, kx].contiguous()).movedim(2, 3), batch.padded)


def low_resolution(batch: Batch) -> np.ndarray:
    """View-shared zero-filled magnitude images of 16 x 16 of every slice and frame, as `still_and_moving`.

    A strong baseline, though it trains no network.
    """
    shared = view_shared(batch)
    size = tuple(min(LOW_RESOLUTION, n) for n in shared.shape[-2:])
    return still_and_moving(magnitude_image(crop_or_pad(shared, size, (-2, -1))), batch.padded)


def still_and_moving(values: Float[Tensor, "batch slice t *rest"], padded: Bool[Tensor, "batch slice t"]) -> np.ndarray:
    """The mean over the frames and each frame's deviation from it, float32 ``subject feature``.

    Standardised apart, as a ridge does, the little that moves weighs as much as what stands still: without the split
    it is lost in the penalty.
    """
    present = (~padded).to(values.dtype).view(*padded.shape, *[1] * (values.ndim - 3))
    mean = (values * present).sum(2, keepdim=True) / present.sum(2, keepdim=True).clamp(min=1)
    return torch.cat([mean, (values - mean) * present], dim=2).flatten(1).cpu().numpy()


# -------------------------------------------------------------------------------------------------------------- masks


def score_masks(config: RunConfig, dataset: Dataset, progress: Callable[[int, int], None]) -> pa.Table:
    """Dice of both baselines as rows (`predictions.SCHEMA`) at each `evaluate.accelerations`.

    The baselines: the training subjects' mean mask, which needs no input, and linear regression from the zero-filled,
    view-shared image to every pixel.

    Subjects are those that a probe has, as far as they are contoured; no rows where fewer than 3 of either split are,
    or sources differ in shape.
    """
    readers = {split: dataset.reader(split, config.data) for split in ("train", "test")}
    chosen = {
        "train": subjects.labelled(config.seed, len(readers["train"]), config.evaluate.labels),
        "test": subjects.held_out(config.seed, len(readers["test"]), config.evaluate.subjects),
    }
    cases = {split: Contoured.read(readers[split], rows, config) for split, rows in chosen.items()}
    if min(map(len, cases.values())) < MIN_CONTOURED:
        return joined([])
    train, test = cases["train"], cases["test"]
    pseudonyms = dict(zip(chosen["test"], subjects.pseudonyms(readers["test"], chosen["test"]), strict=True))
    names = tuple(pseudonyms[row] for row in test.rows)
    held_out = HeldOut(names, DICE, np.full((len(test), len(DICE)), np.nan))
    mean = dice(test.masks, np.broadcast_to(_most_frequent(train.masks), test.masks.shape), CLASSES)
    found, total = [], len(config.evaluate.accelerations) * (len(train) + len(test))
    for number, r in enumerate(config.evaluate.accelerations):
        fixed = override(config, {"sampling.accelerations": (r,)})
        seen, done = {}, number * (len(train) + len(test))
        for split, some in cases.items():
            seen[split] = some.images(readers[split], fixed, partial(_tell, progress, done, total))
            done += len(some)
        guessed = _ridge_masks(seen["train"].pixels, train.masks, seen["test"].pixels)
        ridge = dice(test.masks, guessed, CLASSES)
        for name, scores in ((MEAN_MASK, mean), (MASK_RIDGE, ridge)):
            found.append(
                rows(
                    name,
                    held_out,
                    scores,
                    acceleration=r,
                    seed=config.seed,
                    labels=len(train),
                    true_acceleration=seen["test"].true_acceleration,
                )
            )
    return joined(found)


def _tell(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


@dataclass(frozen=True)
class Images:
    """Images of some subjects, and the accelerations at which they were really acquired."""

    pixels: Float[np.ndarray, "subject pixel"]
    true_acceleration: Float[np.ndarray, " subject"]


@dataclass(frozen=True)
class Contoured:
    """Subjects with contours in all slots of the configuration.

    Attributes:
        rows: their places in the split, in the order that was asked for.
        frames: number of the frame with the largest LV cavity.
        masks: classes at that frame.
    """

    rows: list[int]
    frames: Int[np.ndarray, " subject"]
    masks: UInt8[np.ndarray, "subject slice y x"]

    @staticmethod
    def read(reader: Reader, rows: list[int], config: RunConfig) -> Contoured:
        """Those of the rows that are contoured in all slices, and of the configuration's matrix and frames."""
        data, shape = config.data, full_shape(config.data)
        kept: list[int] = []
        frames: list[int] = []
        masks = [np.zeros((0, data.slices, *data.matrix), np.uint8)]
        complete = _complete(reader, rows, data)
        for first in range(0, len(complete), CHUNK):
            some = complete[first : first + CHUNK]
            read = read_masks(reader.samples(some), data, shape)
            drawn, segmentation = read["contoured"].any(2).all(1).numpy(), read["masks"].numpy()
            cavity = (segmentation == LV_CAVITY).sum((1, 3, 4))
            usable = np.flatnonzero(drawn & cavity.any(1))
            largest = cavity[usable].argmax(1)
            kept += [some[i] for i in usable]
            frames += largest.tolist()
            masks.append(segmentation[usable, :, largest])
        return Contoured(kept, np.array(frames, int), np.concatenate(masks))

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, reader: Reader, config: RunConfig, tell: Callable[[int], None]) -> Images:
        """View-shared zero-filled magnitude images of the masks' frames."""
        parts: list[np.ndarray] = []
        true: list[np.ndarray] = []
        first = 0
        for host in pipeline.read_in_order(reader, self.rows, CHUNK, config):
            batch = host.to(torch.device("cpu"))
            at = torch.from_numpy(self.frames[first : first + len(batch)])
            first += len(batch)
            shared = view_shared(batch)[torch.arange(len(batch)), :, :, at]
            parts.append(magnitude_image(shared[:, :, :, None]).flatten(1).numpy())
            true.append(true_accelerations(batch))
            tell(first)
        return Images(np.concatenate(parts), np.concatenate(true))


def _ridge_masks(
    images: Float[np.ndarray, "subject pixel"],
    masks: UInt8[np.ndarray, "subject slice y x"],
    others: Float[np.ndarray, "other pixel"],
) -> UInt8[np.ndarray, "other slice y x"]:
    """Masks of `others` by linear regression on (`images`, `masks`); a slice's outputs at a time fit into memory."""
    predicted = np.empty((len(others), *masks.shape[1:]), np.uint8)
    for z in range(masks.shape[1]):
        onehot = np.stack([masks[:, z] == value for value in range(CLASSES)], -1).astype(np.float32)
        guess = ridge_predictions(images, onehot.reshape(len(onehot), -1), others)
        predicted[:, z] = guess.reshape(len(guess), *onehot.shape[1:]).argmax(-1)
    return predicted


def _complete(reader: Reader, rows: list[int], data: Data) -> list[int]:
    """Those of the rows that fill all slices and frames, of the configuration's matrix."""
    meta = reader.samples(rows).meta
    shapes = zip(*(meta.column(f"shape_{view}").to_pylist() for view in data.views), strict=True)

    def fills(view: str, shape: list[int] | None) -> bool:
        if shape is None:
            return False
        slices, _, frames, ny, nx = shape
        return slices >= data.slots(view) and frames >= data.frames and (ny, nx) == data.matrix

    return [row for row, each in zip(rows, shapes, strict=True) if all(map(fills, data.views, each))]


def _most_frequent(masks: np.ndarray) -> np.ndarray:
    """The class that most training subjects have at each pixel, ``slice y x``."""
    return np.stack([(masks == value).sum(0) for value in range(CLASSES)]).argmax(0).astype(np.uint8)
