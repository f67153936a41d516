"""PSNR, SSIM and NMSE: closed forms, conventions, the heart's box."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmtr.metrics import heart_box, image_scores, nmse, psnr_db, ssim
from kmtr.types import UNLABELLED, InputError


def draw(seed: int, shape: tuple[int, ...] = (2, 3, 20, 24)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = np.cumsum(rng.random(shape), -1)  # smooth along x
    return np.abs(reference + rng.standard_normal(shape)).astype(np.float32), reference.astype(np.float32)


def by_windows(x: np.ndarray, y: np.ndarray, peak: float) -> float:
    """SSIM by its definition, window for window."""
    values = []
    for top in range(x.shape[0] - 6):
        for left in range(x.shape[1] - 6):
            a, b = (image[top : top + 7, left : left + 7].astype(np.float64).ravel() for image in (x, y))
            (va, cov), (_, vb) = np.cov(a, b)
            c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
            light = (2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1)
            values.append(light * (2 * cov + c2) / (va + vb + c2))
    return float(np.mean(values))


@given(st.integers(0, 2**31))
def test_ssim_is_its_definition_averaged_over_slices_and_frames(seed: int) -> None:
    estimate, reference = draw(seed, (2, 2, 9, 11))
    peak = float(reference.max())
    expected = [
        by_windows(a, b, peak) for a, b in zip(estimate.reshape(-1, 9, 11), reference.reshape(-1, 9, 11), strict=True)
    ]
    assert ssim(estimate, reference, peak) == pytest.approx(np.mean(expected), abs=1e-9)


def test_scores_are_those_of_scikit_image() -> None:
    theirs = pytest.importorskip(
        "skimage.metrics", reason="scikit-image is no dependency; closed forms are tested above"
    )
    estimate, reference = draw(0, (2, 3, 40, 48))
    peak = float(reference.max())
    assert psnr_db(estimate, reference, peak) == pytest.approx(
        theirs.peak_signal_noise_ratio(reference, estimate, data_range=peak), rel=1e-5
    )
    expected = [
        theirs.structural_similarity(b, a, data_range=peak)
        for a, b in zip(estimate.reshape(-1, 40, 48), reference.reshape(-1, 40, 48), strict=True)
    ]
    assert ssim(estimate, reference, peak) == pytest.approx(np.mean(expected), abs=1e-5)


def test_closed_forms() -> None:
    reference = np.full((1, 2, 10, 10), 2.0)
    estimate = reference + 0.2
    scores = image_scores(estimate, reference)
    assert scores.psnr_db == pytest.approx(20)  # 20 log10(2 / 0.2)
    assert scores.nmse == pytest.approx(0.01)
    light = (2 * 2.2 * 2 + 0.02**2) / (2.2**2 + 2**2 + 0.02**2)
    assert scores.ssim == pytest.approx(light)  # nothing varies: contrast and structure are 1
    same = image_scores(reference, reference)
    assert (same.psnr_db, same.ssim, same.nmse) == (math.inf, pytest.approx(1), 0)


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_a_common_scale_changes_nothing(seed: int, scale: float) -> None:
    estimate, reference = (image.astype(np.float64) for image in draw(seed))
    one, other = image_scores(estimate, reference), image_scores(scale * estimate, scale * reference)
    assert (other.psnr_db, other.ssim, other.nmse) == pytest.approx((one.psnr_db, one.ssim, one.nmse))


def test_the_data_range_is_the_references_and_one_for_all_images() -> None:
    estimate, reference = draw(1)
    reference[0, 0] *= 5  # one bright image sets the range of all
    scores = image_scores(estimate, reference)
    assert scores.ssim == ssim(estimate, reference, float(reference.max()))
    spike = estimate.copy()
    spike[1, 1, 10, 10] = 1e4  # an estimate's own peak must not help it
    assert image_scores(spike, reference).psnr_db < scores.psnr_db


def test_the_box_is_judged_alone_with_the_whole_references_peak() -> None:
    estimate, reference = draw(2)
    box = (slice(4, 14), slice(6, 18))
    inside = (..., *box)
    outside_changed = estimate * 3
    outside_changed[inside] = estimate[inside]
    scores = image_scores(estimate, reference, box)
    assert image_scores(outside_changed, reference, box) == scores
    assert scores.psnr_db == pytest.approx(psnr_db(estimate[inside], reference[inside], float(reference.max())))
    assert scores.nmse == pytest.approx(nmse(estimate[inside], reference[inside]))


def test_the_hearts_box_has_a_margin_and_ends_at_the_image() -> None:
    mask = np.zeros((2, 3, 40, 50), np.uint8)
    mask[0, 1, 12:20, 30] = 1
    mask[1, 2, 18, 25:48] = 4
    mask[0, 0, :3] = UNLABELLED
    assert heart_box(mask, margin=0) == (slice(12, 20), slice(25, 48))
    assert heart_box(mask, margin=5) == (slice(7, 25), slice(20, 50))
    assert heart_box(np.where(mask == UNLABELLED, mask, 0)) is None


@given(st.integers(0, 19), st.integers(0, 19), st.integers(0, 10), st.integers(7, 20))
def test_a_box_fits_ssims_window_wherever_the_heart_is(y: int, x: int, margin: int, size: int) -> None:
    mask = np.zeros((1, 1, size, size), np.uint8)
    y, x = min(y, size - 1), min(x, size - 1)
    mask[0, 0, y, x] = 2
    box = heart_box(mask, margin)
    assert box is not None
    for side, place in zip(box, (y, x), strict=True):
        assert 0 <= side.start <= max(0, place - margin)
        assert min(size, place + 1 + margin) <= side.stop <= size
        assert side.stop - side.start >= 7


def test_nothing_but_zeros_has_no_score() -> None:
    zero = np.zeros((1, 1, 8, 8))
    scores = image_scores(zero + 1, zero)
    assert all(map(math.isnan, (scores.psnr_db, scores.ssim, scores.nmse)))


def test_bad_input_is_refused_in_one_line() -> None:
    small = np.ones((1, 1, 6, 9))
    with pytest.raises(InputError, match=r"expected images of at least 7 x 7 pixels, got \(6, 9\)"):
        ssim(small, small, 1.0)
    with pytest.raises(InputError, match=r"expected an estimate of the shape \(1, 1, 6, 9\), got \(1, 1, 6, 1\)"):
        inspect.unwrap(psnr_db)(small[..., :1], small, 1.0)  # without the test suite's type checks
