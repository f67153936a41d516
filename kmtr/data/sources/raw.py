"""What the readers of raw k-space share."""

from __future__ import annotations

import zlib

import numpy as np

from kmtr.physics.fourier import crop_or_pad, fftc, ifftc
from kmtr.types import InputError


def check_finite(kspace: np.ndarray, where: str, what: str) -> None:
    """Raises InputError where raw data has NaN or infinity."""
    if not np.isfinite(kspace).all():
        raise InputError(f"{where}: {what}: expected finite k-space, got NaN or infinity")


def check_raw(kspace: np.ndarray, sampled: np.ndarray | None, where: str) -> None:
    """Refuse raw data ``slice coil t ky kx`` that cannot be one complete recording.

    Raises:
        InputError: a frame without any acquired line, or two slices that agree in every sample (noise never does).
    """
    if sampled is not None and not (acquired := sampled.any(-1)).all():
        n, t = (int(index[0]) for index in np.nonzero(~acquired))
        raise InputError(f"{where}: expected every frame of every slice, got no line of slice {n}, frame {t}")
    seen: dict[int, int] = {}
    for n, values in enumerate(kspace):
        if (first := seen.setdefault(zlib.crc32(np.ascontiguousarray(values).data), n)) < n:
            raise InputError(f"{where}: slices {first} and {n} hold the same samples; is one a copy?")


def crop_kspace(kspace: np.ndarray, matrix: tuple[int, int], where: str, *, undersampled: bool) -> np.ndarray:
    """Raw k-space ``... ky kx`` whose image is cropped or zero-padded about its centre to `matrix` (ny, nx).

    The readout is complete, so this is exact along kx. Along ky it needs all lines, as a crop mixes them.

    Raises:
        InputError: the source is undersampled and has another number of lines.
    """
    ny, nx = matrix
    if undersampled and kspace.shape[-2] != ny:
        raise InputError(
            f"{where}: expected matrix={kspace.shape[-2]},{nx}: the source is undersampled, so its "
            f"{kspace.shape[-2]} lines cannot become {ny}"
        )
    for axis, size in ((-1, nx), (-2, ny)):
        if kspace.shape[axis] != size:
            kspace = fftc(crop_or_pad(ifftc(kspace, (axis,)), (size,), (axis,)), (axis,))
    return np.ascontiguousarray(kspace)
