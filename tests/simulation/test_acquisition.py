"""The simulated receiver: magnitude kept, maps that obey Maxwell, SNR as asked for, a pure function of its key."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kmtr.physics.coils import _loop_field, combine, phase_map, sensitivities
from kmtr.physics.fourier import crop_or_pad, fft2c, fftc, ifft2c, ifftc
from kmtr.simulation.acquisition import acquire
from kmtr.types import InputError

KEY = {"seed": 3, "subject": 5, "slice_index": 2}
SIZE = (20, 24)


def series(frames: int = 3, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(0).random((frames, *size), dtype=np.float32)


def rss(kspace: np.ndarray) -> np.ndarray:
    return np.sqrt((np.abs(ifft2c(kspace)) ** 2).sum(0))


@pytest.mark.parametrize(("coils", "oversampling"), [(1, 1.0), (1, 2.0), (2, 1.0), (5, 1.3), (20, 1.0), (32, 2.0)])
def test_without_noise_the_magnitude_is_kept(coils: int, oversampling: float) -> None:
    image = series()
    kspace = acquire(image, coils=coils, snr_db=math.inf, oversampling=oversampling, **KEY)
    assert kspace.dtype == np.complex64
    assert kspace.shape == (coils, 3, 20, {1.0: 24, 1.3: 32, 2.0: 48}[oversampling])
    seen = rss(kspace)
    np.testing.assert_allclose(crop_or_pad(seen, (24,), (-1,)), image, atol=2e-6)
    assert (np.abs(kspace) ** 2).sum() == pytest.approx((image**2).sum(), rel=1e-5)  # Parseval: nothing beside it


def test_one_coil_without_oversampling_is_the_image_times_its_phase() -> None:
    image = series()
    kspace = acquire(image, coils=1, snr_db=math.inf, oversampling=1.0, **KEY)
    expected = fft2c(image * np.exp(1j * phase_map(SIZE, **KEY)))
    np.testing.assert_allclose(kspace[0], expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("coils", "oversampling"), [(1, 1.0), (6, 1.0), (4, 2.0)])
def test_the_adjoint_is_the_sensitivity_weighted_image(coils: int, oversampling: float) -> None:
    rng = np.random.default_rng(2)
    image = (rng.standard_normal((3, *SIZE)) + 1j * rng.standard_normal((3, *SIZE))).astype(np.complex64)
    kspace = acquire(image, coils=coils, snr_db=math.inf, oversampling=oversampling, **KEY)
    other = rng.standard_normal(kspace.shape) + 1j * rng.standard_normal(kspace.shape)
    receiver = sensitivities(SIZE, coils, **KEY) * np.exp(1j * phase_map(SIZE, **KEY))
    back = combine(crop_or_pad(ifft2c(other), (24,), (-1,)), receiver[:, None])
    assert np.vdot(kspace, other) == pytest.approx(np.vdot(image, back), rel=1e-4)


def test_an_odd_matrix_keeps_its_centre() -> None:
    image = series(size=(15, 17))
    kspace = acquire(image, coils=2, snr_db=math.inf, oversampling=2.0, **KEY)
    np.testing.assert_allclose(crop_or_pad(rss(kspace), (17,), (-1,)), image, atol=2e-6)


def test_removing_the_oversampling_gives_the_scan_without() -> None:
    image = series()
    once, twice = (acquire(image, coils=4, snr_db=math.inf, oversampling=o, **KEY) for o in (1.0, 2.0))
    cropped = fftc(crop_or_pad(ifftc(twice, (-1,)), (24,), (-1,)), (-1,))
    np.testing.assert_allclose(cropped, once, atol=1e-5)


def test_a_complex_image_brings_its_own_phase() -> None:
    image = series() * np.exp(1j * np.linspace(0, 3, 24, dtype=np.float32)).astype(np.complex64)
    kspace = acquire(image, coils=3, snr_db=math.inf, oversampling=1.0, **KEY)
    plain = acquire(np.abs(image), coils=3, snr_db=math.inf, oversampling=1.0, **KEY)
    np.testing.assert_allclose(ifft2c(kspace) * np.abs(image), ifft2c(plain) * image, atol=1e-5)


@pytest.mark.parametrize(("coils", "oversampling"), [(1, 1.0), (4, 1.0), (4, 2.0)])
def test_the_combined_image_has_the_snr_asked_for(coils: int, oversampling: float) -> None:
    image = series(8, (32, 32))
    clean, noisy = (acquire(image, coils=coils, snr_db=s, oversampling=oversampling, **KEY) for s in (math.inf, 15.0))
    noise = noisy - clean
    variance = (np.abs(noise) ** 2).mean()
    assert 10 * math.log10((image**2).mean() / variance) == pytest.approx(15, abs=0.15)
    # Matched filter: sensitivities with a unit sum of squares keep the noise's variance.
    maps = sensitivities((32, 32), coils, **KEY)
    combined = (maps[:, None].conj() * crop_or_pad(ifft2c(noise), (32,), (-1,))).sum(0)
    assert (np.abs(combined) ** 2).mean() == pytest.approx(variance, rel=0.04)
    for axis in range(1, 4):  # white
        shifted = np.roll(noise, 1, axis)
        assert abs(np.vdot(noise, shifted)) / np.vdot(noise, noise).real < 5 / math.sqrt(noise.size)


def test_seed_subject_and_slice_decide_and_nothing_else() -> None:
    def scan(**change: int) -> bytes:
        return acquire(series(2), coils=4, snr_db=20.0, oversampling=1.0, **KEY | change).tobytes()

    different = {scan(), scan(seed=4), scan(subject=6), scan(slice_index=3)}
    assert len(different) == 4
    assert scan() in different


def test_loops_belong_to_the_subject_and_planes_to_the_slice() -> None:
    """The slices' maps differ, but as cuts through one field: far less than those of two subjects."""
    maps = {
        (subject, n): np.abs(sensitivities((32, 32), 8, seed=0, subject=subject, slice_index=n))
        for subject in range(12)
        for n in range(2)
    }
    within = np.mean([np.abs(maps[s, 0] - maps[s, 1]).mean() for s in range(12)])
    between = np.mean([np.abs(maps[s, 0] - maps[(s + 1) % 12, 0]).mean() for s in range(12)])
    assert 0 < within < 0.6 * between


@pytest.mark.parametrize("coils", [2, 3, 8, 9, 16, 17, 32])
def test_maps_are_smooth_and_differ_between_coils(coils: int) -> None:
    for n in range(3):
        maps = sensitivities((48, 48), coils, seed=0, subject=n, slice_index=n)
        np.testing.assert_allclose((np.abs(maps) ** 2).sum(0), 1, rtol=1e-5)
        for axis in (1, 2):
            assert np.abs(np.diff(maps, axis=axis)).max() < 0.12
        values = np.linalg.svd(maps.reshape(coils, -1), compute_uv=False)
        assert values[1] / values[0] > 0.1  # else one coil would do


def test_maps_are_the_same_function_of_position_at_every_size() -> None:
    coarse, fine = (sensitivities((n, n), 6, **KEY) for n in (32, 64))
    np.testing.assert_allclose(fine[:, ::2, ::2], coarse, atol=1e-6)


def test_a_loops_field_is_that_of_biot_and_savart() -> None:
    """Against the sum over short straight pieces, and the textbook's one on the axis."""
    rng = np.random.default_rng(1)
    normal, radius = np.array([0.6, 0.0, 0.8]), 0.7
    points = rng.normal(size=(50, 3)) * 2
    across = np.array([[0.8, 0.0, -0.6], [0.0, 1.0, 0.0]])
    angle = (np.arange(4000) + 0.5) * 2 * np.pi / 4000
    ring = radius * (np.cos(angle)[:, None] * across[0] + np.sin(angle)[:, None] * across[1])
    pieces = radius * (-np.sin(angle)[:, None] * across[0] + np.cos(angle)[:, None] * across[1]) * 2 * np.pi / 4000
    distance = points[:, None] - ring
    summed = (np.cross(pieces, distance) / np.linalg.norm(distance, axis=-1, keepdims=True) ** 3).sum(1)
    summed *= np.sign(np.cross(across[0], across[1]) @ normal)
    # In units of mu0 I / 4 pi, the closed form being in mu0 I / pi.
    np.testing.assert_allclose(4 * _loop_field(points, normal, radius), summed, atol=1e-6 * np.abs(summed).max())
    z = np.array([0.0, 0.5, 2.0])
    axis = _loop_field(z[:, None] * normal, normal, radius) @ normal
    np.testing.assert_allclose(axis, np.pi / 2 * radius**2 / (radius**2 + z**2) ** 1.5)


@pytest.mark.parametrize(
    ("image", "change", "message"),
    [
        (np.zeros((2, 8, 8)), {}, "image: expected float32 or complex64 t y x, got float64"),
        (np.zeros((8, 8), np.float32), {}, "image: expected"),
        (np.zeros((2, 8, 8), np.float32), {"coils": 0}, "coils: expected 1 to 32 of them, got 0"),
        (np.zeros((2, 8, 8), np.float32), {"coils": 33}, "coils: expected"),
        (np.zeros((2, 8, 8), np.float32), {"oversampling": 0.5}, "oversampling: expected"),
        (np.zeros((2, 8, 8), np.float32), {"oversampling": math.nan}, "oversampling: expected"),
        (np.zeros((2, 8, 8), np.float32), {"snr_db": math.nan}, "snr_db: expected"),
    ],
)
def test_what_cannot_be_acquired_is_refused_in_one_line(
    image: np.ndarray, change: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        acquire(image, **{"coils": 1, "snr_db": 30.0, "oversampling": 1.0, **KEY, **change})
    assert "\n" not in str(error.value)
