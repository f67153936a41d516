"""Sunnybrook's contours: one text file of ``x y`` pixel coordinates per polygon, ``IM-0001-NNNN-icontour-manual.txt``.

NNNN is the instance number of the DICOM image, i the LV's inner and o its outer contour; papillary muscles (p) belong
to the cavity and are not read. A polygon covers the pixels (x, y) = (floor, floor) of its points, what the outline
between them crosses, and all that is inside: exactly the pixels of the contours that come as NIfTI. Counting only those
whose centre is inside loses half of the outline, 3 % of the cavity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from kmtr.data.sources import optional
from kmtr.data.sources.anatomy import LV_CAVITY, LV_MYOCARDIUM, check_inside
from kmtr.types import InputError

MOST_BYTES = 1 << 20
"""Size of one polygon's file at most; Sunnybrook's have a few kB."""

_FILE = re.compile(r"IM-\d+-(?P<number>\d+)-(?P<kind>[io])contour-manual\.txt", re.IGNORECASE)
_CLASS = {"o": LV_MYOCARDIUM, "i": LV_CAVITY}


def is_contour(path: Path) -> bool:
    """True if a file has a name of a contour."""
    return _FILE.fullmatch(path.name) is not None


def classes(
    paths: Iterable[Path], place: Mapping[int, tuple[int, int]], shape: tuple[int, int, int, int], where: str
) -> np.ndarray:
    """Contours as classes, uint8 ``slice t row column``.

    Args:
        paths: the contours' files.
        place: instance number -> (slice, frame).
        shape: of the result.

    Raises:
        InputError: contours of images that are not there, beyond the image, or no polygon at all; an inner contour that
            leaves the outer one.
    """
    out = np.zeros(shape, np.uint8)
    found = [
        (match["kind"].lower(), int(match["number"]), path) for path in paths if (match := _FILE.fullmatch(path.name))
    ]
    outer: dict[int, np.ndarray] = {}
    for kind, number, path in sorted(found, reverse=True):  # outer contours first, then the cavity over them
        if number not in place:
            raise InputError(
                f"{where}: contours of image {number}, which the short axis doesn't have: those of another patient?"
            )
        area = filled(_points(path, shape[2:], where), shape[2:])
        if kind == "o":
            outer[number] = area
        elif number in outer:
            check_inside(area, outer[number], where)
        out[place[number]][area] = _CLASS[kind]
    return out


def filled(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The pixels of a polygon, bool ``row column``; see the module.

    Args:
        points: ``point 2``, (x, y) in pixels.
    """
    image = optional("PIL.Image").new("L", shape[::-1])
    draw = optional("PIL.ImageDraw").Draw(image)
    draw.polygon([(x, y) for x, y in np.floor(points).astype(int).tolist()], fill=1, outline=1)
    return np.asarray(image) > 0


def _points(path: Path, shape: tuple[int, int], where: str) -> np.ndarray:
    with path.open("rb") as file:
        text = file.read(MOST_BYTES + 1)
    try:
        if len(text) > MOST_BYTES:
            raise ValueError
        points = np.array([line.split() for line in text.decode("ascii").splitlines() if line.strip()], float)
    except ValueError:  # also what isn't text, and lines of different lengths
        points = np.empty(0)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3 or not np.isfinite(points).all():
        raise InputError(f"{where}: expected a contour as three or more lines 'x y', got something else")
    if points.min() < 0 or (points.max(0) >= shape[::-1]).any():
        raise InputError(f"{where}: a contour leaves the image of {shape[0]} x {shape[1]} pixels: of another patient?")
    return points
