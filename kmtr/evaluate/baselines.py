"""Baselines: linear maps from the undersampled k-space, or no input at all, to labels and segmentations.

A claim of the encoder on a dataset has to beat these. Where they are near perfect the dataset is too easy, and nothing
is shown by winning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from kmtr.config import RunConfig, override
from kmtr.data.dataset import record
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader import pipeline
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.collate import choose
from kmtr.data.loader.order import permutation
from kmtr.metrics import dice, ridge_predictions
from kmtr.physics.fourier import crop_or_pad, magnitude_image
from kmtr.physics.lines import phase_gain, static_part
from kmtr.physics.sampling import VALIDATION
from kmtr.report.html import Cell, Table
from kmtr.types import SEGMENTATION_CLASSES

VERSION = 2
"""Version of the baselines; 1 did not separate static and dynamic part. A result of another one is made anew."""
LOW_RESOLUTION = 16
CENTRE = (4, 8)
"""Lines and samples along each, about the centre of k-space."""
CHUNK = 32
CLASSES = len(SEGMENTATION_CLASSES)


def view_shared(batch: Batch) -> Complex[Tensor, "batch slice coil t ky kx"]:
    """k-space in which a line that a frame lacks is the mean over the frames that have it; what no frame has is zero.

    Phase and gain are removed first.
    """
    kspace = batch.kspace / phase_gain(batch.kspace, batch.sampled)[..., None, None, None]
    return torch.where(batch.sampled[:, :, None, :, :, None], kspace, static_part(kspace, batch.sampled)[:, :, :, None])


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


@dataclass(frozen=True)
class MaskScores:
    """Dice at the frame with the largest LV cavity, mean over held-out subjects, at one nominal acceleration.

    Attributes:
        mean: per class (LV cavity to RA) of the training subjects' mean mask: needs no input.
        ridge: of linear regression from the zero-filled, view-shared image to every pixel of the mask.
    """

    acceleration: int
    true_acceleration: float
    mean: np.ndarray
    ridge: np.ndarray


def score_masks(config: RunConfig, dataset: Dataset, progress: Callable[[int, int], None]) -> list[MaskScores]:
    """Both baselines at each `evaluate.accelerations`, on the subjects that `evaluate.score` takes; empty where fewer
    than 3 of either split are contoured, or sources differ in shape.
    """
    counts = {"train": config.evaluate.labels, "test": config.evaluate.subjects}
    readers = {split: dataset.reader(split, config.data) for split in counts}
    columns = record.columns_of(config.data.views, segmentation=True)
    masks, frames, rows = {}, {}, {}
    for split, count in counts.items():
        chosen = permutation(config.seed + 2, 0, len(readers[split]))[:count].tolist()
        found = [(row, *mask) for row, mask in _masks(dataset.reader(split, config.data, columns), chosen, config)]
        if len(found) < 3:
            return []
        rows[split] = [row for row, _, _ in found]
        masks[split] = np.stack([mask for _, mask, _ in found])
        frames[split] = torch.tensor([frame for _, _, frame in found])
    total, done, scores = len(config.evaluate.accelerations) * sum(map(len, rows.values())), 0, []
    mean = _mean_dice(masks["test"], np.broadcast_to(_most_frequent(masks["train"]), masks["test"].shape))
    for acceleration in config.evaluate.accelerations:
        fixed = override(config, {"sampling.accelerations": (acceleration,)})
        images: dict[str, np.ndarray] = {}
        lines = cells = 0
        for split in counts:
            parts: list[np.ndarray] = []
            first = 0
            for host in pipeline.read_in_order(readers[split], rows[split], CHUNK, fixed, (), VALIDATION):
                batch = host.to(torch.device("cpu"))
                at = frames[split][first : first + len(batch)]
                first += len(batch)
                shared = view_shared(batch)[torch.arange(len(batch)), :, :, at]
                parts.append(magnitude_image(shared[:, :, :, None]).flatten(1).numpy())
                lines, cells = lines + int(batch.sampled.sum()), cells + int(batch.existing.sum())
                done += len(batch)
                progress(done, total)
            images[split] = np.concatenate(parts)
        predicted = np.empty_like(masks["test"])
        for z in range(predicted.shape[1]):  # one slice's outputs at a time fit into memory
            onehot = np.stack([masks["train"][:, z] == value for value in range(CLASSES)], -1).astype(np.float32)
            guess = ridge_predictions(images["train"], onehot.reshape(len(onehot), -1), images["test"])
            predicted[:, z] = guess.reshape(len(guess), *onehot.shape[1:]).argmax(-1)
        scores.append(MaskScores(acceleration, cells / max(lines, 1), mean, _mean_dice(masks["test"], predicted)))
    return scores


def _masks(reader: Reader, rows: list[int], config: RunConfig) -> Iterator[tuple[int, tuple[np.ndarray, int]]]:
    """Row, its masks uint8 ``slice y x`` over the configuration's slots and the frame they are of; subjects without
    contours, or of another matrix, are left out.
    """
    data = config.data
    for row in rows:
        study = record.to_study(reader.read([row]))
        parts: list[np.ndarray] = []
        for view in data.views:
            count = data.slots(view)
            seen = study.views.get(view)
            if seen is None or seen.segmentation is None or seen.segmentation.shape[-2:] != tuple(data.matrix):
                break
            slices, available = seen.segmentation.shape[:2]
            z, t = choose(slices, count, centred=True), choose(available, data.frames, centred=False)
            if len(z) < count or len(t) < data.frames:
                break
            parts.append(seen.segmentation[z][:, t])
        else:
            whole = np.concatenate(parts)
            cavity = (whole == 1).sum((0, 2, 3))
            if cavity.any():
                frame = int(cavity.argmax())
                yield row, (whole[:, frame], frame)


def _most_frequent(masks: np.ndarray) -> np.ndarray:
    """The class that most training subjects have at each pixel, ``slice y x``."""
    return np.stack([(masks == value).sum(0) for value in range(CLASSES)]).argmax(0).astype(np.uint8)


def _mean_dice(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        scores = dice(truth, predicted, CLASSES)
    known = np.isfinite(scores)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, scores, 0).sum(0) / np.maximum(count, 1), np.nan)


def mask_table(scores: list[MaskScores]) -> Table:
    """A row per acceleration and baseline."""
    rows: list[tuple[Cell, ...]] = []
    if scores:
        rows.append(("any", "", "mean mask", *_cells(scores[0].mean)))
    for s in scores:
        rows.append((s.acceleration, f"{s.true_acceleration:.2f}", "ridge on zero-filled image", *_cells(s.ridge)))
    return Table(
        "Dice at the frame with the largest LV cavity, mean over held-out subjects",
        ("R", "true R", "baseline", *SEGMENTATION_CLASSES[1:], "mean"),
        tuple(rows),
    )


def _cells(scores: np.ndarray) -> list[str]:
    return [f"{value:.3f}" if np.isfinite(value) else "-" for value in (*scores, np.nanmean(scores))]
