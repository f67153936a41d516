"""Discs that beat: subjects whose masks and images can be compared pixel by pixel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from kmtr.data.loader.batch import Batch
from kmtr.physics.fourier import crop_or_pad, fft2c, magnitude_image
from kmtr.types import UNLABELLED, Study, View

SPACING_MM = (8.0, 1.0, 1.0)
AREA = 0.05
"""Share of the field of view that a disc has at least."""


def disc(
    slices: int, frames: int, matrix: tuple[int, int], place: float = 0.0, coils: int = 2, unit: int = 128
) -> View:
    """A bright disc in a dark field: each slice, frame and `place` has another centre or size. Sizes are in pixels of a
    field of view of `unit` pixels, so that they scale with it.
    """
    y, x = (((np.arange(n) - n // 2) * unit / n).reshape(s) for n, s in zip(matrix, ((-1, 1), (1, -1)), strict=True))
    z, t = np.arange(slices).reshape(-1, 1, 1, 1), np.arange(frames).reshape(-1, 1, 1)
    mask = np.hypot(y - 9 - place - z, x + 12 - 2 * z) < 19 - t
    image = np.where(mask, 1.0, 0.02)[:, None] * np.exp(1j * np.arange(coils)).reshape(-1, 1, 1, 1)
    kspace = fft2c(image).astype(np.complex64)
    return View(kspace, segmentation=mask.astype(np.uint8), spacing_mm=SPACING_MM, contoured=(1,))


def study(index: int, slices: int = 3, matrix: tuple[int, int] = (128, 128), frames: int = 4) -> Study:
    """A subject of all views; centres differ from view to view."""
    views = {"sax": disc(slices, frames, matrix)}
    views |= {f"lax_{n}ch": disc(1, frames, matrix, place=4.0 * n) for n in (2, 3, 4)}
    return Study(f"p-{index}", views)


def undersampled(view: View) -> View:
    """The view as a scanner would give it that skips the outermost lines here and there."""
    slices, _, frames, ny, _ = view.kspace.shape
    sampled = np.ones((slices, frames, ny), bool)
    sampled[..., :: ny // 4] = False
    return replace(view, kspace=view.kspace * sampled[:, None, ..., None], sampled=sampled)


def dice(batch: Batch, matrix: tuple[int, int]) -> torch.Tensor:
    """Dice of masks and bright pixels of the image of the configuration's matrix, ``batch slice t``; NaN: no masks."""
    assert batch.masks is not None
    image = magnitude_image(crop_or_pad(batch.kspace, matrix, (-2, -1)))
    bright = image > image.flatten(-2).quantile(1 - AREA / 2, dim=-1)[..., None, None] / 2
    known, mine = batch.masks != UNLABELLED, batch.masks == 1
    both = (mine & bright).sum((-2, -1))
    return 2 * both / (mine.sum((-2, -1)) + (bright & known).sum((-2, -1)))
