"""Parts that the readers of raw k-space share."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from kmtr.physics import centre
from kmtr.physics.fourier import crop_or_pad, fftc, ifftc
from kmtr.types import InputError, View

OUTSIDE = 0.4
"""Part of the image's energy beyond the field of view that oversampling leaves to it: more is no oversampling.

Measured with oversampling: 0.2 % and 13 % (CMRxRecon 2024, 2025); without: 46 and 51 % (Sunnybrook).
"""
STANDS_OUT = 5.0
"""Power of the brightest column over the darkest: less is noise."""


def check_finite(kspace: np.ndarray, where: str, what: str) -> None:
    """Raises InputError where raw data has NaN or infinity."""
    if not np.isfinite(kspace).all():
        raise InputError(f"{where}: {what}: expected finite k-space, got NaN or infinity")


def check_raw(kspace: np.ndarray, sampled: np.ndarray | None, where: str) -> None:
    """Refuse raw data ``slice coil t ky kx`` that cannot be one complete recording of k-space.

    Raises:
        InputError: a frame without any acquired line, two slices that agree in every sample (noise never does), or
            what no k-space around index ``n // 2`` is (`kmtr.physics.centre.problem`).
    """
    if sampled is not None and not (acquired := sampled.any(-1)).all():
        n, t = (int(index[0]) for index in np.nonzero(~acquired))
        raise InputError(f"{where}: expected every frame of every slice, got no line of slice {n}, frame {t}")
    seen: dict[int, int] = {}
    for n, values in enumerate(kspace):
        if (first := seen.setdefault(zlib.crc32(np.ascontiguousarray(values).data), n)) < n:
            raise InputError(f"{where}: slices {first} and {n} hold the same samples; is one a copy?")
    if found := centre.problem(kspace, sampled):
        raise InputError(f"{where}: {found}")


def columns(hybrid: np.ndarray) -> np.ndarray:
    """Power of each column of one coil's image, ``nx``, over its mean.

    Args:
        hybrid: ``t ky x``, transformed along the readout.
    """
    power = (hybrid.real**2 + hybrid.imag**2).sum((0, 1), dtype=float)
    return power / max(float(power.mean()), np.finfo(float).tiny)


def check_oversampling(power: np.ndarray, kept: int, where: str) -> None:
    """Refuse to remove an oversampling that is not there: the image fills the whole readout, not its inner part.

    Args:
        power: `columns` of the images, summed over coils and slices.
        kept: columns in the middle that would be left.

    Raises:
        InputError: the others hold a great part of what stands above the noise.
    """
    floor = float(np.quantile(power, 0.05))
    above = np.maximum(power - floor, 0)
    outside = 1 - crop_or_pad(above, (kept,), (0,)).sum() / max(float(above.sum()), np.finfo(float).tiny)
    if power.max() > STANDS_OUT * floor and outside > OUTSIDE:
        raise InputError(
            f"{where}: expected oversampled readouts, {len(power)} samples for {kept} pixels, got {outside:.0%} of the "
            "image beyond these: was it removed before? then set oversampling=keep (ingest.oversampling)"
        )


def notes_on_centres(views: Mapping[str, View]) -> list[str]:
    """A note per view of which frames have no line near the centre of k-space: they are read all the same."""
    notes = []
    for name, view in views.items():
        if view.sampled is not None and (count := centre.without_centre(view.sampled)):
            near = centre.reach(view.sampled.shape[-1])
            total = view.sampled[..., 0].size
            notes.append(f"{name}: {count} of {total} frames have no line within {near} of the centre of k-space")
    return notes


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
