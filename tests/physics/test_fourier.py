"""The transform is unitary, its adjoint is its inverse, the centre is n // 2, and both libraries agree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kmtr.physics.fourier import crop_or_pad, fft2c, fftc, ifft2c, ifftc, magnitude_image

SIZES = [(8, 8), (7, 9), (8, 5), (1, 6)]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


def inner(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor) -> complex:
    return complex(np.vdot(np.asarray(a), np.asarray(b)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_unitary_and_adjoint(size: tuple[int, int], convert: Callable) -> None:
    x, y = convert(random(3, *size)), convert(random(3, *size, seed=1))
    assert inner(fft2c(x), y) == pytest.approx(inner(x, ifft2c(y)))
    assert inner(fft2c(x), fft2c(x)) == pytest.approx(inner(x, x))
    np.testing.assert_allclose(ifft2c(fft2c(x)), x, atol=1e-12)
    np.testing.assert_allclose(fft2c(ifft2c(x)), x, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_numpy_and_torch_agree_and_an_axis_is_one_of_two(size: tuple[int, int]) -> None:
    x = random(2, *size)
    np.testing.assert_allclose(fft2c(torch.from_numpy(x)), fft2c(x), atol=1e-12)
    np.testing.assert_allclose(ifft2c(torch.from_numpy(x)), ifft2c(x), atol=1e-12)
    np.testing.assert_allclose(fftc(fftc(x, (-1,)), (-2,)), fft2c(x), atol=1e-12)
    np.testing.assert_allclose(ifftc(torch.from_numpy(x), (-1,)), ifftc(x, (-1,)), atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_the_centre_is_n_over_2_in_both_domains(size: tuple[int, int]) -> None:
    ny, nx = size
    peak = np.zeros(size)
    peak[ny // 2, nx // 2] = np.sqrt(ny * nx)
    np.testing.assert_allclose(fft2c(np.ones(size)), peak, atol=1e-12)
    np.testing.assert_allclose(fft2c(peak), np.ones(size), atol=1e-12)  # no linear phase: the origin is n // 2
    np.testing.assert_allclose(ifft2c(peak), np.ones(size), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_precision_is_kept(dtype: torch.dtype) -> None:
    assert fft2c(torch.zeros(4, 4, dtype=dtype)).dtype == dtype
    assert fft2c(np.zeros((4, 4), np.complex64)).dtype == np.complex64


@pytest.mark.parametrize("have", [5, 6, 9, 10])
@pytest.mark.parametrize("want", [4, 5, 6, 7, 12])
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_cropping_keeps_the_centre_and_padding_adds_zeros(have: int, want: int, convert: Callable) -> None:
    x = convert(np.arange(have)[None] - have // 2)  # the value is the offset from the centre
    out = np.asarray(crop_or_pad(x, (want,), (-1,)))[0]
    offset = np.arange(want) - want // 2
    inside = (offset >= -(have // 2)) & (offset < have - have // 2)
    np.testing.assert_array_equal(out, np.where(inside, offset, 0))


def test_padding_keeps_energy_and_cropping_undoes_it() -> None:
    x = random(2, 7, 8)
    padded = crop_or_pad(x, (10, 13), (-2, -1))
    assert inner(padded, padded) == pytest.approx(inner(x, x))
    np.testing.assert_array_equal(crop_or_pad(padded, (7, 8), (-2, -1)), x)
    cropped = crop_or_pad(x, (4, 4), (-2, -1))
    assert inner(cropped, cropped).real < inner(x, x).real
    np.testing.assert_array_equal(crop_or_pad(x, (7, 8), (-2, -1)), x)


@pytest.mark.parametrize("size", SIZES)
def test_magnitude_is_the_root_sum_of_squares_over_coils(size: tuple[int, int]) -> None:
    kspace = random(2, 3, 4, 5, *size)  # batch slice coil t ky kx
    expected = np.sqrt((abs(ifft2c(kspace)) ** 2).sum(2))
    np.testing.assert_allclose(magnitude_image(torch.from_numpy(kspace)), expected, atol=1e-12)
