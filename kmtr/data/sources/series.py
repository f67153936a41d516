"""Frames of DICOM headers, and how they make stacks of slices; see `kmtr.data.sources.dicom`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmtr.data.sources.cine import WANTED
from kmtr.types import InputError

MIN_FRAMES = 8
"""Least frames of a cine; mapping sequences and scouts have fewer images of one slice."""

PARALLEL = 0.999
"""Cosine between the axes of images of one stack."""

MOST_STACKS = 200
"""Stacks of one subject at most: looking for the stack of a frame takes time in proportion."""

SAME_PLANE_MM = 0.5

APART_MM = 25.0
"""Slices of one short axis are nearer than that."""

ACROSS = 0.75
"""Least cosine between a short axis' normal and the usual axis of the heart; an axial stack has 0.58."""

ALONG = 0.2
"""Largest cosine between a long axis' normal and the heart's usual axis, whatever the series is called."""

IRREGULAR = 0.1
"""Largest difference among the distances between slices, as a share of the median."""

DYNAMIC_S = (0.2, 15.0)
"""Time between images of one slice that are heartbeats, not frames of one: perfusion, mapping. Beyond: another unit."""

VARIES = 0.05
"""Share by which echo time, inversion time and flip angle may differ among the frames of a cine."""

_TEMPORAL = (0x00209128, 0x00209153, 0x00181060, 0x00209241, 0x0020930D, 0x00200100)
"""Attributes that an index of time points to: position, trigger delay and time, percentage of the cycle, offset."""

_CHAMBERS = re.compile(r"(?<!\d)([234])[\s_-]?ch", re.IGNORECASE)
_SHORT = re.compile(r"sax|short|(?<![a-z])sa(?![a-z])", re.IGNORECASE)
_OTHER = re.compile(
    r"inlinevf|tagg|(?<![a-z])tag(?![a-z])|spamm|(?<![a-z])grid|flow|venc(?![a-z])|phase[\s_-]?contrast|molli|sasha|"
    r"t[12]\*?[\s_-]?(map|star)|ecv[\s_-]?map|lge|psir|perf|first[\s_-]?pass|lvot|rvot|ao_dist|scout|locali|"
    r"_v\d+(in|through|thr)",
    re.IGNORECASE,
)
"""In description, protocol, sequence, type and contrast of an image: no plain cine."""

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
        times: trigger time in ms, temporal position, instance number (of a file with one frame); NaN where missing.
        slope, intercept: of the rescaling.
        clock_s: when it was acquired, s since midnight; NaN: unknown.
        contrast: echo time, inversion time, flip angle; NaN: unknown.
        index: of an Enhanced frame, by which its dimensions are told; empty: none.
        temporal: which of `index` is the time; None: nothing says so.
        words: what the header calls this kind of image.
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
    clock_s: float = np.nan
    contrast: tuple[float, ...] = ()
    index: tuple[int, ...] = ()
    temporal: int | None = None
    words: str = ""

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
    def images(self) -> int:
        return sum(map(len, self.slices))

    @property
    def newest(self) -> tuple[int, str]:
        return max(frame.series for frames in self.slices for frame in frames)


# ------------------------------------------------------------------------------------------------- header -> frames


def frames(dataset: Any, count: int) -> tuple[list[Frame], Counter[str]]:
    """The usable frames of a file: in a plane of space, magnitude; and why others are not, with their number.

    Raises:
        ValueError: what isn't the number, or the direction, that it should be.
    """
    description = f"{dataset.get('SeriesDescription') or ''} {dataset.get('ProtocolName') or ''}".strip()
    series = int(dataset.get("SeriesNumber") or 0), str(dataset.get("SeriesInstanceUID") or "")
    shape = int(dataset.Rows), int(dataset.Columns)
    pointers = [int(item.get("DimensionIndexPointer") or 0) for item in dataset.get("DimensionIndexSequence") or ()]
    temporal = next((n for n, pointer in enumerate(pointers) if pointer in _TEMPORAL), None)
    found, left = [], Counter[str]()
    for number in range(count):
        groups = _groups(dataset, number)
        orientation, position, spacing = (
            numbers(groups, name) for name in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing")
        )
        if (len(orientation), len(position), len(spacing)) != (6, 3, 2):
            left["images without a plane in space"] += 1
            continue
        if _is_phase(groups):
            left["phase images"] += 1
            continue
        axes = orientation.reshape(2, 3)
        if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-2) or not (spacing > 0).all():
            raise ValueError("orientation or pixel spacing")
        axes /= np.linalg.norm(axes, axis=1, keepdims=True)  # some write few digits
        times = (
            _one(groups, "TriggerTime", "NominalCardiacTriggerDelayTime"),
            _one(groups, "TemporalPositionIdentifier", "TemporalPositionIndex", "NominalPercentageOfCardiacPhase"),
            _one(groups, "InstanceNumber") if count == 1 else np.nan,  # frames of a file lie in any order
        )
        thickness = _one(groups, "SpacingBetweenSlices", "SliceThickness")
        slope, intercept = _one(groups, "RescaleSlope", default=1.0), _one(groups, "RescaleIntercept", default=0.0)
        by_row, by_column = map(float, spacing)
        found.append(
            Frame(
                dataset, number, axes, position, (by_row, by_column), thickness, shape, series, description, times,
                slope, intercept, _clock(groups),
                tuple(_one(groups, *names) for names in _CONTRAST),
                tuple(map(int, numbers(groups, "DimensionIndexValues"))), temporal, _words(groups, description),
            )
        )  # fmt: skip
    return found, left


_CONTRAST = (
    ("EchoTime", "EffectiveEchoTime"),
    ("InversionTime", "InversionTimes"),
    ("FlipAngle",),
)


def _clock(groups: Sequence[Any]) -> float:
    """Acquisition time of an image, s since midnight."""
    text = str(_value(groups, "FrameAcquisitionDateTime", "AcquisitionTime") or "")
    match = re.fullmatch(r"(?:\d{8})?(\d\d)(\d\d)(\d\d(?:\.\d+)?)(?:[+-]\d{4})?", text.strip())
    return np.nan if match is None else 3600 * int(match[1]) + 60 * int(match[2]) + float(match[3])


def _words(groups: Sequence[Any], description: str) -> str:
    """All that names the kind of an image: descriptions, sequence, type, contrast, tagging."""
    kind = _value(groups, "FrameType", "ImageType") or ()
    told = [description, *([kind] if isinstance(kind, str) else kind)]
    told += [_value(groups, name) or "" for name in ("SequenceName", "PulseSequenceName", "AcquisitionContrast")]
    tagged = str(_value(groups, "Tagging") or "NONE").upper() != "NONE"
    return " ".join(map(str, told)) + (" tagged" if tagged else "")


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
    """Groups that may hold a frame's attribute: its own functional groups, those that all frames share, the file's."""
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


def views(found: Sequence[Frame], where: str) -> tuple[dict[str, Stack], Counter[str]]:
    """The stack of each view that there is, and why other images are in none, with their number.

    Of the short axis it is the one with the most slices, with those of another name that go on where it ends; of long
    axes the last scan.

    Raises:
        InputError: more stacks than any scan has, or slices of another size that belong to the short axis.
    """
    of: dict[str, list[Stack]] = defaultdict(list)
    left = Counter[str]()
    for members in _parallel(found, where):
        stack = Stack(_slices(members))
        view, reason = view_of(stack.first)
        if max(map(len, stack.slices)) < MIN_FRAMES and view != "sax":
            view, reason = None, reason or f"images of a slice with fewer than {MIN_FRAMES} frames"
        reason = reason or _no_cine(stack)
        if view is None or reason:
            left[reason] += len(members)
            continue
        left["images of a slice that was scanned again"] += len(members) - stack.images
        of[view].append(stack)
    chosen = {}
    for view, stacks in of.items():
        if view == "sax":
            stack, others = _joined(stacks, where)
        else:
            stack = max(stacks, key=lambda s: s.newest)
            others = [other for other in stacks if other is not stack]
        if max(map(len, stack.slices)) < MIN_FRAMES:
            left[f"images of a slice with fewer than {MIN_FRAMES} frames"] += stack.images
        else:
            chosen[view] = stack
        left[f"images of another scan of the {view} view"] += sum(other.images for other in others)
    return chosen, +left


def view_of(frame: Frame) -> tuple[str | None, str]:
    """View of a stack, by its orientation and then its description; None: none that is wanted, and why.

    Short axes lie across the heart's axis: a name that says otherwise (``sax from 4ch``) doesn't count, and one that
    says nothing else makes it doubtful.
    """
    if _OTHER.search(frame.words or frame.description):
        return None, "images of a series that is no plain cine, by its name or type"
    chambers = sorted(set(_CHAMBERS.findall(frame.description)))
    short = _SHORT.search(frame.description) is not None
    across = abs(frame.normal * (-1, -1, 1) @ WANTED["sax"][0])
    if across >= ACROSS and (short or not chambers):
        return "sax", ""
    if across >= ACROSS or (short and not chambers and across < ALONG):
        return None, "images whose name and orientation tell different views"
    if len(chambers) == 1:
        return f"lax_{chambers[0]}ch", ""
    if chambers:
        return None, "images whose name tells several views"
    return ("sax", "") if short else (None, "images of a long axis that nothing names, or of another plane")


def _no_cine(stack: Stack) -> str:
    """Reason why the images of a stack's slices are no frames of one heartbeat; empty: they may be."""
    for plane in stack.slices:
        contrasts = np.array([frame.contrast for frame in plane])
        for values in contrasts.T:
            if np.nanmax(values, initial=0) > 0 and np.ptp(known := values[~np.isnan(values)]) > VARIES * known.max():
                return "images of changing contrast in one slice (mapping?)"
        triggers = np.array([frame.times[0] / 1000 for frame in plane])
        clocks = np.array([frame.clock_s for frame in plane])
        times = clocks if np.isnan(triggers).any() or np.ptp(triggers) == 0 else triggers
        if len(plane) > 1 and not np.isnan(times).any():
            low, high = DYNAMIC_S
            if low < np.median(np.diff(np.sort(times))) < high:
                return "images of one slice a heartbeat or more apart (perfusion?)"
    return ""


def _joined(stacks: Sequence[Stack], where: str) -> tuple[Stack, list[Stack]]:
    """The short axis with the most slices and all that continues it at its distance, and the other stacks.

    Raises:
        InputError: what continues it has another size or pixel spacing.
    """
    by_size = sorted(stacks, key=lambda s: (len(s.slices), s.newest), reverse=True)
    whole, *others = by_size
    whole_again = True
    while whole_again:
        whole_again = False
        for other in others:
            if not _continues(whole, other):
                continue
            a, b = whole.first, other.first
            if a.shape != b.shape or not np.allclose(a.spacing_mm, b.spacing_mm, rtol=1e-3):
                sizes = " and ".join(f"{f.shape} of {f.spacing_mm} mm" for f in (a, b))
                raise InputError(f"{where}: sax: expected slices of one size and pixel spacing, got {sizes}")
            slices = [*whole.slices, *other.slices]
            whole = Stack(sorted(slices, key=lambda frames: float(frames[0].position @ a.normal)))
            others.remove(other)
            whole_again = True
            break
    return whole, others


def _continues(whole: Stack, other: Stack) -> bool:
    """True if the slices of another stack lie beside those of the first, at the same distance all along."""
    a, b = whole.first, other.first
    if (a.axes * b.axes).sum(1).min() <= PARALLEL:
        return False
    gaps = np.diff(np.sort([_centre(frames[0]) @ a.normal for frames in (*whole.slices, *other.slices)]))
    return bool(gaps.min() > SAME_PLANE_MM and np.ptp(gaps) <= IRREGULAR * np.median(gaps) and gaps.max() < APART_MM)


def _centre(frame: Frame) -> np.ndarray:
    """Centre of the image, mm."""
    extent = (np.array(frame.shape) - 1) * frame.spacing_mm / 2
    return frame.position + extent[1] * frame.axes[0] + extent[0] * frame.axes[1]


def by_time(plane: list[Frame], where: str) -> list[Frame]:
    """The frames of one slice in order of the first kind of time that tells them apart.

    Raises:
        InputError: some have no time, or the same.
    """
    for times in _times(plane) if len(plane) > 1 else ():
        if np.isnan(times).all() or np.ptp(times) == 0:
            continue  # missing, or a place holder
        if np.isnan(times).any() or len(np.unique(times)) < len(plane):
            raise InputError(f"{where}: expected one image for each slice and time, got two or more at the same")
        return [plane[n] for n in np.argsort(times)]
    if len(plane) > 1:
        raise InputError(f"{where}: {len(plane)} images of one slice, without anything that tells their order")
    return plane


def _times(plane: Sequence[Frame]) -> Iterable[np.ndarray]:
    """Trigger times, temporal positions, indexes of time, instance numbers of the frames of a slice."""
    trigger, position, instance = np.array([frame.times for frame in plane]).T
    yield from (trigger, position)
    length = {len(frame.index) for frame in plane}
    if len(length) == 1 and 0 not in length:
        index = np.array([frame.index for frame in plane], float)
        varying = np.flatnonzero(np.ptp(index, axis=0))
        told = plane[0].temporal
        if told is not None and told < index.shape[1]:
            yield index[:, told]
        elif len(varying) == 1:  # of frames of one slice, nothing else can
            yield index[:, varying[0]]
    yield instance


def check_alike(found: Sequence[Frame], where: str) -> None:
    """Refuse a series whose parallel images differ in size or pixel spacing: part of it would be dropped in silence."""
    first: dict[tuple[tuple[int, str], str], Frame] = {}
    for frame in found:
        other = first.setdefault((frame.series, frame.kind), frame)
        parallel = (other.axes * frame.axes).sum(1).min() > PARALLEL
        same = other.shape == frame.shape and np.allclose(other.spacing_mm, frame.spacing_mm, rtol=1e-3)
        if parallel and not same and view_of(frame)[0]:
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
