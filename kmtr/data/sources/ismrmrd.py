"""ISMRMRD raw data (Inati et al., MRM 77:411, 2017), ``.h5`` or ``.mrd``: Cartesian 2D cine of one or many coils.

Layout. A file is a subject by its name, unless that only says what it shows (``sax``, ``cine_sax_03``, ``lax_2ch``,
``4ch``, ...): then the folder is the subject, and its files of one view are put together. A folder is searched at any
depth; HDF5 files that hold no acquisitions are left out. The view is told by the file name, else by the protocol or
series name of the header (``..._4ch_...``, ``RT_Cine_SAX``); if neither tells, the file is refused rather than guessed.

Which acquisitions are read. Noise measurements whiten (below); navigators, phase correction, phase stabilisation,
feedback, dummies and surface coil correction are left out. Calibration lines are used where they are imaging lines too,
and lines for calibration only where the header says ``embedded`` (same sequence, same contrast), not where they are a
scan of their own. Lines acquired several times (averages, repeats) are averaged. Frames are the cardiac phases or the
repetitions, whichever there are several of. What else varies (contrast, set, second encoded direction, encoding space,
channels) is refused, as are trajectories other than Cartesian and readouts in reverse (they need a phase correction).

Grid. The encoded matrix: line `kspace_encode_step_1` lies at ``line - limits.center + ny // 2`` (partial Fourier leaves
one side of ky empty, and `View.sampled` says so), sample i at ``i - center_sample + nx // 2`` after the discarded ones
(an asymmetric echo leaves one end of kx zero). Where the energy contradicts these centres or that matrix, see
`kmtr.data.sources.encoding`. Readout oversampling is encoded over reconstructed field of view along x and is removed in
the image, unless `Options.oversampling` is "keep"; where the image fills all of it, there was none, and the file is
refused. ky is never cropped to the reconstructed matrix, because that would mix lines.

Prewhitening (Pruessmann et al., MRM 46:638, 2001), where there are noise measurements: `kmtr.physics.noise.whitening`.
Their bandwidth may differ from the image's, which changes the scale alone, and units are arbitrary.

Slices are ordered by position from base to apex (towards left, anterior, inferior) along their common normal; they must
be parallel, evenly spaced and at different places. A file without any position keeps the order of its slice counter,
and its spacing is unknown. In the plane nothing is turned: ky and kx are what the scanner chose.

Time between frames: the median step of the trigger time (phases) or of the clock (repetitions). The standard leaves the
unit of these stamps open; Siemens' is 2.5 ms, of other vendors the time is unknown.

Of the header nothing is kept but vendor and field strength. Rows are read through h5py: `ismrmrd.Dataset` reads each
three times (4.9 ms against 0.3 ms a row), and believes what they claim. The package gives flags, layout and schema.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kmtr.data.sources import Item, Options, check_size, check_stored, encoding, hdf5, looked, optional
from kmtr.data.sources.raw import (
    check_finite,
    check_oversampling,
    check_raw,
    columns,
    crop_kspace,
    notes_on_centres,
)
from kmtr.physics.fourier import crop_or_pad, fftc, ifftc
from kmtr.physics.noise import whitening
from kmtr.types import InputError, Study, View

SOURCE = "ismrmrd/2"

TICK_S = 2.5e-3
"""Unit of Siemens' time stamps."""
FRAME_TIME_S = (0.005, 0.2)
"""Plausible time between two frames of a cine."""
TO_APEX = np.array([1, -1, -1]) / np.sqrt(3)
"""Nearest direction from base to apex in the header's coordinates (to left, posterior, superior)."""
SAME_PLACE_MM, UNEVEN = 0.1, 0.1
"""Distance below which two slices are one; greatest deviation of a slice distance from the median, relative."""
PARALLEL = np.cos(np.radians(2))

NOISE = ("NOISE_MEASUREMENT",)
CALIBRATION = ("PARALLEL_CALIBRATION",)
CALIBRATION_AND_IMAGING = ("PARALLEL_CALIBRATION_AND_IMAGING",)
REVERSE = ("REVERSE",)
NO_IMAGE = (
    "NAVIGATION_DATA",
    "PHASECORR_DATA",
    "HPFEEDBACK_DATA",
    "DUMMYSCAN_DATA",
    "RTFEEDBACK_DATA",
    "SURFACECOILCORRECTIONSCAN_DATA",
    "PHASE_STABILIZATION_REFERENCE",
    "PHASE_STABILIZATION",
)
PILOT_TONE = [0, 1, 2, -1]
"""Samples of every readout that hold the pilot tone instead of the heart, where the header's parameter PilotTone says
that it was on: OCMR's own reader (read_ocmr.py) sets them to zero.
"""
VENDORS = {"siemens": "Siemens", "philips": "Philips", "ge ": "GE", "uih": "UIH", "united imaging": "UIH"}
"""Words in the header's free text -> what is kept of it."""

Row = Callable[[int], np.ndarray]
"""Number of an acquisition -> its samples, complex64 ``coil sample``."""

_FILE = re.compile(r"(cine[_-]?)?(sax?|(la|lax)?[_-]?([234])ch)([_-]?\d+)?", re.IGNORECASE)
_CHAMBERS = re.compile(r"(?<!\d)([234])[ _-]?(ch(?![a-z])|chamber)", re.IGNORECASE)
_SHORT_AXIS = re.compile(r"(?<![a-z])(sax|sa|short[ _-]?axis)(?![a-z])", re.IGNORECASE)
_XML_BYTES = 1 << 20


@dataclass(frozen=True)
class _Header:
    """The part of a file's XML header that is read.

    Attributes:
        view: one of VIEWS; None: the names do not tell.
        spaces: one per encoded space.
        siemens: time stamps count `TICK_S`.
        pilot_tone: see `PILOT_TONE`.
    """

    view: str | None
    spaces: tuple[encoding.Space, ...]
    vendor: str | None
    field_strength_t: float | None
    siemens: bool
    pilot_tone: bool


@dataclass(frozen=True)
class _Recording:
    """One file: k-space ``slice coil t ky kx``, sampled ``slice t ky``, positions and normals ``slice 3`` (mm).

    `notes` say where the header's word was not taken.
    """

    header: _Header
    kspace: np.ndarray
    sampled: np.ndarray
    positions: np.ndarray
    normals: np.ndarray
    spacing_mm: tuple[float, float, float] | None
    frame_time_s: float | None
    notes: tuple[str, ...]


def find(source: Path) -> list[Item]:
    """Subjects in a file or folder; see the module for the layout. A file that cannot be opened is somebody's.

    Raises:
        InputError: nothing found.
    """
    if source.is_file():
        return [Item("ismrmrd", _subject(source), (source,))]
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() in (".h5", ".mrd") and path.is_file() and looked(_has_acquisitions, path, True):
            files[_subject(path)].append(path)
    if not files:
        raise InputError(f"{source}: looked for .h5 and .mrd files with ISMRMRD acquisitions at any depth, found none")
    return [Item("ismrmrd", name, tuple(paths)) for name, paths in files.items()]


def _has_acquisitions(path: Path) -> bool:
    with hdf5.opened(path, "") as file:
        return bool(_groups(file))


def why_unused(path: Path) -> str:
    """Reason why a file that no item has is not read (`find`)."""
    return "HDF5 without ISMRMRD acquisitions (images, or k-space of another layout)"


def read(item: Item, where: str, subject_id: str, options: Options) -> Study:
    """The study of one subject; see `kmtr.data.sources.read`. Nothing is random here."""
    if options.axes:
        raise InputError("axes: ISMRMRD names its axes itself; the key is for nifti and cmrxrecon")
    recordings: dict[str, list[_Recording]] = defaultdict(list)
    for path in item.files:
        recording = _recording(path, where, options)
        if (view := _view(path.stem) or recording.header.view) is None:
            raise InputError(
                f"{where}: cannot tell the view: neither the protocol names short axis, 2ch, 3ch or 4ch, nor the file; "
                "name it sax.h5 or lax_4ch.h5, in a folder of the subject"
            )
        recordings[view].append(recording)
    views = {view: _stacked(parts, where, options) for view, parts in recordings.items()}
    header = recording.header
    notes = [f"{view}: {note}" for view, parts in recordings.items() for part in parts for note in part.notes]
    return Study(
        subject_id,
        views,
        source=SOURCE,
        vendor=header.vendor,
        field_strength_t=header.field_strength_t,
        notes=(*dict.fromkeys(notes), *notes_on_centres(views)),
    )


def _subject(path: Path) -> str:
    return path.resolve().parent.name if _FILE.fullmatch(path.stem) else path.stem


def _view(name: str) -> str | None:
    """The view that a name which says nothing else, such as a file's, stands for."""
    if (match := _FILE.fullmatch(name)) is None:
        return None
    return f"lax_{match[4]}ch" if match[4] else "sax"


def _groups(file: Any) -> list[Any]:
    """Groups that hold acquisitions and their header."""
    groups = hdf5.members(file, "Group").values()
    return [group for group in groups if {"data", "xml"} <= set(hdf5.members(group, "Dataset"))]


def _recording(path: Path, where: str, options: Options) -> _Recording:
    with hdf5.opened(path, where) as file:
        groups = _groups(file)
        if len(groups) != 1:
            raise InputError(f"{where}: expected one group with acquisitions (data, xml), got {len(groups)}")
        header = _header(groups[0]["xml"], where)
        rows = groups[0]["data"]
        heads = _heads(rows, where, options)
        used, noise = _chosen(heads, header, where)
        row = partial(_row, rows, heads, where=where, pilot_tone=header.pilot_tone)
        weights = _whitening(row, heads, noise, int(heads["active_channels"][used][0]), where)
        return _gridded(row, heads, used, weights, header, where, options)


def _header(dataset: Any, where: str) -> _Header:
    """The XML header, read leniently: only what is used must be right."""
    h5py, schema = optional("h5py"), optional("ismrmrd.xsd")
    parsers, config = optional("xsdata.formats.dataclass.parsers"), optional("xsdata.formats.dataclass.parsers.config")
    exceptions = optional("xsdata.exceptions")
    hdf5.check_inside(dataset, where, "xml")
    dtype = hdf5.dtype_of(dataset, where, "xml")
    if dataset.shape != (1,) or h5py.check_string_dtype(dtype) is None:
        raise InputError(f"{where}: expected one text as XML header, got {dtype} {dataset.shape}")
    text = bytes(dataset[0])
    # Entities are the one way in which a short document becomes a long one; the standard has no use for them.
    if len(text) > _XML_BYTES or b"<!DOCTYPE" in text or b"<!ENTITY" in text or b"\0" in text:
        raise InputError(f"{where}: expected an ISMRMRD header of at most 1 MiB of plain XML without entities")
    lenient = config.ParserConfig(fail_on_unknown_properties=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", exceptions.ConverterWarning)
            header = parsers.XmlParser(config=lenient).from_bytes(text, schema.ismrmrdHeader)
    except (exceptions.ParserError, SyntaxError, TypeError, ValueError) as error:
        raise InputError(f"{where}: the XML header cannot be read ({type(error).__name__})") from None
    names = [getattr(header.measurementInformation, key, None) for key in ("protocolName", "seriesDescription")]
    system = header.acquisitionSystemInformation
    vendor_text = f"{getattr(system, 'systemVendor', None) or ''} ".lower()
    vendor = next((name for word, name in VENDORS.items() if word in vendor_text), None)
    tesla = getattr(system, "systemFieldStrength_T", None)
    return _Header(
        view=next((view for name in names if name and (view := _view_in(name))), None),
        spaces=tuple(encoding.space(entry, where) for entry in header.encoding),
        vendor=vendor,
        field_strength_t=tesla if isinstance(tesla, float) and 0 < tesla < 30 else None,
        siemens=vendor == "Siemens",
        pilot_tone=any(
            entry.name == "PilotTone" and bool(entry.value)
            for entry in getattr(header.userParameters, "userParameterLong", None) or ()
        ),
    )


def _view_in(text: str) -> str | None:
    """The one view that a free text names; None: none, or several."""
    found = {f"lax_{match[1]}ch" for match in _CHAMBERS.finditer(text)}
    found |= {"sax"} if _SHORT_AXIS.search(text.replace("_", " ")) else set()
    return found.pop() if len(found) == 1 else None


def _heads(rows: Any, where: str, options: Options) -> np.ndarray:
    """The headers of all acquisitions; what they claim is checked, their data is not read."""
    wanted = optional("ismrmrd.hdf5").acquisition_header_dtype
    hdf5.check_inside(rows, where, "data")
    dtype = hdf5.dtype_of(rows, where, "data")
    fields = set(dtype.names or ())
    if len(rows.shape or ()) != 1 or not {"head", "data"} <= fields or not _fits(dtype["head"], wanted):
        raise InputError(f"{where}: expected a list of ISMRMRD acquisitions, got {dtype} {rows.shape}"[:200])
    base = optional("h5py").check_vlen_dtype(dtype["data"])
    if base != np.float32 or rows.id.get_create_plist().get_nfilters():
        raise InputError(f"{where}: expected acquisitions of 32-bit numbers, not compressed, got {base}")
    check_size(where, "acquisitions", rows.shape, rows.id.get_type().get_size(), options)
    if rows.id.get_storage_size() < rows.size * rows.id.get_type().get_size():
        raise InputError(f"{where}: the file holds less than the {rows.size} acquisitions that it claims")
    heads = rows.fields("head")[()]
    samples = heads["number_of_samples"].astype(np.int64) * heads["active_channels"]
    check_size(where, "samples of all acquisitions", (int(samples.sum()),), 8, options)
    return heads


def _fits(have: np.dtype, wanted: np.dtype) -> bool:
    """True if a record has the wanted fields of the wanted kinds, at whatever offsets."""
    if wanted.names:
        return set(wanted.names) <= set(have.names or ()) and all(_fits(have[n], wanted[n]) for n in wanted.names)
    return have.base.kind == wanted.base.kind and have.shape == wanted.shape


def _flagged(heads: np.ndarray, names: Sequence[str]) -> np.ndarray:
    constants = optional("ismrmrd.constants")
    bits = sum(1 << (getattr(constants, f"ACQ_IS_{name}") - 1) for name in names)
    return (heads["flags"] & np.uint64(bits)) != 0


def _chosen(heads: np.ndarray, header: _Header, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the image's lines, and of the noise measurements."""
    noise, spaces = _flagged(heads, NOISE), heads["encoding_space_ref"]
    if spaces[~noise].size and spaces[~noise].max() >= len(header.spaces):
        raise InputError(f"{where}: acquisitions of encoded space {spaces.max()}, which the XML header does not have")
    embedded = np.array([space.embedded for space in header.spaces] or [False])
    calibration = _flagged(heads, CALIBRATION) & ~_flagged(heads, CALIBRATION_AND_IMAGING)
    apart = calibration & ~embedded[np.minimum(spaces, len(embedded) - 1)]
    used = np.flatnonzero(~noise & ~_flagged(heads, NO_IMAGE) & ~apart)
    if not len(used):
        raise InputError(f"{where}: expected acquisitions of an image, got none among {len(heads)}")
    if _flagged(heads[used], REVERSE).any():
        raise InputError(f"{where}: expected readouts in one direction, got reversed ones (echo-planar), not supported")
    counters = heads["idx"][used]
    for what, values in (
        ("encoded spaces", spaces[used]),
        ("numbers of channels", heads["active_channels"][used]),
        ("lines of a third dimension", counters["kspace_encode_step_2"]),
        ("contrasts", counters["contrast"]),
        ("sets", counters["set"]),
    ):
        if len(several := np.unique(values)) > 1:
            raise InputError(f"{where}: expected one image series, got {len(several)} {what}, not supported")
    return used, np.flatnonzero(noise)


def _row(rows: Any, heads: np.ndarray, number: int, *, where: str, pilot_tone: bool) -> np.ndarray:
    """One acquisition, complex64 ``coil sample``, of exactly the size that its header claims; no pilot tone."""
    head = heads[number]
    shape = int(head["active_channels"]), int(head["number_of_samples"])
    values = rows.fields("data")[number]
    if values.size != 2 * shape[0] * shape[1]:
        raise InputError(
            f"{where}: acquisition {number}: expected {shape[0]} x {shape[1]} samples, got {values.size / 2:g} in all"
        )
    samples = values.view(np.complex64).reshape(shape)
    if pilot_tone:
        samples[:, [n for n in PILOT_TONE if n < shape[1]]] = 0
    return samples


def _whitening(row: Row, heads: np.ndarray, noise: np.ndarray, coils: int, where: str) -> np.ndarray | None:
    """``coil coil`` from all noise measurements; None: there are none."""
    if not len(noise):
        return None
    if (heads["active_channels"][noise] != coils).any():
        raise InputError(f"{where}: expected noise of the image's {coils} channels, got another number")
    samples = np.concatenate([row(number) for number in noise.tolist()], 1)
    check_finite(samples, where, "noise measurements")
    try:
        return whitening(samples)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _gridded(
    row: Row,
    heads: np.ndarray,
    used: np.ndarray,
    weights: np.ndarray | None,
    header: _Header,
    where: str,
    options: Options,
) -> _Recording:
    """The lines at their places of the encoded matrix."""
    chosen, counters = heads[used], heads["idx"][used]
    coils = int(chosen["active_channels"][0])
    slices, slice_of = np.unique(counters["slice"], return_inverse=True)
    frames, frame_of = _frames(counters, where)
    space = header.spaces[int(chosen["encoding_space_ref"][0])]
    grid = encoding.grid(space, chosen, lambda i: row(int(used[i])), where, options)
    (ny, nx), line_of, first, start, length = grid.matrix, grid.line, grid.first, grid.start, grid.length
    kept = grid.samples if options.oversampling == "remove" else nx
    check_size(where, "k-space", (len(slices), coils, frames, ny, max(kept, nx // 4)), 8, options)
    check_stored(where, "k-space", (len(slices), coils, frames, ny, kept), options)
    kspace = np.empty((len(slices), coils, frames, ny, kept), np.complex64)
    times = np.zeros((len(slices), frames, ny), np.int64)
    power = np.zeros(nx)
    np.add.at(times, (slice_of, frame_of, line_of), 1)
    for n in range(len(slices)):
        whole = np.zeros((coils, frames, ny, nx), np.complex64)
        for i in np.flatnonzero(slice_of == n).tolist():
            line = row(int(used[i]))[:, first[i] : first[i] + length[i]]
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused below
                whole[:, frame_of[i], line_of[i], start[i] : start[i] + length[i]] += line
        whole /= np.maximum(times[n], 1)[..., None].astype(np.float32)
        if weights is not None:
            whole = np.tensordot(weights.astype(np.complex64), whole, 1)
        for coil in range(coils):  # one after the other: temporary copies stay small
            if kept == nx:
                kspace[n, coil] = whole[coil]
            else:
                hybrid = ifftc(whole[coil], (-1,))
                power += columns(hybrid)
                kspace[n, coil] = fftc(crop_or_pad(hybrid, (kept,), (-1,)), (-1,))
    check_finite(kspace, where, "acquisitions")
    if kept < nx:
        check_oversampling(power, kept, where)
    positions, normals = _places(chosen, slice_of, where)
    frame_time_s = _frame_time_s(chosen, frame_of, frames) if header.siemens else None
    notes = (*grid.notes, *(("the samples that hold the pilot tone are set to zero",) if header.pilot_tone else ()))
    return _Recording(header, kspace, times > 0, positions, normals, grid.spacing_mm, frame_time_s, notes)


def _places(chosen: np.ndarray, slice_of: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions and normals, ``slice 3``, which all acquisitions of a slice share."""
    one_of_each = [int(np.flatnonzero(slice_of == n)[0]) for n in range(int(slice_of.max()) + 1)]
    with np.errstate(invalid="ignore"):
        positions, normals = (chosen[key].astype(float) for key in ("position", "slice_dir"))
    if not np.isfinite(positions).all():
        raise InputError(f"{where}: expected positions of the slices, got numbers that are none")
    if np.abs(positions - positions[one_of_each][slice_of]).max() > 1:
        raise InputError(f"{where}: expected one position per slice, got acquisitions of one slice at several places")
    return positions[one_of_each], normals[one_of_each]


def _frames(counters: np.ndarray, where: str) -> tuple[int, np.ndarray]:
    """Number of frames, and the frame of each line: by cardiac phase or by repetition."""
    phases, repetitions = (len(np.unique(counters[name])) for name in ("phase", "repetition"))
    if phases > 1 and repetitions > 1:
        raise InputError(
            f"{where}: expected phases or repetitions as frames, got {phases} of one, {repetitions} of other"
        )
    numbers, frame_of = np.unique(counters["phase" if phases > 1 else "repetition"], return_inverse=True)
    if int(numbers[-1]) - int(numbers[0]) >= len(numbers):
        missing = next(n for n in range(int(numbers[0]), int(numbers[-1])) if n not in numbers)
        raise InputError(f"{where}: frame {missing} of {numbers[0]} to {numbers[-1]} is missing")
    return len(numbers), frame_of


def _frame_time_s(chosen: np.ndarray, frame_of: np.ndarray, frames: int) -> float | None:
    """Median step of Siemens' time stamps from frame to frame, s; None where it is not plausible."""
    by_phase = len(np.unique(chosen["idx"]["phase"])) > 1
    stamps = chosen["physiology_time_stamp"][:, 0] if by_phase else chosen["acquisition_time_stamp"]
    steps = np.diff([np.median(stamps[frame_of == t]) for t in range(frames)])
    step = float(np.median(steps)) * TICK_S if len(steps) and steps.min() > 0 else 0.0
    return step if FRAME_TIME_S[0] <= step <= FRAME_TIME_S[1] else None


def _stacked(parts: list[_Recording], where: str, options: Options) -> View:
    """The recordings of one view as one stack of slices."""
    if len(shapes := {part.kspace.shape[1:] for part in parts}) > 1:
        raise InputError(f"{where}: expected recordings of one shape (coil t ky kx) in a view, got {sorted(shapes)}")
    positions, normals = (np.concatenate([getattr(part, key) for part in parts]) for key in ("positions", "normals"))
    order, distance = _order(positions, normals, where)
    kspace = np.concatenate([part.kspace for part in parts])[order] if len(order) > 1 else parts[0].kspace
    sampled = np.concatenate([part.sampled for part in parts])[order]
    check_raw(kspace, sampled, where)
    complete = bool(sampled.all())
    if options.matrix is not None:
        kspace = crop_kspace(kspace, options.matrix, where, undersampled=not complete)
    spacing = parts[0].spacing_mm
    if spacing is not None and len(order) > 1:
        spacing = None if distance is None else (distance, *spacing[1:])
    return View(
        kspace, None if complete else sampled, spacing_mm=spacing, frame_time_s=parts[0].frame_time_s
    )  # fmt: skip


def _order(positions: np.ndarray, normals: np.ndarray, where: str) -> tuple[np.ndarray, float | None]:
    """Order of the slices from base to apex, and their distance in mm (None: one slice, or no positions at all)."""
    count = len(positions)
    if count == 1 or not positions.any():
        return np.arange(count), None
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or np.abs(lengths - 1).max() > 0.01:
        raise InputError(f"{where}: expected normals of the slices of length 1, got {lengths.min():g}")
    normals = normals / lengths
    if np.abs(normals @ normals[0]).min() < PARALLEL:
        raise InputError(f"{where}: expected parallel slices in a view, got tilted ones; one file per view")
    normal = normals[0] if normals[0] @ TO_APEX >= 0 else -normals[0]
    heights = positions @ normal
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    if steps.min() < SAME_PLACE_MM:
        raise InputError(f"{where}: two slices at the same place; is one a copy?")
    if steps.max() > (1 + UNEVEN) * np.median(steps) or steps.min() < (1 - UNEVEN) * np.median(steps):
        raise InputError(
            f"{where}: slices are {steps.min():.1f} to {steps.max():.1f} mm apart; is one missing, or are two stacks "
            "mixed?"
        )
    return order, float(np.median(steps))
