"""Masks of the chosen slices and frames, on the pixels of the image that a batch's k-space makes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kmtr.config import Data
from kmtr.data.affine import Affine, resized
from kmtr.data.dataset.files import run_many
from kmtr.data.dataset.record import affine_of
from kmtr.data.loader.buckets import Shape
from kmtr.data.loader.samples import Samples
from kmtr.data.loader.shapes import choose, places_of
from kmtr.physics.fourier import crop_or_pad
from kmtr.physics.masks import zero_filled
from kmtr.types import SEGMENTATION_CLASSES, UNLABELLED


def read_masks(samples: Samples, data: Data, shape: Shape, pin: bool = False) -> dict[str, Tensor]:
    """``masks`` and ``contoured`` of samples in a batch of this shape, as `Batch` has them.

    Args:
        pin: page-locked memory for the masks.
    """
    views = list(places_of(data, shape))
    size, slices = len(samples.meta), views[-1][1].stop
    masks = torch.empty((size, slices, shape[2], *data.matrix), dtype=torch.uint8, pin_memory=pin).fill_(UNLABELLED)
    contoured = torch.zeros((size, slices, len(SEGMENTATION_CLASSES)), dtype=torch.bool)
    reads: list[Callable[[], None]] = []
    for view, slots in views:
        column = {kind: samples.meta.column(f"{kind}_{view}").to_pylist() for kind in _COLUMNS}
        for row in range(size):
            stored = {kind: values[row] for kind, values in column.items()}
            if stored["shape"] is None:
                continue
            where = _there(stored["shape"], slots)
            reads.append(partial(_fill, samples, data, (row, view), stored, masks[row, where], contoured[row, where]))
    run_many(reads, samples.in_flight)
    return {"masks": masks, "contoured": contoured}


_COLUMNS = ("shape", "acquired", "contoured")


def spacing_mm(samples: Samples, data: Data, shape: Shape) -> Tensor:
    """``spacing_mm`` of samples in a batch of this shape, as `Batch` has it."""
    views = list(places_of(data, shape))
    found = torch.full((len(samples.meta), views[-1][1].stop, 3), torch.nan)
    for view, slots in views:
        column = {
            kind: samples.meta.column(f"{kind}_{view}").to_pylist() for kind in ("shape", "acquired", "spacing_mm")
        }
        for row in range(len(found)):
            stored = {kind: values[row] for kind, values in column.items()}
            if stored["shape"] is not None and stored["spacing_mm"] is not None:
                where = _there(stored["shape"], slots)
                found[row, where] = torch.tensor(chosen_spacing_mm(stored, data, where.stop - where.start))
    return found


def _there(shape: list[int], slots: slice) -> slice:
    """Slice slots of a view that hold data of a subject.

    Args:
        shape: ``slice coil t ky kx`` of its view.
        slots: of the view in the batch.
    """
    return slice(slots.start, slots.start + min(shape[0], slots.stop - slots.start))


def _fill(
    samples: Samples, data: Data, subject: tuple[int, str], stored: dict[str, Any], masks: Tensor, contoured: Tensor
) -> None:
    """Fill in the masks of one view and the classes that it draws, where it has any."""
    found = samples.fetch_masks(*subject, stored["shape"])
    if found is None:
        return
    z = choose(len(found), len(masks), centred=True)
    t = choose(found.shape[1], masks.shape[1], centred=False)
    masks[:, : len(t)] = _on_grid(torch.from_numpy(found[np.ix_(z, t)]), data, stored)
    drawn = range(1, len(SEGMENTATION_CLASSES)) if stored["contoured"] is None else stored["contoured"]
    contoured[:, [0, *drawn]] = True


def _cropped(data: Data, stored: dict[str, Any]) -> tuple[bool, bool]:
    """True along axes (y, x) whose matrix was changed in the image, False where k-space is zero-filled.

    As in `collate`: an undersampled source is cropped along the readout alone.
    """
    return data.crop and stored["acquired"] is None, data.crop


def _on_grid(masks: Tensor, data: Data, stored: dict[str, Any]) -> Tensor:
    """Masks ``slice t y x`` of the source's matrix on the pixels of the configuration's."""
    for axis, want, cropped in zip((-2, -1), data.matrix, _cropped(data, stored), strict=True):
        if cropped:  # what is padded is unlabelled: ~0
            masks = ~crop_or_pad(~masks, (want,), (axis,))
    return masks if masks.shape[-2:] == data.matrix else zero_filled(masks, data.matrix)


def chosen_spacing_mm(stored: dict[str, Any], data: Data, chosen: int) -> tuple[float, float, float]:
    """Distance of `chosen` slices and size of a pixel: zero-filled images keep the field of view, cropped the pixel.

    Args:
        stored: ``shape``, ``acquired`` and ``spacing_mm`` of the view, as its row has them.
    """
    slices, _, _, ny, nx = stored["shape"]
    between, *pixel = stored["spacing_mm"]
    height, width = (
        size if cropped else size * n / want
        for size, n, want, cropped in zip(pixel, (ny, nx), data.matrix, _cropped(data, stored), strict=True)
    )
    return between * slices / chosen, height, width


def grid_affine(stored: dict[str, Any], data: Data) -> Affine | None:
    """Affine of all slices of the source on the pixels of the configuration's matrix; None: unknown.

    Args:
        stored: ``shape``, ``acquired`` and ``affine`` of the view, as its row has them.
    """
    if stored["affine"] is None:
        return None
    found, (*_, ny, nx) = affine_of(stored["affine"]), stored["shape"]
    for axis, n, want, cropped in zip((1, 0), (ny, nx), data.matrix, _cropped(data, stored), strict=True):
        found = resized(found, axis, n, want, cropped=cropped)
    return found
