"""Counter-based random generators and the receiver's noise."""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np

from kmtr.types import InputError


class Purpose(IntEnum):
    """What a stream of random numbers is for: one more purpose never shifts the numbers of another."""

    ANATOMY = 0
    APPEARANCE = 1
    PLANE = 2
    PHASE = 3
    NOISE = 4


def generator(seed: int, subject: int, purpose: Purpose, slice_index: int = 0) -> np.random.Generator:
    """The generator of (seed, subject, purpose, slice): the same numbers on every machine, in any order of calls.

    Args:
        seed, subject: integers in [0, 2**64); a pseudonym is hashed to one by the caller.
        slice_index: integer in [0, 2**32).

    Raises:
        InputError: an integer out of range.
    """
    for name, value, bits in (("seed", seed, 64), ("subject", subject, 64), ("slice index", slice_index, 32)):
        if not 0 <= value < 2**bits:
            raise InputError(f"{name}: expected an integer in [0, 2**{bits}), got {value}")
    # A fixed number of 32-bit words: SeedSequence pads with zeros, so lists of varying length could collide.
    words = [seed & 0xFFFFFFFF, seed >> 32, subject & 0xFFFFFFFF, subject >> 32, int(purpose), slice_index]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def add_noise(kspace: np.ndarray, snr_db: float, *, seed: int, subject: int, slice_index: int) -> np.ndarray:
    """One slice's k-space with circular complex Gaussian noise; a pure function of its arguments.

    SNR is the mean power of the given samples over the noise's, ``10 log10(mean |k|^2 / E|n|^2)``. Noise is white in
    k-space, as a receiver's is, so it has the same variance per pixel after the orthonormal inverse FFT.

    Args:
        kspace: complex64, any axes (``coil t ky kx``), all of one slice.
        snr_db: dB; infinity adds nothing.

    Raises:
        InputError: `snr_db` is NaN or minus infinity, or `kspace` is not complex64.
    """
    if kspace.dtype != np.complex64:
        raise InputError(f"kspace: expected complex64, got {kspace.dtype}; convert it with astype")
    if math.isnan(snr_db) or snr_db == -math.inf:
        raise InputError(f"snr_db: expected a number of decibels or inf for no noise, got {snr_db}")
    if snr_db == math.inf:
        return kspace.copy()
    power = float(np.vdot(kspace, kspace).real) / kspace.size
    sigma = math.sqrt(power / 10 ** (snr_db / 10) / 2)  # of the real and of the imaginary part
    rng = generator(seed, subject, Purpose.NOISE, slice_index)
    noise = rng.standard_normal((*kspace.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    noise *= np.float32(sigma)
    noise += kspace
    return noise
