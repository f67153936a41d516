"""An image series as a scanner would have measured it: phase, coils, readout oversampling, Fourier transform, noise."""

from __future__ import annotations

import numpy as np
import scipy.fft

from kmtr.physics.coils import phase_map, sensitivities
from kmtr.physics.fourier import crop_or_pad
from kmtr.physics.noise import noise_level, white_noise
from kmtr.types import InputError


def acquire(
    image: np.ndarray,
    *,
    coils: int,
    snr_db: float,
    oversampling: float,
    seed: int,
    subject: int,
    slice_index: int,
    wraps: float = 1.0,
) -> np.ndarray:
    """Fully sampled k-space of one slice, complex64 ``coil t ky kx``, a pure function of its arguments.

    Phase (`coils.phase_map`), sensitivities (`coils.sensitivities`) and noise belong to (seed, subject, slice), the
    coils' arrangement to (seed, subject); all frames share phase and coils. The root-sum-of-squares image without
    noise is |image|.

    Args:
        image: float32 magnitudes or complex64 ``t y x``.
        coils: 1 (uniform) to `coils.MOST_COILS`.
        snr_db: mean power of the image over the noise's variance per pixel of one coil, in dB: also the SNR of the
            image that is optimally combined from all coils, whatever their number and the oversampling. Infinity adds
            no noise. It equals that of the k-space samples for one coil without oversampling.
        oversampling: field of view of the readout over the image's. The image sits in the middle of it with nothing
            beside: no anatomy is made up beyond the image's edges. 1: none. kx has ``nx * oversampling`` samples,
            rounded to an even number.
        wraps: see `coils.phase_map`.

    Raises:
        InputError: another kind of array, or a number out of range.
    """
    if image.ndim != 3 or image.dtype not in (np.float32, np.complex64):
        raise InputError(f"image: expected float32 or complex64 t y x, got {image.dtype} {image.shape}")
    if not 1 <= oversampling <= 4:
        raise InputError(f"oversampling: expected 1 to 4, got {oversampling}")
    frames, ny, nx = image.shape
    readout = nx if oversampling == 1 else 2 * round(nx * oversampling / 2)
    key = {"seed": seed, "subject": subject, "slice_index": slice_index}
    receiver = sensitivities((ny, nx), coils, **key) * np.exp(1j * phase_map((ny, nx), wraps=wraps, **key))
    sigma, noise = noise_level(image, snr_db), white_noise(**key)
    image, receiver = (np.fft.ifftshift(crop_or_pad(array, (readout,), (-1,)), (-2, -1)) for array in (image, receiver))
    kspace = np.empty((coils, frames, ny, readout), np.complex64)
    for coil, seen in enumerate(receiver):  # one after the other: memory stays near that of the result
        spectrum = scipy.fft.fft2(image * seen, norm="ortho", overwrite_x=True)
        kspace[coil] = np.fft.fftshift(spectrum, (-2, -1))
        if sigma:
            kspace[coil] += noise(sigma, kspace.shape[1:])
    return kspace
