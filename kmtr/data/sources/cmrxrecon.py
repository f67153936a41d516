"""Raw k-space of the CMRxRecon challenges 2023 to 2025: MATLAB files, v5 and v7.3 (HDF5), one or many coils.

Layout. The challenge names files alike for everybody, so the subject is the folder: ``.../P001/cine_sax.mat``, from
``CenterNNN`` on where the path has that (2025: ``Center001/Siemens_30T_Vida/P001``; the numbers start anew in each
centre), with the set before it (``TrainingSet``, ``ValidationSet``, ``TestSet``: their numbers start anew as well). A
folder is searched for ``cine_sax*.mat`` and ``cine_lax_{2,3,4}ch*.mat``, without patterns (``*mask*``). A plain
``cine_lax.mat`` holds several long-axis views in an order that its file does not tell, so it is left out. Any other
file can be named by itself. The scanner's folder gives vendor and field strength.

Array. The first of these that is there: ``kspace_full``, ``kspace_single_full``, ``kspace``, ``kspace_sub*``,
``kspace_single_sub*``, ``underkspace``, ``kus``, any other whose name begins with ``kspace``; complex, or compound with
the fields ``real`` and ``imag``.

Order of its dimensions (`infer_axes`). MATLAB's own order in the challenge is ``kx ky coil slice t``, the readout
first. In v7.3, HDF5 shows the reverse, ``t slice coil ky kx``, unless other software wrote the file, which turns it
round again. So dimensions are told by rules, and ``axes=`` overrides them:

1. Two dimensions: ``kx ky`` in v5, ``ky kx`` in v7.3 (readout first in MATLAB).
2. More: the two largest are ky and kx, because a matrix has more lines and samples than there are coils, slices or
   frames. They come first, then the order is ``kx ky ...``, or last, then it is ``... ky kx``; else it is an error.
3. The others, from the matrix outwards: coil, slice, t for five dimensions. Fewer: by the name, which says whether
   there is one coil (``single``: slice, t; a note says so where the frames are not there) or many (coil first). Of many
   coils with four dimensions nothing tells the last: MATLAB drops a single frame, others squeeze a single slice.

Undersampling. A line (one ky of one slice and frame) whose every sample in every coil is zero was not acquired:
that gives `View.sampled`. Zeros that do not fill whole lines are refused: pseudo-radial patterns, or ky and kx
exchanged. The pattern beside (2023: ``cine_sax_mask.mat``) must then have the same lines, else it belongs to another
acquisition and the subject is refused; beside complete k-space it says nothing.

The files know neither spacing nor frame time. Readout oversampling is removed where the table beside
(``cine_sax_info.csv``, ``ReadOutOversample``) tells it, or by `matrix`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kmtr.data.sources import Item, Options, check_stored, matlab
from kmtr.data.sources.patterns import read_pattern
from kmtr.data.sources.raw import (
    check_finite,
    check_oversampling,
    check_raw,
    columns,
    crop_kspace,
    notes_on_centres,
)
from kmtr.physics.fourier import ifftc
from kmtr.types import InputError, Study, View

SOURCE = "cmrxrecon/2"

AXES = ("slice", "coil", "t", "ky", "kx")

KEYS = (
    "kspace_full",
    "kspace_single_full",
    "kspace",
    r"kspace_sub.*",
    r"kspace_single_sub.*",
    "underkspace",
    "kus",
    r"kspace.*",
)
"""Names of the k-space variable, as regular expressions, most wanted first."""

HOLES = 0.05
"""Largest share of exact zeros within acquired lines; pseudo-radial patterns have most of them."""

_FILE = re.compile(r"cine_(sax|lax_[234]ch)(?!.*mask).*\.mat")
_LONG_AXIS = re.compile(r"lax_([234]ch)")
_SET = re.compile(r"(Training|Validation|Test)Set")
_CENTRE = re.compile(r"Center\d+")
_SCANNER = re.compile(r"(Siemens|UIH|GE|Philips)_(\d+)T_.+")


def find(source: Path) -> list[Item]:
    """Subjects in a file or folder; see the module for the layout.

    Raises:
        InputError: nothing found, or two files for one view of a subject.
    """
    if source.is_file():
        return [Item("cmrxrecon", _subject(source), (source,))]
    files: dict[Path, list[Path]] = defaultdict(list)
    for path in sorted(source.rglob("*.mat")):
        if _FILE.fullmatch(path.name) and path.is_file():
            files[path.parent].append(path)
    if not files:
        raise InputError(
            f"{source}: looked for cine_sax*.mat and cine_lax_2ch*.mat, _3ch, _4ch at any depth, found none; "
            "a file with another name is given itself"
        )
    return [_item(paths, str(source)) for paths in files.values()]


def why_unused(path: Path) -> str:
    """Reason why a MATLAB file that is no subject's is not read; empty: it is the pattern beside some k-space."""
    name = path.name.lower()
    if "mask" in name:
        read = (other for other in path.parent.glob("*.mat") if _FILE.fullmatch(other.name))
        beside = any(_pattern_beside(other) == path for other in read)
        return "" if beside else "sampling patterns without their k-space beside them"
    if re.match(r"cine_lax\.", name):
        return "long axes of several views in one file, whose order it does not tell"
    return "no cine by their names (cine_sax*.mat, cine_lax_2ch*.mat, _3ch, _4ch)"


def read(item: Item, where: str, subject_id: str, options: Options) -> Study:
    """The study of one subject, one view per file; see `kmtr.data.sources.read`. Nothing is random here."""
    views, notes = {}, []
    for path in item.files:
        name = _view(path, where)
        views[name], said = read_view(path, where, options)
        notes += [f"{name}: {line}" for line in said]
    vendor, field_strength_t = _scanner(item.files[0])
    return Study(
        subject_id,
        views,
        source=SOURCE,
        vendor=vendor,
        field_strength_t=field_strength_t,
        notes=(*notes, *notes_on_centres(views)),
    )


def read_view(path: Path, where: str, options: Options) -> tuple[View, list[str]]:
    """The k-space of one file and the pattern that it was acquired with, and notes; messages call the file `where`."""
    stored, key, readout_first = matlab.load(path, where, _kspace_key, options)
    names = _check_axes(options.axes, stored.ndim) if options.axes else infer_axes(stored.shape, key, readout_first)
    notes: list[str] = []
    if names is None:
        raise InputError(
            f"{where}: cannot tell the axes of {key} {stored.shape}; give axes= (ingest.axes=), such as 'coil ky kx'"
        )
    if not options.axes and len(names) == 3 and "slice" in names:
        slices = stored.shape[names.index("slice")]
        notes.append(f"{slices} slices of one frame; if these are frames of one slice, give axes= (ingest.axes=)")
    matrix = options.matrix
    if matrix is None and options.oversampling == "remove" and (factor := _oversampling(path)) > 1:
        matrix = stored.shape[names.index("ky")], round(stored.shape[names.index("kx")] / factor)
    arranged = _arrange(stored, names)
    check_stored(where, key, (*arranged.shape[:3], *(matrix or arranged.shape[3:])), options)
    kspace = _complex64(arranged, where, key)
    check_finite(kspace, where, key)
    sampled = _sampled(kspace, where, key)
    check_raw(kspace, sampled, where)
    if sampled is not None and (beside := _pattern_beside(path)) is not None:
        _check_pattern(sampled, beside, where)
    if matrix is not None and matrix != options.matrix:
        power = np.sum([columns(ifftc(coil, (-1,))) for part in kspace for coil in part], axis=0)
        check_oversampling(power, matrix[1], where)
    if matrix is not None:
        kspace = crop_kspace(kspace, matrix, where, undersampled=sampled is not None)
    return View(kspace, sampled), notes


def infer_axes(shape: Sequence[int], key: str, readout_first: bool) -> tuple[str, ...] | None:
    """Names of the dimensions of a stored array by the rules 1 to 3 of the module; None: they do not tell.

    Args:
        shape: of the stored array.
        key: its name in the file.
        readout_first: the container's own order is MATLAB's (v5), not its reverse (v7.3); used by rule 1 only.
    """
    n = len(shape)
    if n == 2:
        return ("kx", "ky") if readout_first else ("ky", "kx")
    by_size = sorted(range(n), key=lambda axis: -shape[axis])
    if n > 5 or n < 2 or shape[by_size[1]] == shape[by_size[2]]:
        return None
    matrix = set(by_size[:2])
    if matrix not in ({0, 1}, {n - 2, n - 1}):
        return None
    first = matrix == {0, 1}
    outwards = _outwards(shape[2:] if first else shape[-3::-1], "single" in key)
    if outwards is None:
        return None
    return ("kx", "ky", *outwards) if first else (*outwards[::-1], "ky", "kx")


def _outwards(sizes: Sequence[int], single: bool) -> tuple[str, ...] | None:
    """Names of one to three dimensions besides ky and kx, from the matrix outwards; None: ambiguous."""
    if len(sizes) == 3:
        return None if single and sizes[0] > 1 else ("coil", "slice", "t")
    if single:
        return ("slice", "t")[: len(sizes)]
    return ("coil", "slice")[: len(sizes)] if max(sizes[1:], default=1) == 1 else None


def _subject(path: Path) -> str:
    """The set and the folder, from ``Center`` on if there is one; a file with a name of its own is its own subject."""
    if not path.name.startswith("cine_"):
        return path.stem
    folders = path.resolve().parent.parts
    start = next((n for n, folder in enumerate(folders) if _CENTRE.fullmatch(folder)), len(folders) - 1)
    sets = [folder for folder in folders[:start] if _SET.fullmatch(folder)][-1:]
    return "/".join([*sets, *folders[start:]])


def _item(paths: list[Path], where: str) -> Item:
    views = {_view(path, where) for path in paths}
    twice = "two files for one view of a subject (two patterns?), name one file instead"
    return Item("cmrxrecon", _subject(paths[0]), tuple(paths), twice if len(views) < len(paths) else "")


def _scanner(path: Path) -> tuple[str | None, float | None]:
    """Vendor and field strength (T) from a folder such as ``Siemens_30T_Vida``; None where there is none."""
    found = next((match for folder in path.parts if (match := _SCANNER.fullmatch(folder))), None)
    return (found[1], int(found[2]) / 10) if found else (None, None)


def _oversampling(path: Path) -> float:
    """Readout oversampling by the table beside (``cine_sax_info.csv``); 1 where there is none or it does not say."""
    table = path.with_name(f"{path.stem}_info.csv")
    if not table.is_file():
        return 1.0
    with table.open("rb") as file:
        text = file.read(1 << 16).decode("utf-8", "replace")
    found = re.search(r"^\s*ReadOutOversample[^,\n]*,\s*\"?(\d+(?:\.\d+)?)", text, re.MULTILINE)
    factor = float(found[1]) if found else 1.0
    return factor if 1 <= factor <= 4 else 1.0


def _pattern_beside(path: Path) -> Path | None:
    """``cine_sax_mask.mat`` beside ``cine_sax.mat``, ``cine_sax_mask_X.mat`` beside ``cine_sax_kus_X.mat``."""
    stem = path.stem.replace("_kus_", "_mask_") if "_kus_" in path.stem else f"{path.stem}_mask"
    beside = path.with_name(f"{stem}.mat")
    return beside if beside.is_file() else None


def _check_pattern(sampled: np.ndarray, beside: Path, where: str) -> None:
    """Refuse k-space whose lines are not those of the pattern beside it: one of the two is of another acquisition."""
    try:
        pattern = read_pattern(beside)
    except InputError as error:
        raise InputError(f"{where}: the pattern beside it: {str(error).removeprefix(f'{beside}: ')}") from None
    frames, lines = sampled.shape[1:]
    if pattern.shape not in ((lines,), (frames, lines)) or (np.broadcast_to(pattern, sampled.shape) != sampled).any():
        raise InputError(f"{where}: the acquired lines are not those of the pattern beside it; is it another's?")


def _view(path: Path, where: str) -> str:
    name = path.stem.lower()
    if chamber := _LONG_AXIS.search(name):
        return f"lax_{chamber[1]}"
    if "lax" in name:
        raise InputError(f"{where}: expected one view per file, cine_sax or cine_lax_2ch, _3ch, _4ch, got cine_lax")
    return "sax"


def _kspace_key(names: Sequence[str], where: str) -> str:
    found = (name for key in KEYS for name in names if re.fullmatch(key, name))
    if (name := next(found, None)) is None:
        raise InputError(f"{where}: expected k-space (kspace_full, kspace, kspace_sub*, ...), got {_listed(names)}")
    return name


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "no array at all"


def _check_axes(axes: str, dimensions: int) -> tuple[str, ...]:
    names = tuple(axes.split())
    if len(set(names)) < len(names) or not {"ky", "kx"} <= set(names) <= set(AXES) or len(names) != dimensions:
        raise InputError(
            f"axes: expected {dimensions} different names of {' '.join(AXES)}, with ky and kx, got {axes!r}"
        )
    return names


def _arrange(stored: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Named dimensions -> ``slice coil t ky kx``; those not named have size 1."""
    present = stored.transpose([names.index(axis) for axis in AXES if axis in names])
    return present.reshape([stored.shape[names.index(axis)] if axis in names else 1 for axis in AXES])


def _complex64(array: np.ndarray, where: str, key: str) -> np.ndarray:
    """complex64, contiguous, from a complex or a compound (real, imag) array."""
    if array.dtype.names and {"real", "imag"} <= set(array.dtype.names):
        kspace = np.empty(array.shape, np.complex64)
        kspace.real, kspace.imag = array["real"], array["imag"]
        return kspace
    if array.dtype.kind != "c":
        raise InputError(f"{where}: {key}: expected complex numbers, or a compound of real and imag, got {array.dtype}")
    return np.ascontiguousarray(array, np.complex64)


def _sampled(kspace: np.ndarray, where: str, key: str) -> np.ndarray | None:
    """The acquired lines, bool ``slice t ky``, told by exact zeros; None: all of them."""
    acquired = (kspace != 0).any(1)
    lines, samples = acquired.any(-1), np.flatnonzero(acquired.any((0, 1, 2)))
    if not len(samples):
        raise InputError(f"{where}: {key}: expected k-space, got nothing but zeros")
    # An asymmetric echo leaves one end of every line empty, so only what lies between first and last sample counts.
    holes = 1 - acquired[..., samples[0] : samples[-1] + 1][lines].mean()
    if holes > HOLES:
        raise InputError(
            f"{where}: {key}: {holes:.0%} of the acquired lines is zero: a pattern of no whole lines (pseudo-radial), "
            "not supported, or ky and kx are exchanged: then give axes= (ingest.axes=)"
        )
    return None if lines.all() else lines
