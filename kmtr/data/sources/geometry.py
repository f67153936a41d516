"""Dimensions and spacing of a NIfTI image, where the header's fields may disagree.

Dimensions. A file should hold (x, y, slice, t), but closest-canonical short axes have their slices in another
dimension, and some software writes slices first or frames before slices. The slices lie along the dimension whose
voxels are `THICK` times longer than the others, or else along the one that is `SHORT` times shorter. Where both are
there and differ, where only the second is there and is not the third, where slices would be more than pixels in a
line, or where frames differ far more than slices (`check_time`), the file is refused and ``ingest.axes`` settles it.
Dimensions of one after the fourth, and a fourth of one before a fifth, are dropped.

Spacing. Sizes stand in pixdim and in the affine's columns, and xyzt_units says in what. The first that could be a heart
is taken (`could_be`), and whatever was not as the header says it is told in a note; two that could be are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmtr.types import InputError

AXES = ("x", "y", "slice", "t")

Spacing = tuple[float, float, float]
"""Distance between voxels along x, y, slice in mm."""

THICK = 1.5
"""Voxels are at least this many times longer across slices than in plane, where spacing tells the slices."""
SHORT = 2.0
"""There are at least this many times fewer slices than pixels along x or y, where the shape tells them."""
RESTLESS = 3.0
"""Frames that differ by this many times more than slices do are slices, and the slices are frames."""
FRAMES = 6
"""Fewer frames than this may lie far apart, as end-diastole and end-systole do."""

PIXEL_MM = (0.3, 5.0)
SLICE_MM = (0.3, 30.0)
FIELD_MM = (150.0, 600.0)
"""Longer side of an image of the heart that nobody cropped."""
HEIGHT_MM = 40.0
"""Least extent of a stack of slices thinner than `THIN_MM`."""
THIN_MM = 2.0

SCALES = {"mm": 1.0, "meter": 1e3, "micron": 1e-3}
"""Unit of xyzt_units -> mm."""

AGREE = 0.01
"""Largest relative difference between sizes that say the same."""

VECTORS = (1003, 1004, 1005, 1006, 1007, 1009)
"""Intent codes of NIfTI for several numbers a voxel: matrices, displacements, vectors, quaternions."""


@dataclass(frozen=True)
class Geometry:
    """Order of the dimensions of an image, and its place in space.

    Attributes:
        order: stored dimension of x, y, slice, t, of the array without dropped dimensions.
        affine: 4x4, columns x, y, slice; the identity where nothing is known.
        spacing_mm: along x, y, slice; None: unknown.
        frame_step: size along t as pixdim has it, in the unit of time.
        notes: what was not as the header says.
    """

    order: tuple[int, int, int, int]
    affine: np.ndarray
    spacing_mm: Spacing | None
    frame_step: float
    notes: tuple[str, ...] = ()


def shape_4d(image: Any) -> tuple[int, ...]:
    """The shape without dimensions that hold nothing, see the module; of four dimensions if that is possible."""
    shape = tuple(image.shape)
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 5 and shape[3] == 1 and int(image.header["intent_code"]) not in VECTORS:
        shape = (*shape[:3], shape[4])
    return shape


def placed(image: Any, axes: str, where: str) -> Geometry:
    """The geometry of an image of three or four dimensions (`shape_4d`; one of three has one frame).

    Args:
        axes: names of the stored dimensions, such as ``"x y slice t"``; empty: told by spacing and shape.

    Raises:
        InputError: header fields that disagree, or dimensions that cannot be told.
    """
    shape = (*shape_4d(image), 1)[:4]
    zooms = _sizes(image.header, len(shape_4d(image)))
    known = not np.array_equal(image.affine, np.eye(4)) or _tells(zooms, shape)
    order = _named(axes, where) if axes else _told(shape[:3], zooms if known else None, where)
    if order[3] != 3:
        # The header was written for other axes: neither its sizes nor its directions are of these.
        return Geometry(order, np.eye(4), None, 0.0, ("spacing unknown: the header describes other axes",))
    x, y, z, _ = order
    affine = np.array(image.affine, float)
    affine[:, :3] = affine[:, [x, y, z]]
    spacing: Spacing | None = None
    notes = ["no geometry in the header: spacing unknown"]
    if known:
        spacing, notes = _spacing(image, (x, y, z), (shape[x], shape[y], shape[z]), where)
    if z != 2:
        notes.append(f"slices lie along dimension {z + 1} of the file")
    return Geometry(order, affine, spacing, zooms[3], tuple(notes))


def could_be(sizes: Sequence[float], counts: Sequence[int]) -> bool:
    """True if these are sizes of voxels of a cine, in mm: x, y, slice; a cropped image counts as well."""
    if not np.isfinite(sizes).all() or min(sizes) <= 0:
        return False
    in_plane = all(PIXEL_MM[0] <= size <= PIXEL_MM[1] for size in sizes[:2])
    deep = SLICE_MM[0] <= sizes[2] <= SLICE_MM[1]
    return in_plane and deep and (sizes[2] >= THIN_MM or sizes[2] * counts[2] >= HEIGHT_MM)


def unit_of_time(header: Any) -> str:
    """Unit of the frames' pixdim, by the header: sec, msec, usec, or unknown."""
    return _unit(header, 1)


def check_time(array: np.ndarray, where: str) -> None:
    """Refuse a cine whose frames differ far more from one to the next than its slices do.

    Args:
        array: ``x y slice t``.

    Raises:
        InputError: then slices and frames are exchanged.
    """
    if array.shape[2] < 2 or array.shape[3] < FRAMES:
        return
    between_slices, between_frames = (float(np.abs(np.diff(array, axis=axis)).mean()) for axis in (2, 3))
    if between_slices and between_frames > RESTLESS * between_slices:
        raise InputError(
            f"{where}: frames differ {between_frames / between_slices:.1f} times more than slices do: are they "
            "exchanged? Say what the stored dimensions are: ingest.axes='x y t slice', or 'x y slice t' if right"
        )


# --------------------------------------------------------------------------------------------------------- dimensions


def _named(axes: str, where: str) -> tuple[int, int, int, int]:
    names = axes.split()
    if sorted(names) != sorted(AXES):
        raise InputError(f"{where}: ingest.axes: expected the names {' '.join(AXES)} in the file's order, got {axes!r}")
    x, y, z, t = (names.index(name) for name in AXES)
    return x, y, z, t


def _told(counts: Sequence[int], zooms: Sequence[float] | None, where: str) -> tuple[int, int, int, int]:
    """Stored dimension of x, y, slice, t by the module's rules, for the first three; `zooms` None: unknown."""
    by_count = _apart([1 / n for n in counts], SHORT)
    by_size = None if zooms is None else _apart(zooms[:3], THICK)
    slices = 2 if by_size is None else by_size
    x, y = (n for n in range(3) if n != slices)
    if by_count is not None and by_size is not None and by_count != by_size:
        known = f"the thickest voxels lie along dimension {by_size + 1}, the fewest along {by_count + 1}"
    elif by_size is None and by_count not in (None, 2):
        known = (
            f"the fewest voxels lie along dimension {(by_count or 0) + 1}, and no spacing says that these are slices"
        )
    elif counts[slices] > (SHORT if by_size is not None else 1) * max(counts[x], counts[y]):
        known = f"along dimension {slices + 1} there are more than pixels in a line"
    else:
        return x, y, slices, 3
    raise InputError(
        f"{where}: cannot tell which dimension of {tuple(counts)} is the slices: {known}; say what the stored "
        "dimensions are: ingest.axes='slice y x t'"
    )


def _apart(values: Sequence[float], factor: float) -> int | None:
    """Index of the value that is the greatest by a factor; None: none is."""
    first, second = np.argsort(values)[::-1][:2]
    return int(first) if values[first] >= factor * values[second] else None


# ------------------------------------------------------------------------------------------------------------ spacing


def _sizes(header: Any, dimensions: int) -> tuple[float, ...]:
    """pixdim of the first three dimensions and of the frames."""
    zooms, shape = [float(zoom) for zoom in header.get_zooms()], header.get_data_shape()
    frames = 0.0 if dimensions < 4 else zooms[4] if len(shape) == 5 and shape[3] == 1 else zooms[3]
    return (*zooms[:3], frames)


def _tells(zooms: Sequence[float], shape: Sequence[int]) -> bool:
    """True if pixdim says more than an identity affine: sizes that are not all one."""
    return any(zoom != 1.0 for zoom in zooms[:3]) and could_be(zooms[:3], shape)


def _spacing(image: Any, order: Sequence[int], counts: Sequence[int], where: str) -> tuple[Spacing | None, list[str]]:
    """Spacing along x, y, slice in mm (None: unknown), and notes; see the module."""
    pixdim = [float(image.header.get_zooms()[n]) for n in order]
    columns = [float(length) for length in np.linalg.norm(np.asarray(image.affine, float)[:3, :3], axis=0)[list(order)]]
    unit = _unit(image.header)
    found = [_in_millimetres(sizes, unit, counts) for sizes in (pixdim, columns)]
    same = np.allclose(pixdim, columns, rtol=AGREE)
    possible = [one for one in found if one is not None]
    if not same and len(possible) == 2:
        full = [one for one in possible if _is_whole(one[0], counts)]
        if len(full) != 1:
            raise InputError(
                f"{where}: pixdim says {_shown(pixdim)}, the affine {_shown(columns)}, and both could be: correct one "
                "of them (nibabel: header.set_zooms or set_sform)"
            )
        possible = full
    if not possible:
        return None, [f"spacing unknown: {_shown(columns)} {unit} is no voxel of a heart"]
    sizes, scale = possible[0]
    notes = []
    if not same:
        source = "the affine" if np.allclose(sizes, np.multiply(columns, scale)) else "pixdim"
        notes.append(f"pixdim says {_shown(pixdim)}, the affine {_shown(columns)}: {source} is taken")
    if scale != SCALES.get(unit, 1.0):
        notes.append(f"sizes {_shown(pixdim)} are called {unit}: taken as {_shown(sizes)} mm")
    x, y, z = sizes
    return (x, y, z), notes


def _in_millimetres(sizes: Sequence[float], unit: str, counts: Sequence[int]) -> tuple[list[float], float] | None:
    """Sizes in mm and the factor that makes them so: the unit's, or another's where only that could be; None: none."""
    for scale in (SCALES.get(unit, 1.0), *SCALES.values()):
        scaled = [size * scale for size in sizes]
        if could_be(scaled, counts):
            return scaled, scale
    return None


def _is_whole(sizes: Sequence[float], counts: Sequence[int]) -> bool:
    """True if an image's longer side is that of one that nobody cropped."""
    longer = max(size * count for size, count in zip(sizes[:2], counts[:2], strict=True))
    return FIELD_MM[0] <= longer <= FIELD_MM[1]


def _unit(header: Any, kind: int = 0) -> str:
    """Unit of space (0) or time (1); a code that the standard does not have counts as unknown."""
    try:
        return str(header.get_xyzt_units()[kind])
    except KeyError:
        return "unknown"


def _shown(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)
