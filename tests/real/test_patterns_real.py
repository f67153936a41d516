"""Patterns of the challenges and of VISTA: what is measured of them, which is not what they are called."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kmtr.config import Sampling
from kmtr.data.loader.patterns import table
from kmtr.data.sources import Options, read
from kmtr.physics.coils import adaptive_sensitivities, combine, root_sum_of_squares
from kmtr.physics.fourier import ifft2c
from kmtr.physics.sampling import kt_density, measured_acs_lines, true_acceleration

SHARED = Path(os.environ.get("KMTR_SHARED", Path(__file__).parents[2].parent / "shared" / "data"))

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="real samples (KMTR_SHARED or ../shared/data) are missing")


@pytest.mark.parametrize(
    ("file", "frames", "lines", "each", "acs"),
    [
        ("vista_masks/mask_VISTA_156x25_acc4_demo.txt", 25, 156, 39, 0),
        ("vista_masks/vista_18_192_192_acc_8.mat", 18, 192, 24, 0),
        ("vista_masks/vista_18_192_192_acc_12.mat", 18, 192, 16, 0),
        ("cmrxrecon2024/cine_sax_mask_Uniform8.mat", 1, 246, 45, 16),
        ("cmrxrecon2025/mask_from_zeros_ktGaussian8.npy", 1, 162, 32, 20),
    ],
)
def test_true_r_and_acs_lines_are_measured(file: str, frames: int, lines: int, each: int, acs: int) -> None:
    pattern = table(Sampling(family="file", file=str(SHARED / file)))
    assert pattern is not None
    assert pattern.shape == (frames, lines)
    assert (pattern.sum(1) == each).all()
    assert float(true_acceleration(pattern)) == pytest.approx(lines / each, rel=1e-12)
    assert measured_acs_lines(pattern) == acs


def test_the_challenges_pattern_is_likely_under_our_density() -> None:
    """ktGaussian8 of 162 lines: 20 drawn, 12 of them beside the 20 ACS lines, as far out as `kt_density` has them."""
    pattern = np.load(SHARED / "cmrxrecon2025" / "mask_from_zeros_ktGaussian8.npy").any(1)
    beside = np.flatnonzero(np.concatenate([pattern[:71], np.zeros(20, bool), pattern[91:]])) - 81
    weight = kt_density(torch.tensor([162]), 162)[0].numpy()
    inside = weight[71:91].sum() / weight.sum()
    assert abs(20 - len(beside) - 20 * inside) < 3 * np.sqrt(20 * inside * (1 - inside))
    weight[71:91] = 0
    ky = np.abs(np.arange(162) - 81)
    mean = (weight * ky).sum() / weight.sum()
    spread = np.sqrt((weight * (ky - mean) ** 2).sum() / weight.sum() / len(beside))
    assert abs(np.abs(beside).mean() - mean) < 3 * spread


@pytest.mark.parametrize(("coils", "share", "alike"), [(1, 0.31, 0.89), (4, 0.77, 0.98), (8, 0.97, 0.999)])
def test_ten_real_coils_are_fewer_virtual_ones(coils: int, share: float, alike: float) -> None:
    path = SHARED / "cmrxrecon2025" / "underkslice_ktGaussian8.mat"
    whole, few = (read(path, Options(coils=n)).views["sax"] for n in (0, coils))
    assert whole.kspace.shape[1] == 10
    assert few.kspace.shape[1] == coils
    assert few.sampled is not None
    np.testing.assert_array_equal(few.sampled, whole.sampled)
    assert not few.kspace[..., ~few.sampled[0, 0], :].any()
    kept = np.square(np.abs(few.kspace)).sum() / np.square(np.abs(whole.kspace)).sum()
    assert share < kept <= 1
    images = [np.sqrt((np.abs(ifft2c(view.kspace[0, :, 0])) ** 2).sum(0)) for view in (whole, few)]
    assert np.corrcoef(images[0].ravel(), images[1].ravel())[0, 1] > alike


def test_the_adaptive_combination_of_real_coils_is_their_root_sum_of_squares() -> None:
    images = ifft2c(read(SHARED / "cmrxrecon2025" / "underkslice_ktGaussian8.mat").views["sax"].kspace[0])
    joined, reference = np.abs(combine(images, adaptive_sensitivities(images)[:, None])), root_sum_of_squares(images)
    assert np.corrcoef(joined.ravel(), reference.ravel())[0, 1] > 0.999
    assert np.square(joined).sum() > 0.99 * np.square(reference).sum()
