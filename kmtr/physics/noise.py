"""Random generators of what they are for, and the receiver's noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum

import numpy as np

from kmtr.types import InputError


class Purpose(IntEnum):
    """Purpose of a stream of random numbers: one more purpose never shifts the numbers of another."""

    ANATOMY = 0
    APPEARANCE = 1
    PLANE = 2
    PHASE = 3
    NOISE = 4
    COIL_ARRAY = 5
    SLICE_IN_ARRAY = 6


LEAST_OWN_NOISE = 1e-6
"""Share of a coil's noise power that no sum of the others may explain: below it is rounding, to be blown up."""


def generator(
    seed: int,
    subject: int,
    purpose: Purpose,
    slice_index: int = 0,
    bits: type[np.random.BitGenerator] = np.random.Philox,
) -> np.random.Generator:
    """The generator of (seed, subject, purpose, slice): the same numbers on every machine, in any order of calls.

    Args:
        seed, subject: integers in [0, 2**64); a pseudonym is hashed to one by the caller.
        slice_index: integer in [0, 2**32).
        bits: what makes them.

    Raises:
        InputError: an integer out of range.
    """
    for name, value, size in (("seed", seed, 64), ("subject", subject, 64), ("slice index", slice_index, 32)):
        if not 0 <= value < 2**size:
            raise InputError(f"{name}: expected an integer in [0, 2**{size}), got {value}")
    # A fixed number of 32-bit words: SeedSequence pads with zeros, so lists of varying length could collide.
    words = [seed & 0xFFFFFFFF, seed >> 32, subject & 0xFFFFFFFF, subject >> 32, int(purpose), slice_index]
    return np.random.Generator(bits(np.random.SeedSequence(words)))


def noise_level(signal: np.ndarray, snr_db: float) -> float:
    """Standard deviation of complex noise, E|n|^2 = sigma^2, at ``10 log10(mean |signal|^2 / sigma^2)`` dB.

    Raises:
        InputError: `snr_db` is NaN or minus infinity.
    """
    if math.isnan(snr_db) or snr_db == -math.inf:
        raise InputError(f"snr_db: expected a number of decibels or inf for no noise, got {snr_db}")
    return math.sqrt(float(np.vdot(signal, signal).real) / signal.size / 10 ** (snr_db / 10))


def white_noise(*, seed: int, subject: int, slice_index: int) -> Callable[[float, tuple[int, ...]], np.ndarray]:
    """A source of one slice's noise: (sigma, shape) -> circular complex Gaussian, complex64, E|n|^2 = sigma^2.

    A pure function of its arguments and of what was drawn before: noise of ``(2, n)`` is that of ``(n,)`` twice.
    """
    rng = generator(seed, subject, Purpose.NOISE, slice_index, np.random.SFC64)  # most of the cost of a simulation

    def draw(sigma: float, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal((*shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
        noise *= np.float32(sigma / math.sqrt(2))
        return noise

    return draw


def add_noise(kspace: np.ndarray, snr_db: float, *, seed: int, subject: int, slice_index: int) -> np.ndarray:
    """One slice's k-space with circular complex Gaussian noise; a pure function of its arguments.

    SNR is the mean power of the given samples over the noise's, see `noise_level`. Noise is white in k-space, as a
    receiver's is, so it has the same variance per pixel after the orthonormal inverse FFT.

    Args:
        kspace: complex64, any axes (``coil t ky kx``), all of one slice.
        snr_db: dB; infinity adds nothing.

    Raises:
        InputError: `snr_db` is NaN or minus infinity, or `kspace` is not complex64.
    """
    if kspace.dtype != np.complex64:
        raise InputError(f"kspace: expected complex64, got {kspace.dtype}; convert it with astype")
    if not (sigma := noise_level(kspace, snr_db)):
        return kspace.copy()
    noise = white_noise(seed=seed, subject=subject, slice_index=slice_index)(sigma, kspace.shape)
    noise += kspace
    return noise


def whitening(samples: np.ndarray) -> np.ndarray:
    """The matrix, complex64 ``coil coil``, that makes noise white: mixed by it, covariance is the identity.

    Inverse of the covariance's Cholesky factor, W C W^H = 1 (Pruessmann 2001), as in the tools of ISMRMRD and in
    Gadgetron. Lower triangular: coil n becomes a sum of coils up to n. Images are in units of SNR only if noise and
    signal were sampled with the same bandwidth; else they are off by one factor that all coils share.

    Args:
        samples: complex ``coil sample`` without signal, of mean zero.

    Raises:
        InputError: fewer samples than twice the coils, values that are not finite, or a coil that is silent or says
            what others say.
    """
    if samples.ndim != 2 or samples.shape[1] < 2 * samples.shape[0]:
        raise InputError(f"noise: expected coil sample, at least two samples per coil, got {samples.shape}")
    values = samples.astype(np.complex128)
    covariance = values @ values.conj().T / values.shape[1]
    level = np.sqrt(covariance.diagonal().real)
    if not np.isfinite(covariance).all() or not level.all():
        raise InputError("noise: expected finite noise in every coil, got a silent coil, or NaN or infinity")
    if np.linalg.eigvalsh(covariance / np.outer(level, level))[0] < LEAST_OWN_NOISE:
        raise InputError("noise: expected coils with noise of their own, got one that is a sum of others (doubled?)")
    return np.linalg.inv(np.linalg.cholesky(covariance)).astype(np.complex64)
