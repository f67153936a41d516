"""Centred orthonormal Fourier transform of images and k-space, for numpy arrays and torch tensors alike.

``k = fftshift(fft2(ifftshift(x)))`` with ``norm="ortho"`` over the last two axes (y, x): the centre of both domains is
index ``n // 2``, the transform is unitary, so its inverse is its adjoint and energy is kept (Parseval).

torch is imported for tensors alone: whoever simulates or writes a dataset starts without it, seconds sooner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", np.ndarray, "torch.Tensor")


def fftc(x: Array, axes: Sequence[int]) -> Array:
    """Image to k-space along `axes`; complex output of the same shape and precision."""
    if isinstance(x, np.ndarray):
        return np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(x, axes), axes=axes, norm="ortho"), axes)
    from torch import fft

    return fft.fftshift(fft.fftn(fft.ifftshift(x, axes), dim=axes, norm="ortho"), axes)


def ifftc(k: Array, axes: Sequence[int]) -> Array:
    """k-space to image along `axes`: inverse and adjoint of `fftc`."""
    if isinstance(k, np.ndarray):
        return np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(k, axes), axes=axes, norm="ortho"), axes)
    from torch import fft

    return fft.fftshift(fft.ifftn(fft.ifftshift(k, axes), dim=axes, norm="ortho"), axes)


def fft2c(x: Array) -> Array:
    """``... y x`` -> ``... ky kx``."""
    return fftc(x, (-2, -1))


def ifft2c(k: Array) -> Array:
    """``... ky kx`` -> ``... y x``."""
    return ifftc(k, (-2, -1))


def crop_or_pad(x: Array, size: Sequence[int], axes: Sequence[int]) -> Array:
    """Centred crop or zero padding of `axes` to `size`, keeping the centre at index ``n // 2``; never rescales."""
    for axis, want in zip(axes, size, strict=True):
        have = x.shape[axis]
        if have > want:
            start = have // 2 - want // 2
            index = [slice(None)] * x.ndim
            index[axis] = slice(start, start + want)
            x = x[tuple(index)]
        elif have < want:
            before = want // 2 - have // 2
            shape = list(x.shape)
            shape[axis] = want
            out = np.zeros(shape, x.dtype) if isinstance(x, np.ndarray) else x.new_zeros(shape)
            index = [slice(None)] * x.ndim
            index[axis] = slice(before, before + have)
            out[tuple(index)] = x
            x = out
    return x


def centred(size: torch.Tensor, length: int) -> torch.Tensor:
    """Places of `size` samples on an axis of `length` with the same centre ``n // 2``: bool ``... length``."""
    import torch

    offset = torch.arange(length, device=size.device) - length // 2
    return (offset >= -(size // 2)[..., None]) & (offset < (size - size // 2)[..., None])


def magnitude_image(kspace: torch.Tensor) -> torch.Tensor:
    """Root-sum-of-squares magnitude: complex ``... coil t ky kx`` -> real ``... t y x``.

    A shift of k-space only turns the image's phase, so the magnitude needs no shift before the transform.
    """
    import torch

    real, imaginary = torch.view_as_real(torch.fft.ifft2(kspace, norm="ortho")).square_().unbind(-1)
    return torch.fft.fftshift((real + imaginary).sum(-4).sqrt_(), (-2, -1))  # a sum over the axis of two is slow
