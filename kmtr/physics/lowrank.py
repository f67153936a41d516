"""Low-rank + sparse reconstruction of a cine from undersampled k-space (Otazo, Candes and Sodickson, MRM 2015), with
momentum (Lin and Fessler, IEEE Trans Comput Imaging 5:17, 2019).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Complex
from torch import Tensor

Hybrid = Complex[Tensor, "batch slice coil t ky x"]
Series = Complex[Tensor, "batch slice t y x"]

ITERATIONS = 20
RANK_THRESHOLD = 0.1
"""Singular values are shrunk by this part of the largest one of the start, of each slice."""
SPARSE_THRESHOLD = 0.15
"""Temporal frequencies are shrunk by this part of the largest one of the start that is not the mean over time."""


def low_rank_sparse(
    kspace: Complex[Tensor, "batch slice coil t ky kx"],
    sampled: Bool[Tensor, "batch slice t ky"],
    guess: Complex[Tensor, "batch slice coil t ky kx"],
    iterations: int = ITERATIONS,
    rank_threshold: float = RANK_THRESHOLD,
    sparse_threshold: float = SPARSE_THRESHOLD,
) -> Complex[Tensor, "batch slice coil t ky kx"]:
    """k-space of all coils whose image is a background of low rank over time plus a part of few temporal frequencies.

    Each slice by itself: L = shrunk singular values of M - S, S = shrunk temporal frequencies of M - L, and M = L + S
    with a gradient step of length 1 towards the acquired lines (the paper's algorithm, but that S follows from the new
    L), and Nesterov's momentum: 20 steps with it are as good as 60 without. The sensitivities have a sum of squares of
    1, so that the step converges. Acquired lines are put back at the end.

    Args:
        kspace: as acquired; what is not `sampled` is not looked at.
        guess: k-space of every line that is begun from, and whose mean over time gives the sensitivities; made of
            acquired lines too (`inputs.view_shared`).
    """
    # Of a centred transform only the shift of ky matters: the steps below do not know where in an image a pixel lies.
    mask = torch.fft.ifftshift(sampled, -1)[:, :, None, :, :, None]
    acquired = torch.where(mask, torch.fft.ifftshift(_hybrid(kspace), -2), 0)
    begun = _image(torch.fft.ifftshift(_hybrid(guess), -2))
    maps = _sensitivities(begun)
    m = _combined(begun, maps)
    shrink_rank = rank_threshold * _singular(m)[0].amax(-1)
    shrink_sparse = sparse_threshold * _frequencies(m)[:, :, 1:].abs().amax((2, 3, 4))
    sparse, before, momentum = torch.zeros_like(m), m, 1.0
    for _ in range(iterations):
        low = _shrink_rank(m - sparse, shrink_rank)
        sparse = _shrink_frequencies(m - low, shrink_sparse)
        both = low + sparse
        wrong = torch.where(mask, _kspace(both[:, :, None] * maps) - acquired, 0)
        after, ahead = both - _combined(_image(wrong), maps), (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        m = after + (momentum - 1) / ahead * (after - before)
        before, momentum = after, ahead
    found = _back(torch.fft.fftshift(_kspace(before[:, :, None] * maps), -2))
    return torch.where(sampled[:, :, None, :, :, None], kspace, found)


def _hybrid(kspace: Tensor) -> Hybrid:
    """``ky kx`` -> ``ky x``: no line is acquired in part, so that kx plays no role."""
    return torch.fft.ifft(torch.fft.ifftshift(kspace, -1), norm="ortho")


def _back(hybrid: Hybrid) -> Tensor:
    return torch.fft.fftshift(torch.fft.fft(hybrid, norm="ortho"), -1)


def _image(hybrid: Hybrid) -> Tensor:
    return torch.fft.ifft(hybrid, dim=-2, norm="ortho")


def _kspace(images: Tensor) -> Hybrid:
    return torch.fft.fft(images, dim=-2, norm="ortho")


def _sensitivities(images: Tensor) -> Tensor:
    """Coil sensitivities from the mean over time, ``batch slice coil 1 y x``: sum of squares 1, or 0 of nothing."""
    mean = images.mean(3, keepdim=True)
    total = mean.abs().square().sum(2, keepdim=True).sqrt()
    return mean / total.clamp(min=torch.finfo(total.dtype).tiny)


def _combined(images: Tensor, maps: Tensor) -> Series:
    """Adjoint of what the coils see."""
    return (images * maps.conj()).sum(2)


def _singular(m: Series) -> tuple[Tensor, Tensor]:
    """Singular values ``batch slice t`` of each slice's pixels x frames, and right vectors in columns."""
    columns = m.flatten(3)
    squares, vectors = torch.linalg.eigh(columns.conj() @ columns.mT)
    return squares.clamp(min=0).sqrt(), vectors


def _shrink_rank(m: Series, by: Tensor) -> Series:
    values, vectors = _singular(m)
    kept = (1 - by[..., None] / values.clamp(min=torch.finfo(values.dtype).tiny)).clamp(min=0)
    mix = vectors * kept[..., None, :] @ vectors.mH
    return (mix.mT @ m.flatten(3)).unflatten(3, m.shape[3:])


def _frequencies(m: Series) -> Tensor:
    return _over_time(m, _fourier(m))


def _shrink_frequencies(m: Series, by: Tensor) -> Series:
    fourier = _fourier(m)
    found = _over_time(m, fourier)
    squares = found.real.square() + found.imag.square()  # `abs` takes five times as long
    kept = (1 - by[..., None, None, None] * squares.clamp(min=torch.finfo(squares.dtype).tiny).rsqrt()).clamp(min=0)
    return _over_time(found * kept, fourier.mH)


def _fourier(m: Series) -> Tensor:
    """Matrix of the unitary Fourier transform over frames: of so few, a product with it takes a fifth of an FFT."""
    return torch.fft.fft(torch.eye(m.shape[2], dtype=m.dtype, device=m.device), norm="ortho")


def _over_time(m: Series, matrix: Tensor) -> Series:
    return (matrix @ m.flatten(3)).unflatten(3, m.shape[3:])
