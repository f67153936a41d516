"""A short axis that tests draw: ventricles, their wall and their contours, in an oblique plane as scanners give it."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np

LV_CAVITY, LV_MYOCARDIUM, RV = 1, 2, 3
SHAPE = (96, 80, 8, 6)  # x y slice t
SPACING = (1.4, 1.5, 8.0)

_APEX = np.array([-1, 1, -1]) / np.sqrt(3)
_LATERAL = np.array([-1, -1, 0]) / np.sqrt(2)
DIRECTIONS = np.stack([_LATERAL, np.cross(_LATERAL, _APEX), _APEX], 1)


def affine(spacing: tuple[float, ...] = SPACING, corner: tuple[float, ...] = (40.0, 50.0, 60.0)) -> np.ndarray:
    """Columns x, y, slice, right-anterior-superior."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = DIRECTIONS * spacing, corner
    return matrix


def classes(shift: float = 0.0) -> np.ndarray:
    """uint8 ``x y slice t``, SEGMENTATION_CLASSES of every voxel; `shift` moves the wall away from its cavity."""
    x, y, z, t = np.ogrid[tuple(slice(n) for n in SHAPE)]
    radius = 13 + 4 * np.cos(2 * np.pi * t / SHAPE[3]) - z * 0.6
    cavity = np.hypot(x - 58.0, y - 44.0) < radius
    wall = np.hypot(x - 58.0 - shift, y - 44.0) < radius + 5
    right = np.hypot(x - 32.0, y - 40.0) < 0.9 * radius
    return np.where(cavity, LV_CAVITY, np.where(wall, LV_MYOCARDIUM, np.where(right, RV, 0))).astype(np.uint8)


def magnitude(seed: int = 0) -> np.ndarray:
    """int16 ``x y slice t``: bright blood, a dark wall, noise."""
    of = np.array([200, 800, 120, 750], np.int16)
    x, _, z, _ = np.ogrid[tuple(slice(n) for n in SHAPE)]
    noise = np.random.default_rng(seed).integers(0, 40, SHAPE)
    return (of[classes()] + x + 15 * z + noise).astype(np.int16)


def coded(drawn: np.ndarray, cavity: int, myocardium: int, right: int) -> np.ndarray:
    """Classes as values of some data set's contours."""
    return np.array([0, cavity, myocardium, right], np.uint8)[drawn]


def save(
    path: Path, array: np.ndarray, matrix: np.ndarray | None = None, *, frame_time: float = 0.04,
    units: tuple[str, str] = ("mm", "sec"), pixdim: tuple[float, ...] | None = None,
) -> Path:  # fmt: skip
    """A NIfTI file; `pixdim` None: as the affine has it."""
    image = nibabel.Nifti1Image(array, affine() if matrix is None else matrix)
    image.header.set_xyzt_units(*units)
    if array.ndim > 3:
        sizes = image.header.get_zooms()[:3] if pixdim is None else pixdim
        image.header.set_zooms((*sizes, *[1.0] * (array.ndim - 4), frame_time))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def volume_ml(drawn: np.ndarray, spacing: tuple[float, ...] = SPACING) -> float:
    """Largest LV cavity over the frames."""
    return float((drawn == LV_CAVITY).sum((0, 1, 2)).max() * np.prod(spacing) / 1000)
