"""The encoded space of an ISMRMRD file: where its lines and samples belong, by the header and by their energy.

The header says which line and which sample are the centre of k-space, and how large the matrix is; converters get
either wrong. The geometry leaves few possibilities: a partial Fourier scan and an asymmetric echo leave one side of
the matrix empty and reach the other end. So the header is held against the energy (`kmtr.physics.centre`), measured on
some of the acquisitions. Where the two agree, or the energy tells nothing, the header's word counts. Where they do not,
the one possibility that the energy confirms is taken, and a note says so; if there is none, the file is refused.

- Central line (siemens_to_ismrmrd, issues 1 and 142; MRIReco.jl, issue 240): the header's, or the one by which the
  encoded lines begin or end with the matrix, or are symmetric.
- Central sample: the header's ``center_sample``, or the one by which the readout begins or ends with the matrix.
- Readout oversampling removed before the file was written, as Gadgetron and ismrmrd-python-tools do (MRIReco.jl, issues
  227 and 239): readouts as long as the reconstructed field of view needs, with their centre in the middle.
- An encoded matrix larger than what was encoded (philips_to_ismrmrd, issue 4): lines that are symmetric about the
  centre are a matrix of their own, over the same field of view; the header's larger one only fills with zeros (a phase
  resolution of 50 to 100 %; OCMR's own reader takes the limits too). Fewer lines, and readouts that are so, are
  refused, because nothing says whether their field of view is the header's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmtr.data.sources import Options, check_size
from kmtr.physics import centre
from kmtr.types import InputError

MOST_READ = 1500
"""Acquisitions that the energy is measured on."""
PARTS = 8
"""Parts of them whose median counts (`centre.profile`): a spike spoils one."""
UNTOLD = 0
"""Value of `center_sample` where a converter left it out."""


@dataclass(frozen=True)
class Space:
    """An encoded space as the XML header describes it.

    Attributes:
        matrix: (ny, nx) with oversampling.
        samples: along x without oversampling.
        centre: number of the central line.
        lines: numbers of the first and last line that were encoded; None: it does not say.
        field_mm: field of view (thickness, y, x) with oversampling; None: no plausible one.
        embedded: lines for calibration alone belong to the image.
    """

    matrix: tuple[int, int]
    samples: int
    centre: int
    lines: tuple[int, int] | None
    field_mm: tuple[float, float, float] | None
    embedded: bool


@dataclass(frozen=True)
class Grid:
    """Place of acquisitions in the matrix.

    Attributes:
        matrix: (ny, nx) that was encoded.
        samples: along x without oversampling.
        line: of each acquisition, where it lies along ky.
        first, start, length: of each acquisition, the first sample that is kept, where it lies along kx, how many are
            kept.
        spacing_mm: (thickness, y, x); None: unknown.
        notes: where the header's word was not taken.
    """

    matrix: tuple[int, int]
    samples: int
    line: np.ndarray
    first: np.ndarray
    start: np.ndarray
    length: np.ndarray
    spacing_mm: tuple[float, float, float] | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Energy:
    """Power of acquisitions along an axis, as `centre.profile` gives it.

    Attributes:
        lines: by line, from the lowest number on.
        samples: by sample; readouts are aligned at what their headers call the centre, index `middle`.
    """

    lines: np.ndarray
    samples: np.ndarray
    middle: int


def space(encoding: Any, where: str) -> Space:
    """The encoded space of an XML header's element ``encoding``.

    Raises:
        InputError: not Cartesian, not 2D, or without the numbers that are needed.
    """
    trajectory = str(getattr(encoding.trajectory, "value", encoding.trajectory))
    if trajectory != "cartesian":
        raise InputError(f"{where}: expected a Cartesian trajectory, got {trajectory}")
    try:
        encoded, wanted = encoding.encodedSpace, encoding.reconSpace
        nx, ny, nz = (int(getattr(encoded.matrixSize, axis)) for axis in "xyz")
        field = [float(getattr(encoded.fieldOfView_mm, axis)) for axis in "zyx"]
        ratio = float(wanted.fieldOfView_mm.x) / field[2] if field[2] > 0 else 1.0
        limits = getattr(encoding.encodingLimits, "kspace_encoding_step_1", None)
        middle = ny // 2 if limits is None or limits.center is None else int(limits.center)
        lines = None if limits is None else (int(limits.minimum), int(limits.maximum))
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"{where}: expected matrix size and field of view of both spaces in the XML header") from None
    if min(nx, ny) < 1 or nz > 1:
        raise InputError(f"{where}: expected a 2D encoded matrix, got {nx} x {ny} x {nz}")
    mode = getattr(encoding.parallelImaging, "calibrationMode", None)
    return Space(
        matrix=(ny, nx),
        samples=max(1, round(nx * ratio)) if 0 < ratio < 1 else nx,
        centre=middle,
        lines=lines,
        field_mm=(field[0], field[1], field[2]) if np.isfinite(field).all() and min(field) > 0 else None,
        embedded=str(getattr(mode, "value", mode)) == "embedded",
    )


def grid(space: Space, heads: np.ndarray, row: Callable[[int], np.ndarray], where: str, options: Options) -> Grid:
    """The place of every acquisition of an image.

    Args:
        heads: ISMRMRD's headers of the acquisitions.
        row: number among `heads` -> its samples, complex ``coil sample``.

    Raises:
        InputError: they do not fit the encoded matrix, or the energy contradicts the header and no place that the
            geometry allows agrees with it.
    """
    readouts = _readouts(heads, space.matrix[1])
    if readouts.length.min() < 1:
        raise InputError(f"{where}: readouts do not fit the encoded matrix: of some, every sample is to be discarded")
    measured = energy(heads, readouts, row, where, options)
    middle, lines_notes = _central_line(space, heads, measured, where)
    ny = _lines_encoded(space, heads, middle)
    line = heads["idx"]["kspace_encode_step_1"].astype(int) - middle + ny // 2
    if line.min() < 0 or line.max() >= ny:
        raise InputError(f"{where}: lines {line.min()} to {line.max()} do not fit the encoded matrix's {ny}")
    if 2 * ny < space.matrix[0]:
        raise InputError(
            f"{where}: expected at least half of the {space.matrix[0]} lines of the encoded matrix, got {ny} in its "
            "middle; correct the header"
        )
    if ny < space.matrix[0]:
        lines_notes += (f"{ny} lines were encoded of the header's {space.matrix[0]}: read as they are, without zeros",)
    nx, start, notes = _starts(space, readouts, measured, where)
    spacing = None
    if space.field_mm is not None:  # a readout without its oversampling has pixels of the same width
        spacing = (space.field_mm[0], space.field_mm[1] / ny, space.field_mm[2] / space.matrix[1])
    kept = space.samples if nx == space.matrix[1] else nx
    return Grid(
        (ny, nx), kept, line, readouts.first, start + readouts.first, readouts.length, spacing, lines_notes + notes
    )  # fmt: skip


@dataclass(frozen=True)
class Readouts:
    """The readouts of acquisitions, one entry each.

    A readout is counted whole, or, where that is longer than the matrix, without what is to be discarded.

    Attributes:
        first, length: the first sample that is kept, and how many are.
        lead, size: the first sample that is counted, and how many are.
        told: the header's central sample, from `lead` on; the middle of a complete readout whose centre was left out.
    """

    first: np.ndarray
    length: np.ndarray
    lead: np.ndarray
    size: np.ndarray
    told: np.ndarray


def _readouts(heads: np.ndarray, nx: int) -> Readouts:
    size, first, after, told = (
        heads[name].astype(int) for name in ("number_of_samples", "discard_pre", "discard_post", "center_sample")
    )
    length, longer = size - first - after, size > nx
    lead, size = np.where(longer, first, 0), np.where(longer, length, size)
    return Readouts(first, length, lead, size, np.where((told == UNTOLD) & (size == nx), nx // 2, told - lead))


def energy(
    heads: np.ndarray, readouts: Readouts, row: Callable[[int], np.ndarray], where: str, options: Options
) -> Energy:
    """The profiles of the lines and of the samples, over `MOST_READ` of the acquisitions, always the same ones."""
    numbers, coils = heads["idx"]["kspace_encode_step_1"].astype(int), int(heads["active_channels"][0])
    before = readouts.told - (readouts.first - readouts.lead)  # kept samples before what is called the centre
    low, middle = int(numbers.min()), int(before.max())
    extents = int(numbers.max()) - low + 1, int((readouts.length - before).max()) + middle
    check_size(where, "lines and samples of all channels", (coils, PARTS, sum(extents)), 8, options)
    lines, samples = (np.zeros((coils, PARTS, extent)) for extent in extents)
    line_count, sample_count = np.zeros(lines.shape[1:]), np.zeros(samples.shape[1:])
    for n, i in enumerate(np.random.default_rng(0).permutation(len(heads))[:MOST_READ].tolist()):
        first, length = int(readouts.first[i]), int(readouts.length[i])
        values, begin = row(i)[:, first : first + length], middle - int(before[i])
        with np.errstate(invalid="ignore", over="ignore"):
            power = values.real.astype(float) ** 2 + values.imag.astype(float) ** 2
        power[~np.isfinite(power)] = 0  # refused when all is read
        lines[:, n % PARTS, numbers[i] - low] += power.sum(1) - power.max(1)
        samples[:, n % PARTS, begin : begin + length] += power
        line_count[n % PARTS, numbers[i] - low] += length
        sample_count[n % PARTS, begin : begin + length] += 1
    return Energy(centre.profile(lines, line_count), centre.profile(samples, sample_count), middle)


def _encoded_lines(space: Space, numbers: np.ndarray) -> tuple[int, int]:
    """First and last line by the header's limits, where they hold the lines that are there; else by these."""
    low, high = int(numbers.min()), int(numbers.max())
    return space.lines if space.lines and space.lines[0] <= low and high <= space.lines[1] else (low, high)


def _central_line(space: Space, heads: np.ndarray, measured: Energy, where: str) -> tuple[int, tuple[str, ...]]:
    """Number of the central line, and a note where it is not the header's.

    Lines are symmetric about it, or, of a partial Fourier scan, begin or end with a matrix: the header's, or, since
    that may be filled with zeros, the one of which the header's centre is the middle (siemens_to_ismrmrd: half of the
    protocol's phase encoding lines, while the scanner counts from the first line that it measures).
    """
    numbers, ny = heads["idx"]["kspace_encode_step_1"].astype(int), space.matrix[0]
    low, told = int(numbers.min()), space.centre
    every = len(np.unique(numbers)) == len(measured.lines)
    if not (off := centre.displacement(measured.lines, told - low, complete=every)):
        return told, ()
    possible = set()
    for first, last in {_encoded_lines(space, numbers), (low, int(numbers.max()))}:
        ends = (c for n in (ny, 2 * told, last - first + 1) for c in (first + n // 2, last - (n - 1 - n // 2)))
        possible |= {c for c in ends if low <= c <= numbers.max()}
    if (middle := _nearest(possible, told + off, ny)) is None:
        raise InputError(
            f"{where}: expected the energy of lines {low} to {numbers.max()} around the header's central line {told}, "
            f"got it around {told + off}, which no scan of {ny} lines has, partial Fourier or not; correct the header"
        )
    return middle, (
        f"the header calls line {told} of {low} to {numbers.max()} the centre, by the energy it is {middle}",
    )


def _lines_encoded(space: Space, heads: np.ndarray, middle: int) -> int:
    """Lines of the smallest matrix around line `middle` that holds all that were encoded; at most the header's.

    These are the lines of the header's limits, or those that are there where every frame has all of them and they are
    symmetric about the centre. One line less than the header's is rounding.
    """
    index, ny = heads["idx"], space.matrix[0]
    numbers = index["kspace_encode_step_1"].astype(int)
    low, high = int(numbers.min()), int(numbers.max())
    frames = np.stack([index[name].astype(int) for name in ("slice", "phase", "repetition")], 1)
    complete = len(np.unique(np.column_stack([frames, numbers]), axis=0)) == len(np.unique(frames, axis=0)) * (
        high - low + 1
    )
    if complete and abs((middle - low) - (high - middle)) <= 1:
        lines = low, high
    elif space.lines:
        lines = _encoded_lines(space, numbers)
    else:
        return ny
    size = max(2 * (middle - lines[0]), 2 * (lines[1] - middle) + 1)
    size += (size - ny) % 2
    return size if 0 < size < ny - 1 else ny


def _starts(space: Space, readouts: Readouts, measured: Energy, where: str) -> tuple[int, np.ndarray, tuple[str, ...]]:
    """Samples of the encoded readout, where the first sample of each acquisition lies on it, and notes."""
    nx = space.matrix[1]
    off = centre.displacement(measured.samples, measured.middle, complete=True) or 0
    widths, starts, notes = set(), np.zeros(len(readouts.size), int), []
    for size, told in sorted({*zip(readouts.size.tolist(), readouts.told.tolist(), strict=True)}):
        possible = {c: nx for c in (nx // 2, size - (nx - nx // 2)) if 0 <= c < size <= nx}
        if size < nx and abs(size - space.samples) <= 1:
            possible[size // 2] = size
        if (middle := _nearest(possible, told + off, nx)) is None:
            seen = f", their energy around sample {told + off}" if off else ""
            raise InputError(
                f"{where}: readouts of {size} samples, their centre called {told}{seen}, do not fit the encoded "
                f"matrix's {nx}: neither complete, nor an asymmetric echo, nor without oversampling; correct the header"
            )
        width = possible[middle]
        if width < nx:
            notes.append(
                f"readout oversampling was removed before: {size} samples of the header's {nx}, read as they are"
            )
        elif not off and 0 <= nx // 2 - told <= nx - size:
            middle = told
        else:
            notes.append(
                f"readouts of {size} samples: the header calls {told} the centre, the energy says {middle}: read so"
            )
        widths.add(width)
        starts[(readouts.size == size) & (readouts.told == told)] = width // 2 - middle
    if len(widths) > 1:
        raise InputError(f"{where}: expected readouts of one kind, got some with and some without oversampling")
    return widths.pop(), starts - readouts.lead, tuple(notes)


def _nearest(possible: Iterable[int], wanted: int, length: int) -> int | None:
    """The possible centre nearest to the wanted one; None: none within the reach of a central block."""
    found = min(possible, key=lambda c: (abs(c - wanted), c), default=None)
    return found if found is not None and abs(found - wanted) <= centre.reach(length) else None
