"""Frames of DICOM headers, and how they make stacks of slices; see `kmtr.data.sources.dicom`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmtr.data.sources.cine import WANTED
from kmtr.types import InputError

MIN_FRAMES = 8
"""Of a cine; mapping sequences and scouts have fewer images of one slice."""

PARALLEL = 0.999
"""Cosine between the axes of images of one stack."""

MOST_STACKS = 200
"""Of one subject: looking for the stack of a frame takes time in proportion."""

SAME_PLANE_MM = 0.5

ACROSS = 0.75
"""Least cosine between a short axis' normal and the usual axis of the heart; an axial stack has 0.58."""

_CHAMBERS = re.compile(r"(?<!\d)([234])[\s_-]?ch", re.IGNORECASE)
_SHORT = re.compile(r"sax|short|(?<![a-z])sa(?![a-z])", re.IGNORECASE)
_OTHER = re.compile(r"inlinevf|tagg|flow|molli|t[12]_?map|lge|psir|perf|lvot|rvot|ao_dist|scout|locali", re.IGNORECASE)
_DIGITS = re.compile(r"\d+(?![\s_-]?ch)", re.IGNORECASE)
_PHASE = {"P", "PHASE", "VELOCITY", "PHASE MAP"}


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of one slice, its pixels not decoded yet.

    Attributes:
        dataset: pydicom's, of the file that holds it; number: of the frame in it, from 0.
        axes: ``2 3``, directions of growing column and row in the patient (left, posterior, superior).
        position: of the first pixel, mm.
        spacing_mm: between rows, between columns; thickness_mm: between slices, or of one; NaN: unknown.
        shape: rows, columns.
        series: number and UID, in the order of scanning.
        times: trigger time in ms, temporal position, instance number; NaN where missing.
        slope, intercept: of the rescaling.
    """

    dataset: Any
    number: int
    axes: np.ndarray
    position: np.ndarray
    spacing_mm: tuple[float, float]
    thickness_mm: float
    shape: tuple[int, int]
    series: tuple[int, str]
    description: str
    times: tuple[float, float, float]
    slope: float
    intercept: float

    @property
    def normal(self) -> np.ndarray:
        return np.cross(*self.axes)

    @property
    def kind(self) -> str:
        """The description without the numbers of slices, which UK Biobank has in it."""
        return _DIGITS.sub("", self.description)


@dataclass(frozen=True)
class Stack:
    """Parallel slices of one kind from foot to head of their normal; the frames of each in any order."""

    slices: list[list[Frame]]

    @property
    def first(self) -> Frame:
        return self.slices[0][0]

    @property
    def newest(self) -> tuple[int, str]:
        return max(frame.series for frames in self.slices for frame in frames)


# ------------------------------------------------------------------------------------------------- header -> frames


def frames(dataset: Any, count: int) -> list[Frame]:
    """The usable frames of a file: in a plane of space, magnitude.

    Raises:
        ValueError: what isn't the number, or the direction, that it should be.
    """
    description = f"{dataset.get('SeriesDescription') or ''} {dataset.get('ProtocolName') or ''}".strip()
    series = int(dataset.get("SeriesNumber") or 0), str(dataset.get("SeriesInstanceUID") or "")
    shape = int(dataset.Rows), int(dataset.Columns)
    found = []
    for number in range(count):
        groups = _groups(dataset, number)
        orientation, position, spacing = (
            numbers(groups, name) for name in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing")
        )
        if (len(orientation), len(position), len(spacing)) != (6, 3, 2) or _is_phase(groups):
            continue
        axes = orientation.reshape(2, 3)
        if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-2) or not (spacing > 0).all():
            raise ValueError("orientation or pixel spacing")
        axes /= np.linalg.norm(axes, axis=1, keepdims=True)  # some write few digits
        times = (
            _one(groups, "TriggerTime", "NominalCardiacTriggerDelayTime"),
            _one(groups, "TemporalPositionIdentifier", "TemporalPositionIndex"),
            _one(groups, "InstanceNumber") + number,
        )
        thickness = _one(groups, "SpacingBetweenSlices", "SliceThickness")
        slope, intercept = _one(groups, "RescaleSlope", default=1.0), _one(groups, "RescaleIntercept", default=0.0)
        by_row, by_column = map(float, spacing)
        found.append(
            Frame(
                dataset, number, axes, position, (by_row, by_column), thickness, shape, series, description, times,
                slope, intercept,
            )
        )  # fmt: skip
    return found


def numbers(groups: Sequence[Any], *keywords: str) -> np.ndarray:
    """The numbers of the first of these attributes that is there, else none. Raises ValueError: not finite."""
    value = _value(groups, *keywords)
    found = np.atleast_1d(np.array([] if value is None else value, float))
    if not np.isfinite(found).all():
        raise ValueError(keywords[0])
    return found


def _one(groups: Sequence[Any], *keywords: str, default: float = np.nan) -> float:
    found = numbers(groups, *keywords)
    return float(found[0]) if len(found) else default


def _groups(dataset: Any, number: int) -> list[Any]:
    """Where to look for a frame's attribute: its own functional groups, those that all frames share, the file's."""
    found = []
    for name, n in (("PerFrameFunctionalGroupsSequence", number), ("SharedFunctionalGroupsSequence", 0)):
        items = dataset.get(name) or ()
        if n < len(items):
            found += [element.value[0] for element in items[n] if element.VR == "SQ" and len(element.value)]
    return [*found, dataset]


def _value(groups: Sequence[Any], *keywords: str) -> Any:
    """The first of these attributes that has a value; None: there is none."""
    values = (group.get(keyword) for keyword in keywords for group in groups)
    return next((value for value in values if value is not None and value != ""), None)


def _is_phase(groups: Sequence[Any]) -> bool:
    kind = _value(groups, "FrameType", "ImageType")
    words = {str(word).upper() for word in ([kind] if isinstance(kind, str) else kind or ())}
    return bool(words & _PHASE) or str(_value(groups, "ComplexImageComponent") or "").upper() in _PHASE


# -------------------------------------------------------------------------------------------------- frames -> stacks


def views(found: Sequence[Frame], where: str) -> dict[str, Stack]:
    """The stack of each view that there is: of the short axis that with the most slices, of long axes the last scan.

    Raises:
        InputError: more stacks than any scan has.
    """
    of: dict[str, list[Stack]] = defaultdict(list)
    for members in _parallel(found, where):
        stack = Stack(_slices(members))
        if max(map(len, stack.slices)) >= MIN_FRAMES and (view := view_of(stack.first)):
            of[view].append(stack)
    return {
        view: max(stacks, key=(lambda s: (len(s.slices), s.newest)) if view == "sax" else (lambda s: (0, s.newest)))
        for view, stacks in of.items()
    }


def view_of(frame: Frame) -> str | None:
    """What a stack shows, by its description or else its orientation; None: nothing that is wanted."""
    if _OTHER.search(frame.description):
        return None
    if chambers := _CHAMBERS.search(frame.description):
        return f"lax_{chambers[1]}ch"
    if _SHORT.search(frame.description):
        return "sax"
    return "sax" if abs(frame.normal * (-1, -1, 1) @ WANTED["sax"][0]) >= ACROSS else None


def by_time(plane: list[Frame], where: str) -> list[Frame]:
    """The frames of one slice in order of the first kind of time that tells them apart.

    Raises:
        InputError: some have no time, or the same.
    """
    for kind in range(3 if len(plane) > 1 else 0):
        times = np.array([frame.times[kind] for frame in plane])
        if np.isnan(times).all() or np.ptp(times) == 0:
            continue  # missing, or a place holder
        if np.isnan(times).any() or len(np.unique(times)) < len(plane):
            raise InputError(f"{where}: expected one image for each slice and time, got two or more at the same")
        return [plane[n] for n in np.argsort(times)]
    if len(plane) > 1:
        raise InputError(f"{where}: {len(plane)} images of one slice, without anything that tells their order")
    return plane


def check_alike(found: Sequence[Frame], where: str) -> None:
    """Refuse a series whose parallel images differ in size or pixel spacing: part of it would be dropped in silence."""
    first: dict[tuple[tuple[int, str], str], Frame] = {}
    for frame in found:
        other = first.setdefault((frame.series, frame.kind), frame)
        parallel = (other.axes * frame.axes).sum(1).min() > PARALLEL
        same = other.shape == frame.shape and np.allclose(other.spacing_mm, frame.spacing_mm, rtol=1e-3)
        if parallel and not same and view_of(frame):
            sizes = " and ".join(f"{f.shape} of {f.spacing_mm} mm" for f in (other, frame))
            raise InputError(f"{where}: expected images of one size and pixel spacing in a series, got {sizes}")


def _parallel(found: Sequence[Frame], where: str) -> list[list[Frame]]:
    """Frames by orientation, size and kind."""
    stacks: dict[tuple[Any, ...], list[list[Frame]]] = defaultdict(list)
    count = 0
    for frame in found:
        alike = stacks[frame.shape, tuple(np.round(frame.spacing_mm, 3)), frame.kind]
        for stack in alike:
            if (stack[0].axes * frame.axes).sum(1).min() > PARALLEL:
                stack.append(frame)
                break
        else:
            alike.append([frame])
            if (count := count + 1) > MOST_STACKS:
                raise InputError(
                    f"{where}: images of more than {MOST_STACKS} orientations, sizes and kinds: no cine study"
                )
    return [stack for alike in stacks.values() for stack in alike]


def _slices(members: Sequence[Frame]) -> list[list[Frame]]:
    """Frames of one stack by position along the normal; of a slice scanned again, the last complete scan."""
    depths = np.array([frame.position for frame in members]) @ members[0].normal
    order = np.argsort(depths, kind="stable")
    planes = np.split(order, 1 + np.flatnonzero(np.diff(depths[order]) > SAME_PLANE_MM))
    slices = []
    for plane in planes:
        scans: dict[tuple[int, str], list[Frame]] = defaultdict(list)
        for n in plane:
            scans[members[n].series].append(members[n])
        slices.append(scans[max(scans, key=lambda series: (len(scans[series]), series))])
    return slices
