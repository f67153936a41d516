"""What measured k-space can look like is accepted; what is no k-space around its middle is told by its energy."""

from __future__ import annotations

import numpy as np
import pytest

from kmtr.physics.centre import displacement, problem, profile, reach, without_centre
from kmtr.physics.fourier import fft2c, ifft2c, ifftc
from kmtr.simulation import phantom


def heart(seed: int = 0, *, matrix: tuple[int, int] = (64, 72), coils: int = 4, snr_db: float = 20.0) -> np.ndarray:
    """``slice coil t ky kx`` of a simulated subject, as hard as they come."""
    study = phantom.simulate(
        seed,
        seed=1,
        views=("sax",),
        sax_slices=3,
        frames=3,
        matrix=matrix,
        snr_db=snr_db,
        difficulty="hard",
        coils=coils,
        oversampling=2.0 if coils > 1 else 1.0,
    )
    return study.views["sax"].kspace


@pytest.fixture(scope="module")
def kspace() -> np.ndarray:
    return heart()


@pytest.mark.parametrize("snr_db", [30.0, 5.0, -5.0, -15.0])
@pytest.mark.parametrize("coils", [1, 6])
@pytest.mark.parametrize("matrix", [(32, 32), (45, 51), (96, 128)])
def test_simulated_hearts_are_k_space(matrix: tuple[int, int], coils: int, snr_db: float) -> None:
    kspace = heart(3, matrix=matrix, coils=coils, snr_db=snr_db)
    assert problem(kspace) == ""
    assert problem(kspace[:1, :1, :1]) == ""


@pytest.mark.parametrize("share", [0.55, 0.625, 0.75, 0.875])
@pytest.mark.parametrize("end", ["first", "last"])
def test_partial_fourier_and_asymmetric_echoes_are_k_space(kspace, share: float, end: str) -> None:
    ny, nx = kspace.shape[-2:]
    for axis, n in ((-2, ny), (-1, nx)):
        gone = np.arange(n) < n - round(n * share)
        gone = gone if end == "first" else gone[::-1]
        cut = kspace * np.where(gone, 0, 1).reshape(-1, 1) if axis == -2 else kspace * np.where(gone, 0, 1)
        sampled = np.broadcast_to(~gone, (3, 3, ny)) if axis == -2 else None
        assert problem(cut.astype(np.complex64), sampled) == ""


def test_what_scanners_add_is_no_reason(kspace) -> None:
    """Slices without signal, coils of noise alone, loud or quiet ones, and spikes."""
    rng = np.random.default_rng(0)
    noise = (rng.normal(size=(3, 12, 3, *kspace.shape[-2:])) * np.abs(kspace).max() / 10).astype(np.complex64)
    loud = np.concatenate([kspace, noise * (1 + 1j)], 1)
    gains = kspace * np.array([1, 1e-4, 1e3, 30], np.float32)[:, None, None, None]
    dark = kspace * np.array([1, 1e-5, 1e-5], np.float32)[:, None, None, None, None]
    spikes = kspace.copy()
    spikes[:, :, 1, 5, 9] = 20 * np.abs(kspace).max()  # in all coils of a frame
    lone = spikes[1:2, 1:2, 1:2]  # all that there is
    for array in (loud, gains, dark, spikes, lone):
        assert problem(array) == ""


def test_tagged_hearts_are_k_space(kspace) -> None:
    """Their energy lies at plus and minus the frequency of the tags."""
    stripes = np.cos(2 * np.pi * np.arange(kspace.shape[-2]) / 8)[:, None]
    assert problem(fft2c(ifft2c(kspace) * stripes).astype(np.complex64)) == ""


@pytest.mark.parametrize("every", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("kind", ["uniform", "random"])
def test_undersampled_hearts_are_k_space(kspace, every: int, frames: int, kind: str) -> None:
    """Whether or not a frame has lines near the centre."""
    rng, ny = np.random.default_rng(every), kspace.shape[-2]
    for first in range(every if every < 8 else 8):
        sampled = np.zeros((3, frames, ny), bool)
        if kind == "uniform":
            sampled[..., first::every] = True
        else:
            sampled = rng.random((3, frames, ny)).argsort(-1) < ny // every
        assert problem(kspace[:, :, :frames] * sampled[:, None, ..., None], sampled) == ""


def test_noise_tells_nothing() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        shape = (*rng.integers(1, 4, 3), *rng.integers(2, 40, 2))
        assert problem((rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)) == ""


@pytest.mark.parametrize("axes", [(-2, -1), (-2,), (-1,)])
@pytest.mark.parametrize("frames", [1, 3])
def test_a_centre_in_the_corner_is_told(kspace, axes: tuple[int, ...], frames: int) -> None:
    said = problem(np.fft.ifftshift(kspace[:, :, :frames], axes))
    what = "line 32 of 64" if -2 in axes else "sample 72 of 144"
    assert f"around {what}" in said


@pytest.mark.parametrize(
    ("axes", "what"),
    [((-2, -1), "images"), ((-1,), "transformed along kx"), ((-2,), "transformed along ky")],
)
@pytest.mark.parametrize("coils", [1, 4])
def test_images_are_told(axes: tuple[int, ...], what: str, coils: int) -> None:
    assert f"got {what}" in problem(ifftc(heart(coils=coils), axes)).replace("data ", "")


def test_magnitudes_are_told(kspace) -> None:
    for part in (np.abs(kspace), kspace.real, np.abs(ifft2c(kspace)), 1j * kspace.imag):
        assert "without an imaginary part" in problem(part.astype(np.complex64))


@pytest.mark.parametrize("shift", [6, 8, -7])
def test_a_shift_is_told_with_its_place(kspace, shift: int) -> None:
    lines, samples = np.roll(kspace, shift, -2), np.roll(kspace, 3 * shift, -1)
    around = [int(problem(array).split("got it around ")[1].split(":")[0]) for array in (lines, samples)]
    assert abs(around[0] - (32 + shift)) <= 1
    assert abs(around[1] - (72 + 3 * shift)) <= 2


def test_displacement_of_a_known_profile() -> None:
    power = 0.01 + np.exp(-(((np.arange(100) - 37) / 2.0) ** 2))
    assert displacement(power, 37, complete=False) == 0
    assert displacement(power, 38, complete=False) == 0
    assert displacement(power, 42, complete=False) == -5  # just out of reach: 14 % of the energy is still within
    assert displacement(power, 50, complete=False) == -13
    assert displacement(power, 20, complete=True) == 17
    unknown = power.copy()
    unknown[45:56] = np.nan
    assert displacement(unknown, 50, complete=False) is None
    assert displacement(unknown, 50, complete=True) == -13
    assert displacement(np.ones(100), 50, complete=True) is None
    assert displacement(np.full(100, np.nan), 50, complete=True) is None


def test_profiles_count_coils_alike_and_frames_by_their_median() -> None:
    power = np.array([[[1.0, 3.0], [1.0, 3.0], [1.0, 99.0]], [[200.0, 200.0], [0.0, 200.0], [0.0, 200.0]]])
    np.testing.assert_allclose(profile(power, np.ones_like(power)), [(0.5 + 1) / 2, (1.5 + 1) / 2])
    assert np.isnan(profile(power, np.array([[1, 0]] * 3)[None])[1])


def test_frames_without_a_central_line_are_counted() -> None:
    sampled = np.zeros((2, 3, 64), bool)
    sampled[..., 0] = True
    sampled[0, 1, 32 + reach(64)] = sampled[1, 2, 32 - reach(64)] = True
    assert without_centre(sampled) == 4
