"""Metrics of reconstructed images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer
from scipy import ndimage

from kmtr.types import UNLABELLED, InputError

WINDOW = 7
"""Pixels along each side of SSIM's window."""

Box = tuple[slice, slice]
"""Rows and columns of an image."""


def nmse(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Energy of the error over energy of the reference."""
    return float(np.sum(np.abs(estimate - reference) ** 2) / np.sum(np.abs(reference) ** 2))


def psnr_db(estimate: Float[np.ndarray, "*any"], reference: Float[np.ndarray, "*any"], peak: float) -> float:
    """Peak signal-to-noise ratio, 10 log10(peak^2 / mean squared error over all pixels, slices and frames), in dB.

    Args:
        peak: the reference's maximum over the subject, never the estimate's.

    Returns:
        Infinity where both are equal.

    Raises:
        InputError: shapes differ.
    """
    _check_shapes(estimate, reference)
    error = float(np.mean((estimate.astype(np.float64) - reference) ** 2))
    return float(10 * np.log10(peak**2 / error)) if error > 0 else float("inf")


def ssim(estimate: Float[np.ndarray, "*any y x"], reference: Float[np.ndarray, "*any y x"], peak: float) -> float:
    """Structural similarity of each image, averaged over images: fastMRI's convention.

    Wang et al., IEEE Trans Image Process 13:600, 2004, with a uniform window of 7 x 7, K1 = .01, K2 = .03, variances
    over n - 1, the mean over windows that lie within the image, and as data range the maximum of the reference over the
    subject (Zbontar et al., arXiv 1811.08839), the same for all its images.

    Args:
        peak: that data range.

    Raises:
        InputError: shapes differ, or images smaller than the window.
    """
    _check_shapes(estimate, reference)
    if min(reference.shape[-2:]) < WINDOW:
        raise InputError(f"ssim: expected images of at least {WINDOW} x {WINDOW} pixels, got {reference.shape[-2:]}")
    x, y = estimate.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    variance_x = unbiased * (_window_mean(x * x) - mean_x**2)
    variance_y = unbiased * (_window_mean(y * y) - mean_y**2)
    covariance = unbiased * (_window_mean(x * y) - mean_x * mean_y)
    luminance, contrast = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similarity = (2 * mean_x * mean_y + luminance) * (2 * covariance + contrast)
    similarity /= (mean_x**2 + mean_y**2 + luminance) * (variance_x + variance_y + contrast)
    return float(similarity.mean())  # all images have as many windows


def _window_mean(images: Float[np.ndarray, "*any y x"]) -> Float[np.ndarray, "*any inner_y inner_x"]:
    """Mean over each window that lies within the image."""
    size = (*[1] * (images.ndim - 2), WINDOW, WINDOW)
    inner = slice(WINDOW // 2, -(WINDOW // 2))
    return ndimage.uniform_filter(images, size)[..., inner, inner]


def heart_box(segmentation: Integer[np.ndarray, "*any y x"], margin: int = 8) -> Box | None:
    """Smallest box around the heart in all slices and frames of a view, and a margin in pixels.

    Everything that is neither background nor UNLABELLED is the heart. The box ends at the image, and is never smaller
    than SSIM's window where the image isn't. None where no heart is drawn.
    """
    drawn = ((segmentation > 0) & (segmentation != UNLABELLED)).any(tuple(range(segmentation.ndim - 2)))
    if not drawn.any():
        return None
    rows, columns = (_widened(np.flatnonzero(drawn.any(axis)), margin, drawn.shape[1 - axis]) for axis in (1, 0))
    return rows, columns


def _widened(inside: Integer[np.ndarray, " index"], margin: int, size: int) -> slice:
    first = min(max(0, int(inside[0]) - margin), max(0, size - WINDOW))
    return slice(first, min(size, max(int(inside[-1]) + 1 + margin, first + WINDOW)))


@dataclass(frozen=True)
class ImageScores:
    """A reconstruction against its reference: PSNR in dB, SSIM in fastMRI's convention, NMSE."""

    psnr_db: float
    ssim: float
    nmse: float


def image_scores(
    estimate: Float[np.ndarray, "slice t y x"], reference: Float[np.ndarray, "slice t y x"], box: Box | None = None
) -> ImageScores:
    """Scores of one subject's magnitude images, without padded slices and frames, on one scale.

    Args:
        box: rows and columns to judge, from `heart_box`; None: the whole field of view. Peak and data range are those
            of the whole reference either way.

    Returns:
        NaN where the reference is nothing but zeros there, or where some of it is NaN: unknown.

    Raises:
        InputError: shapes differ, or images smaller than SSIM's window.
    """
    peak = float(reference.max(initial=0))
    inside = (..., *(box or (slice(None), slice(None))))
    seen, true = estimate[inside], reference[inside]
    if not true.any() or np.isnan(peak):
        return ImageScores(float("nan"), float("nan"), float("nan"))
    return ImageScores(psnr_db(seen, true, peak), ssim(seen, true, peak), nmse(seen, true))


def _check_shapes(estimate: np.ndarray, reference: np.ndarray) -> None:
    if estimate.shape != reference.shape:
        raise InputError(f"images: expected an estimate of the shape {reference.shape}, got {estimate.shape}")
