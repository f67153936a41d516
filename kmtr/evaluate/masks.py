"""Floors of masks: what needs no network. A claim has to beat them.

The mean mask needs no input; a linear map from the temporally shared image to every pixel is the strongest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import Batch, Wanted
from kmtr.data.loader.device import HostBatch
from kmtr.evaluate.predictions import MASK_RIDGE, MEAN_MASK, HeldOut, Name, joined
from kmtr.evaluate.predictors import Predictor, predict
from kmtr.inputs import Shared
from kmtr.metrics import Kernel
from kmtr.metrics.dense import DICE
from kmtr.metrics.segmentation import extreme_frames
from kmtr.tasks import priors
from kmtr.train import start
from kmtr.types import SEGMENTATION_CLASSES, UNLABELLED

log = logging.getLogger(__name__)

CHUNK = 32
"""Subjects in memory at once."""
MIN_CONTOURED = 3
"""Contoured subjects, below which no linear map is fitted."""
CLASSES = len(SEGMENTATION_CLASSES)
MASKS = Wanted(masks=True)
ROWS = 64
"""Frames that the linear map answers at once."""
MOST_BYTES = 2**31
"""Memory for the linear map, which bounds the subjects that it is fitted on."""


@dataclass(frozen=True)
class MeanMask:
    """Predictor that says the same mask of every subject and frame.

    Attributes:
        mask: on the slice slots of the configuration.
    """

    mask: UInt8[Tensor, "slice y x"]

    @staticmethod
    def fit(config: RunConfig, reader: Reader, rows: Sequence[int]) -> MeanMask:
        """The class that is most frequent at each pixel, where the task `segmentation` begins."""
        prior = priors.mask_log_prior(config.data, start.averaged(config, reader, rows, "masks"))
        return MeanMask(prior.argmax(1).to(torch.uint8))

    def __call__(self, batch: Batch, /) -> dict[str, Tensor]:
        mask = self.mask.to(batch.key.device)[list(batch.slots), None].expand(*batch.padded.shape[1:], -1, -1)
        return {"masks": torch.where(batch.padded[..., None, None], UNLABELLED, mask)}


class MaskRidge:
    """Predictor of linear maps from the temporally shared image of all slices of a frame to the mask of each slice.

    Only what some training subject shows is fitted: where none has a class, the map says 0 of it. The background is
    what is left of 1.

    Args:
        images: ``row pixel``, two rows of each subject (end-diastole, end-systole).
        masks: ``row slice y x``.
    """

    def __init__(self, images: np.ndarray, masks: np.ndarray, matrix: tuple[int, int]):
        self.matrix, shape = matrix, masks.shape
        some = _one_hot(masks.reshape(len(masks), -1)[:, :: max(1, masks[0].size // 1000)])
        self.kernel = Kernel(images, some, copies=2)
        self.maps = [self._map(masks[:, z].reshape(shape[0], -1)) for z in range(shape[1])]

    def _map(self, masks: UInt8[np.ndarray, "row pixel"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Outputs (pixel and class, flat) that a slice's map has, their dual weights and bias."""
        classes = _one_hot(masks).reshape(len(masks), -1, CLASSES)
        classes[..., 0] = 0
        flat = classes.reshape(len(masks), -1)
        shown = np.flatnonzero(flat.any(0))
        return shown, *self.kernel.weights(flat[:, shown])

    def __call__(self, batch: Batch, /) -> dict[str, Tensor]:
        images, there = features(batch, self.matrix), ~batch.padded.cpu().numpy()
        masks = np.full((*batch.padded.shape, *self.matrix), UNLABELLED, np.uint8)
        frames = images.swapaxes(1, 2)
        # Many frames at once: the weights of a slice are too large for a processor's cache.
        seen = self.kernel(frames.reshape(frames.shape[0] * frames.shape[1], -1))
        for z, of_slice in enumerate(self.maps):
            said = np.concatenate([self._said(*of_slice, seen[i : i + ROWS]) for i in range(0, len(seen), ROWS)])
            masks[:, z] = np.where(there[:, z, :, None, None], said.reshape(masks[:, z].shape), UNLABELLED)
        return {"masks": torch.from_numpy(masks).to(batch.key.device)}

    def _said(
        self, shown: np.ndarray, weights: np.ndarray, bias: np.ndarray, seen: Float[np.ndarray, "row other"]
    ) -> UInt8[np.ndarray, "row y x"]:
        """The likeliest class of each pixel of a slice, in some frames."""
        flat = np.zeros((len(seen), int(np.prod(self.matrix)) * CLASSES), np.float32)
        flat[:, shown] = seen @ weights + bias
        scores = flat.reshape(len(seen), *self.matrix, CLASSES)
        scores[..., 0] = 1 - scores.sum(-1)
        found: np.ndarray = scores.argmax(-1).astype(np.uint8)
        return found


def _one_hot(masks: UInt8[np.ndarray, "row pixel"]) -> Float[np.ndarray, "row output"]:
    return (masks[..., None] == np.arange(CLASSES, dtype=np.uint8)).reshape(len(masks), -1).astype(np.float32)


def features(batch: Batch, matrix: tuple[int, int]) -> Float[np.ndarray, "batch slice t pixel"]:
    """Temporally shared images of unit RMS per subject, float32."""
    found: np.ndarray = Shared.of(batch, matrix).image.flatten(3).cpu().numpy()
    return found


def fit(config: RunConfig, reader: Reader, rows: Sequence[int], batches: Iterable[HostBatch]) -> dict[Name, Predictor]:
    """Both floors of masks, of the training subjects in `rows`; nothing where none is contoured, and no linear map
    where fewer than 3 are in all slices at the extremes of their cycle.

    Args:
        batches: these subjects with masks, at one R.
    """
    pixels = config.data.slices * int(np.prod(config.data.matrix))
    most = max(MIN_CONTOURED, MOST_BYTES // (2 * 4 * pixels * (CLASSES + 1)))
    images: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    contoured = False
    for host in batches:
        if len(images) >= most:
            break
        batch = host.to(torch.device("cpu"))
        assert batch.masks is not None
        assert batch.contoured is not None
        seen, contoured = features(batch, config.data.matrix), contoured or bool(batch.contoured.any())
        for image, mask in zip(seen, batch.masks.numpy(), strict=True):
            frames = extreme_frames(mask)
            if frames is None or (mask[:, frames] == UNLABELLED).any():
                continue
            images.append(image[:, frames].swapaxes(0, 1).reshape(2, -1))
            masks.append(mask[:, frames].swapaxes(0, 1))
    found: dict[Name, Predictor] = {}
    if contoured:
        found[MEAN_MASK] = MeanMask.fit(config, reader, rows)
    if len(images) >= MIN_CONTOURED:
        rows_of = np.concatenate(images[:most]), np.concatenate(masks[:most])
        found[MASK_RIDGE] = MaskRidge(*rows_of, config.data.matrix)
        if len(images) >= most < len(rows):
            log.warning("masks: the linear map is fitted on %d of %d training subjects, for memory", most, len(rows))
    elif contoured:
        log.warning(
            "masks: no linear map among the floors: %d training subjects are contoured in all slices at both extremes",
            len(images),
        )
    return found


def score_masks(config: RunConfig, dataset: Dataset, progress: Callable[[int, int], None]) -> pa.Table:
    """Dice of the floors of masks as rows (`predictions.SCHEMA`) at each `evaluate.accelerations`, of the subjects that
    a probe has; no rows where no training subject or no test subject is contoured.
    """
    readers = {split: dataset.reader(split, config.data) for split in ("train", "test")}
    labelled = subjects.labelled(config.seed, len(readers["train"]), config.evaluate.labels)
    asked = subjects.held_out(config.seed, len(readers["test"]), config.evaluate.subjects)
    names = tuple(subjects.pseudonyms(readers["test"], asked))
    held_out = HeldOut(names, DICE, np.full((len(names), len(DICE)), np.nan))
    parts, done, total = [], 0, len(config.evaluate.accelerations) * (len(labelled) + len(asked))

    def told(batches: Iterable[HostBatch]) -> Iterable[HostBatch]:
        nonlocal done
        for host in batches:
            yield host
            done += len(host)
            progress(done, total)

    for r in config.evaluate.accelerations:
        fixed = override(config, {"sampling.accelerations": (r,)})
        train = told(pipeline.read_in_order(readers["train"], labelled, CHUNK, fixed, MASKS))
        test = told(pipeline.read_in_order(readers["test"], asked, CHUNK, fixed, MASKS))
        fitted = fit(config, readers["train"], labelled, train)
        if not fitted:
            return joined([])
        cpu, seed = torch.device("cpu"), config.seed
        parts.append(
            predict(fitted, test, held_out, config.data, acceleration=r, seed=seed, labels=len(labelled), device=cpu)
        )
    return joined(parts)
