"""Place of the energy of k-space: around the middle, if it is k-space and its middle is where it is said to be.

Three properties of measured k-space are used, none of which is a peak alone:

- Its energy decays from the centre on both sides of every axis (the image's autocorrelation is smooth). So a narrow
  central block of lines, or of samples, holds about as much of what stands above the noise as any other block.
- It is nearly conjugate symmetric, so what lies away from the middle has its mirror image on the other side (tagged
  images, whose energy lies at plus and minus the frequency of the tags).
- It is far more concentrated than the image: few samples hold the energy of an object that fills many pixels.

Energies are told over all coils, slices and frames: each coil of each slice counts alike, whatever its gain, so that
dark slices and coils of nothing but noise only make the profile flatter; of the frames the median counts, and of a line
all but its strongest sample, so that spikes do not matter. Where nothing stands out of the noise, nothing is said.

In real acquisitions the strongest line is not the central one: three lines beside it in 246, four samples in 512, both
fully sampled (CMRxRecon 2024). Hence the blocks' width.
"""

from __future__ import annotations

import numpy as np

from kmtr.physics.fourier import ifftc

BLOCK = 32
"""A block reaches a length's 32nd to both sides of its middle, at least two lines."""

TELLING = 3.0
"""Mean power of the strongest block over the others' median: below it is noise, which tells nothing.

White noise stays below, with two samples a line as well; the heart is above it down to an SNR of about 0 dB.
"""

FAINT = 0.5
"""Energy of the central block over that of the strongest one: below it, the centre is elsewhere."""

CONCENTRATED = 2.0
"""Factor by which the Fourier transform of an array must be more concentrated than it, for the array to be the image.

Of real k-space it is the other way round by a factor of at least 3.8, by 2.3 at an SNR of -10 dB.
"""

MOST_IMAGES = 32
"""Coils of slices whose concentration is looked at."""


def reach(length: int) -> int:
    """Lines, or samples, of the central block to either side of the middle ``length // 2``."""
    return max(2, length // BLOCK)


def problem(kspace: np.ndarray, sampled: np.ndarray | None = None) -> str:
    """Reason why an array is not k-space around ``n // 2``, as "expected ..., got ..."; empty: none.

    Args:
        kspace: complex ``slice coil t ky kx``, finite.
        sampled: bool ``slice t ky``, the acquired lines; None: all of them.
    """
    if not (kspace.imag.any() and kspace.real.any()):
        return "expected complex k-space, got values without an imaginary part (magnitudes?)"
    if sampled is None:
        sampled = np.ones((kspace.shape[0], *kspace.shape[2:4]), bool)
    if axes := transformed(kspace, sampled):
        return f"expected k-space, got {axes}: its Fourier transform is the more concentrated of the two"
    for what, power, complete in zip(("line", "sample"), _profiles(kspace, sampled), (False, True), strict=True):
        middle = len(power) // 2
        if off := displacement(power, middle, complete=complete):
            return (
                f"expected the energy of k-space around {what} {middle} of {len(power)}, got it around {middle + off}: "
                "its centre is elsewhere (not shifted? partial Fourier?), or it is no k-space"
            )
    return ""


def without_centre(sampled: np.ndarray) -> int:
    """Number of frames ``slice t ky`` that have no line of the central block."""
    middle, half = sampled.shape[-1] // 2, reach(sampled.shape[-1])
    return int((~sampled[..., max(middle - half, 0) : middle + half + 1].any(-1)).sum())


def profile(power: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Mean power at each line or sample, ``n``, over coils that count alike; NaN where nothing was acquired.

    Args:
        power: ``coil t n``: sums of squares. Coils of several slices are coils of their own, as are parts of a
            recording frames of their own.
        count: ``coil t n`` or broadcastable: how many samples each sum has.
    """
    known = (count > 0) & (power > 0)
    mean = np.ma.masked_array(np.divide(power, count, out=np.zeros(power.shape), where=known), mask=~known)
    frames = np.ma.median(mean, axis=1)
    alike = frames / np.ma.maximum(frames.mean(axis=1, keepdims=True), np.finfo(float).tiny)
    return np.ma.filled(alike.mean(axis=0).astype(float), np.nan)


def displacement(power: np.ndarray, middle: int, *, complete: bool) -> int | None:
    """Distance from `middle` to the energy of a `profile`: 0 around it, None where no block stands out of the noise.

    Args:
        power: ``n``, NaN where nothing was acquired.
        complete: along this axis something was acquired everywhere but at the ends, as along the readout. Else a middle
            of which less than half was acquired tells nothing either.
    """
    n = len(power)
    half = reach(n)
    known = np.isfinite(power)
    if not known.any():
        return None
    floor = np.quantile(power[known], 0.1)
    signal = np.where(known, np.maximum(power - floor, 0), 0)
    near = (np.arange(n)[:, None] + np.arange(-half, half + 1)) % n  # a block at the end goes on at the beginning
    blocks = signal[near].sum(1)
    best = int(blocks.argmax())
    others = known.copy()
    others[near[best]] = False
    inside = near[best][known[near[best]]]
    if others.any() and power[inside].mean() < TELLING * np.median(power[others]):
        return None
    middles = middle + np.arange(-half, half + 1)
    if not complete and known[middles[(middles >= 0) & (middles < n)]].sum() <= half:
        return None
    pairs = [(middle - d, middle + d) for d in range(n // 4 + 1) if middle - d >= 0 and middle + d < n]
    central = max((min(blocks[a], blocks[b]) for a, b in pairs), default=0.0)
    if central >= FAINT * blocks[best]:
        return 0
    within = float(signal[near[best]] @ np.arange(-half, half + 1)) / blocks[best]
    return best + round(within) - middle


def transformed(kspace: np.ndarray, sampled: np.ndarray) -> str:
    """Name of what an array ``slice coil t ky kx`` is where a Fourier transform concentrates it; else empty.

    Concentration is the participation ratio of the energy over ky and kx, a ratio of moments, which sees a few strong
    samples through much noise. Coils and slices count alike; of many, `MOST_IMAGES` are taken.
    """
    transforms = {"": (), "images": (-2, -1), "data transformed along kx": (-1,), "data transformed along ky": (-2,)}
    energies = dict.fromkeys(transforms, 0.0)
    pairs = [(n, coil) for n in range(kspace.shape[0]) for coil in range(kspace.shape[1])]
    for i in np.random.default_rng(0).permutation(len(pairs))[:MOST_IMAGES].tolist():
        n, coil = pairs[i]
        lines = np.maximum(sampled[n].sum(0), 1)[:, None]
        still = kspace[n, coil].sum(0, dtype=np.complex128) / lines  # frames together: as many lines as there are
        for what, axes in transforms.items():
            energy = np.abs(ifftc(still, axes) if axes else still) ** 2
            energies[what] = energies[what] + energy / max(float(energy.mean()), np.finfo(float).tiny)
    spread = {what: np.sum(energy) ** 2 / (np.size(energy) * np.sum(energy**2)) for what, energy in energies.items()}
    least = min(spread, key=lambda what: spread[what])
    return least if spread[least] < spread[""] / CONCENTRATED else ""


def _profiles(kspace: np.ndarray, sampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The `profile` of the lines, and of the samples."""
    slices, coils, frames, ny, nx = kspace.shape
    lines, samples = np.empty((slices, coils, frames, ny)), np.empty((slices, coils, frames, nx))
    for n, coil in np.ndindex(slices, coils):  # one after the other: temporary copies stay small
        values = kspace[n, coil]
        energy = values.real.astype(float) ** 2 + values.imag.astype(float) ** 2
        lines[n, coil], samples[n, coil] = (energy.sum(axis) - energy.max(axis) for axis in (-1, -2))
    acquired = np.broadcast_to(sampled[:, None], lines.shape)
    per_frame = np.broadcast_to(sampled.sum(-1)[:, None, :, None], samples.shape)
    return (
        profile(lines.reshape(-1, frames, ny), acquired.reshape(-1, frames, ny)),
        profile(samples.reshape(-1, frames, nx), per_frame.reshape(-1, frames, nx)),
    )
