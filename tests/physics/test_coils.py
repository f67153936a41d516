"""Fewer coils: what stays is the most that can stay, adjoints are adjoints, and noise stays what it was."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kmtr.data.sources import with_coils
from kmtr.physics.coils import (
    adaptive_sensitivities,
    combine,
    combined,
    compress,
    mix,
    root_sum_of_squares,
    sensitivities,
)
from kmtr.physics.fourier import ifft2c
from kmtr.physics.noise import whitening
from kmtr.simulation.acquisition import acquire
from kmtr.types import InputError, Study, View


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def disc(size: int = 48, frames: int = 3) -> np.ndarray:
    """A bright disc of changing radius on a darker one that fills most of the image."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    beat = 0.15 + 0.05 * np.arange(frames)[:, None, None]
    return (0.3 * (np.hypot(x, y) < 0.45) + (np.hypot(x, y) < beat)).astype(np.float32)


def scan(coils: int, snr_db: float = math.inf, slices: int = 2) -> np.ndarray:
    """``slice coil t ky kx``"""
    return np.stack(
        [
            acquire(disc(), coils=coils, snr_db=snr_db, oversampling=1.0, seed=0, subject=0, slice_index=n)
            for n in range(slices)
        ]
    )


def inner(a: np.ndarray, b: np.ndarray) -> complex:
    return complex(np.vdot(a.astype(complex), b.astype(complex)))


def test_mixing_by_the_conjugate_transpose_is_the_adjoint() -> None:
    x, y = normal(2, 5, 2, 4, 6), normal(2, 3, 2, 4, 6, seed=1)
    for matrix in (normal(3, 5, seed=2), normal(2, 3, 5, seed=3)):
        assert inner(mix(x, matrix), y) == pytest.approx(inner(x, mix(y, matrix.conj().swapaxes(-1, -2))), rel=1e-5)


def test_combining_is_the_adjoint_of_multiplying_by_the_maps() -> None:
    maps, image, images = normal(4, 1, 6, 8), normal(3, 6, 8, seed=1), normal(4, 3, 6, 8, seed=2)
    assert inner(maps * image, images) == pytest.approx(inner(image, combine(images, maps)), rel=1e-5)


@pytest.mark.parametrize("coils", [1, 3, 5])
def test_virtual_coils_hold_the_most_energy_that_so_many_can(coils: int) -> None:
    kspace = normal(2, 6, 3, 8, 10) * np.linspace(1, 3, 6).reshape(6, 1, 1, 1)
    kspace[:, 1] += 2 * kspace[:, 0]
    virtual = compress(kspace.astype(np.complex64), None, coils)
    assert virtual.shape == (2, coils, 3, 8, 10)
    assert virtual.dtype == np.complex64
    for before, after in zip(kspace, virtual, strict=True):
        best = np.linalg.svd(before.reshape(6, -1), compute_uv=False)[:coils]
        np.testing.assert_allclose(
            np.linalg.svd(after.reshape(coils, -1), compute_uv=False), best, rtol=1e-4
        )  # Eckart and Young: the truncated SVD
        energies = (np.abs(after) ** 2).sum((1, 2, 3))
        assert (np.diff(energies) <= 1e-3 * energies[:-1]).all()


def test_few_virtual_coils_hold_most_of_a_large_array() -> None:
    kspace = scan(24, slices=1)
    whole = (np.abs(kspace) ** 2).sum()
    shares = [(np.abs(compress(kspace, None, coils)) ** 2).sum() / whole for coils in (1, 4, 8)]
    assert shares[0] < 0.9 < shares[1] < shares[2]
    assert shares[2] > 0.99


def test_compression_sees_acquired_lines_only() -> None:
    kspace = normal(2, 5, 3, 12, 8)
    sampled = np.random.default_rng(3).random((2, 3, 12)) < 0.4
    masked = kspace * sampled[:, None, :, :, None]
    spoiled = np.where(sampled[:, None, :, :, None], kspace, 1e6 * normal(2, 5, 3, 12, 8, seed=7))
    expected = compress(masked, sampled, 2)
    np.testing.assert_allclose(expected, compress(masked, None, 2), atol=1e-4)
    got = compress(spoiled.astype(np.complex64), sampled, 2) * sampled[:, None, :, :, None]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert not expected[~np.broadcast_to(sampled[:, None, :, :, None], expected.shape)].any()


def test_compression_has_one_answer() -> None:
    """Coils turned by any phase give the same energies; the same coils give the same numbers, whatever has no phase."""
    kspace = scan(6)
    once, again = compress(kspace, None, 3), compress(kspace.copy(), None, 3)
    np.testing.assert_array_equal(once, again)
    # All of the study turned by one phase turns the virtual coils by it: the weights stay.
    np.testing.assert_allclose(compress(kspace * np.complex64(1j), None, 3), 1j * once, atol=1e-4)
    assert compress(kspace, None, 6) is kspace
    assert compress(kspace, None, 9) is kspace


def test_white_noise_stays_white_in_virtual_coils() -> None:
    kspace, sampled = scan(8, slices=1), np.ones((1, 3, 48), bool)
    kspace[:, :, 2], sampled[:, 2] = normal(1, 8, 48, 48), False
    noise = compress(kspace, sampled, 3)[0, :, 2].reshape(3, -1)
    np.testing.assert_allclose(noise @ noise.conj().T / noise.shape[1], 2 * np.eye(3), atol=0.15)


def test_adaptive_sensitivities_are_those_of_the_coils() -> None:
    """Known up to a phase per pixel, which the reference coil's takes off."""
    images = ifft2c(scan(6, slices=1)[0])
    truth = sensitivities((48, 48), 6, seed=0, subject=0, slice_index=0)
    maps = adaptive_sensitivities(images)
    inside = disc()[0] > 0
    np.testing.assert_allclose((np.abs(maps) ** 2).sum(0), 1, rtol=1e-5)
    agreement = np.abs((maps.conj() * truth).sum(0))
    assert agreement[inside].min() > 0.99


@pytest.mark.parametrize("coils", [2, 8])
def test_the_combined_coil_keeps_the_image(coils: int) -> None:
    joined = combined(scan(coils))
    assert joined.shape == (2, 1, 3, 48, 48)
    np.testing.assert_allclose(np.abs(ifft2c(joined))[:, 0], np.stack([disc()] * 2), atol=0.02)


def test_combining_beats_the_root_sum_of_squares_in_noise() -> None:
    noisy = ifft2c(scan(16, 12.0, slices=1)[0])
    background = disc().max(0) == 0
    adaptive = np.abs(combine(noisy, adaptive_sensitivities(noisy)[:, None]))
    assert adaptive[:, background].mean() < 0.6 * root_sum_of_squares(noisy)[:, background].mean()


def test_where_there_is_nothing_maps_are_finite() -> None:
    maps = adaptive_sensitivities(np.zeros((3, 2, 8, 8), np.complex64))
    np.testing.assert_allclose((np.abs(maps) ** 2).sum(0), 1, rtol=1e-6)


def test_readers_combine_a_full_scan_and_compress_an_undersampled_one() -> None:
    kspace = scan(6)
    sampled = np.zeros((2, 3, 48), bool)
    sampled[..., ::3] = True
    study = Study("a", {"sax": View(kspace), "lax_4ch": View(kspace * sampled[:, None, ..., None], sampled)})
    one = with_coils(study, 1).views
    np.testing.assert_array_equal(one["sax"].kspace, combined(kspace))
    assert one["lax_4ch"].kspace.shape[1] == 1
    assert one["lax_4ch"].sampled is sampled
    assert not one["lax_4ch"].kspace[~np.broadcast_to(sampled[:, None, ..., None], one["lax_4ch"].kspace.shape)].any()
    two = with_coils(study, 2).views["sax"].kspace
    np.testing.assert_array_equal(two, compress(kspace, None, 2))
    assert with_coils(study, 8).views["sax"].kspace is kspace


# Prewhitening


def test_whitened_noise_is_white() -> None:
    colour = normal(5, 5, seed=4)
    noise = colour @ normal(5, 20_000)
    matrix = whitening(noise)
    white = matrix @ noise
    np.testing.assert_allclose(white @ white.conj().T / 20_000, np.eye(5), atol=1e-3)
    np.testing.assert_allclose(np.triu(matrix, 1), 0, atol=1e-6)
    # Of white noise it is the identity over its standard deviation.
    np.testing.assert_allclose(whitening(3 * normal(4, 100_000)), np.eye(4) / (3 * math.sqrt(2)), atol=0.005)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (normal(4, 7), "at least two samples per coil"),
        (normal(40), "coil sample"),
        (np.concatenate([normal(3, 50), np.zeros((1, 50), np.complex64)]), "silent coil"),
        (normal(3, 50) * np.nan, "NaN"),
        (np.concatenate([normal(3, 50), normal(3, 50)[:1]]), "a sum of others"),
    ],
)
def test_noise_that_whitens_nothing_is_refused(samples: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        whitening(samples)
    assert "\n" not in str(error.value)
