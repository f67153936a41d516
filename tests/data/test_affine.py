"""Affines of flipped, cropped and zero-filled images: every place of the scanner stays where it was."""

from __future__ import annotations

import gzip
from itertools import product

import hearts
import nibabel
import numpy as np
import pytest

from kmtr.data.affine import flipped, resized
from kmtr.evaluate.predict.dense import nifti
from kmtr.physics.fourier import crop_or_pad, fft2c, ifft2c
from kmtr.types import InputError, View

SIZES = (12, 13, 16, 17)


def blob(ny: int, nx: int, y: float, x: float) -> np.ndarray:
    """An image ``y x`` with one bright place, which a Fourier transform can resize."""
    at_y, at_x = np.ogrid[:ny, :nx]
    return np.exp(-((at_y - y) ** 2 + (at_x - x) ** 2) / (2 * 1.5**2))


def brightest(image: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Place in mm of the middle of what is bright."""
    weights = np.abs(image) ** 2
    at_y, at_x = np.indices(image.shape)
    x, y = ((weights * at).sum() / weights.sum() for at in (at_x, at_y))
    return (affine @ (x, y, 0, 1))[:3]


@pytest.mark.parametrize(("have", "want"), list(product(SIZES, SIZES)))
@pytest.mark.parametrize("cropped", [True, False])
def test_what_is_bright_stays_in_its_place(have: int, want: int, cropped: bool) -> None:
    affine = hearts.affine()
    image = blob(have, 20, have / 2 + 0.7, 9.2)
    if cropped:
        found = crop_or_pad(image, (want,), (0,))
    else:  # as a loader zero-fills: the centre of k-space stays at n // 2
        found = ifft2c(crop_or_pad(fft2c(image.astype(np.complex64)), (want,), (0,)))
    moved = resized(affine, 1, have, want, cropped=cropped)
    np.testing.assert_allclose(brightest(found, moved), brightest(image, affine), atol=0.05)
    np.testing.assert_allclose(np.linalg.norm(moved[:3, 1]), 1.5 if cropped else 1.5 * have / want)


def test_flips_turn_round_and_back() -> None:
    affine = hearts.affine()
    for axis, count in enumerate((5, 6, 7)):
        turned = flipped(affine, axis, count)
        voxel = np.array([1, 2, 3, 1])
        mirrored = voxel.copy()
        mirrored[axis] = count - 1 - voxel[axis]
        np.testing.assert_allclose(turned @ mirrored, affine @ voxel)
        np.testing.assert_allclose(flipped(turned, axis, count), affine, atol=1e-12)


@pytest.mark.parametrize("shear", [0.0, 5.0])
def test_a_file_of_a_sheared_image_has_no_qform(shear: float) -> None:
    """Which could not say it, and would lie elsewhere."""
    affine = hearts.affine()
    affine[:3, 2] += np.tan(np.deg2rad(shear)) * 8.0 * hearts.DIRECTIONS[:, 0]
    file = nibabel.Nifti1Image.from_bytes(
        gzip.decompress(nifti(np.zeros((2, 3, 4, 5), np.uint8), (8.0, 1.0, 1.0), 0.0, affine))
    )
    np.testing.assert_allclose(file.affine, affine, atol=1e-4)
    assert int(file.header["qform_code"]) == (0 if shear else 1)
    assert int(file.header["sform_code"]) == 1


@pytest.mark.parametrize("wrong", [np.zeros((4, 4)), np.eye(3), np.eye(4).T + np.eye(4, k=-3), np.full((4, 4), np.nan)])
def test_what_places_no_voxel_is_no_affine(wrong: np.ndarray) -> None:
    with pytest.raises(InputError, match="affine: expected 4 x 4 finite numbers"):
        View(np.ones((1, 1, 1, 2, 2), np.complex64), affine=wrong)
