"""Raw k-space of the CMRxRecon challenges: MATLAB files, v5 and v7.3 (HDF5), one or many coils.

Layout. The challenge names files alike for everybody, so the subject is the folder: ``.../P001/cine_sax.mat``, from
``CenterNNN`` on where the path has that (the numbers start anew in each centre). A folder is searched for
``cine_sax*.mat`` and ``cine_lax_{2,3,4}ch*.mat``, without patterns (``*mask*``). A plain ``cine_lax.mat`` holds several
long-axis views in an order that its file does not tell, so it is left out. Any other file can be named by itself.

Array. The first of these that is there: ``kspace_full``, ``kspace_single_full``, ``kspace``, ``kspace_sub*``,
``kspace_single_sub*``, ``underkspace``, ``kus``, any other whose name begins with ``kspace``; complex, or compound with
the fields ``real`` and ``imag``.

Order of its dimensions (`infer_axes`). MATLAB's own order in the challenge is ``kx ky coil slice t``, the readout
first. In v7.3, HDF5 shows the reverse, ``t slice coil ky kx``, unless other software wrote the file, which turns it
round again. So dimensions are told by rules, and ``axes=`` overrides them:

1. Two dimensions: ``kx ky`` in v5, ``ky kx`` in v7.3 (readout first in MATLAB).
2. More: the two largest are ky and kx, because a matrix has more lines and samples than there are coils, slices or
   frames. They come first, then the order is ``kx ky ...``, or last, then it is ``... ky kx``; else it is an error.
3. The others, from the matrix outwards: coil, slice, t for five dimensions; slice, t for four (the challenge's single
   coil); coil for three, or slice if the name has ``single`` in it.

Undersampling. A line (one ky of one slice and frame) whose every sample in every coil is zero was not acquired:
that gives `View.sampled`. Zeros that do not fill whole lines are refused: pseudo-radial patterns, or ky and kx
exchanged.

The files know neither spacing nor frame time. Readout oversampling stays unless `matrix` is given.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kmtr.data.sources import Item, Options, optional
from kmtr.physics.fourier import crop_or_pad, fftc, ifftc
from kmtr.types import InputError, Study, View

SOURCE = "cmrxrecon/1"

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
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def find(source: Path) -> list[Item]:
    """Subjects in a file or folder; see the module for the layout.

    Raises:
        InputError: nothing found, or two files for one view of a subject.
    """
    if source.is_file():
        return [Item("cmrxrecon", _subject(source), (source,))]
    files: dict[Path, list[Path]] = defaultdict(list)
    for path in sorted(source.rglob("*.mat")):
        if _FILE.fullmatch(path.name):
            files[path.parent].append(path)
    if not files:
        raise InputError(
            f"{source}: looked for cine_sax*.mat and cine_lax_2ch*.mat, _3ch, _4ch at any depth, found none; "
            "a file with another name is given itself"
        )
    if any(len({_view(path, str(source)) for path in paths}) < len(paths) for paths in files.values()):
        raise InputError(f"{source}: two files for one view of a subject (two patterns?), name one file instead")
    return [Item("cmrxrecon", _subject(paths[0]), tuple(paths)) for paths in files.values()]


def read(item: Item, where: str, subject_id: str, options: Options) -> Study:
    """The study of one subject, one view per file; see `kmtr.data.sources.read`. Nothing is random here."""
    views = {_view(path, where): read_view(path, where, options) for path in item.files}
    return Study(subject_id, views, source=SOURCE)


def read_view(path: Path, where: str, options: Options) -> View:
    """The k-space of one file and the pattern that it was acquired with; messages call the file `where`."""
    stored, key, readout_first = _load(path, where, _kspace_key)
    names = _check_axes(options.axes, stored.ndim) if options.axes else infer_axes(stored.shape, key, readout_first)
    if names is None:
        raise InputError(f"{where}: cannot tell the axes of {key} {stored.shape}; give axes= such as 'coil ky kx'")
    kspace = _complex64(_arrange(stored, names), where, key)
    if not np.isfinite(kspace).all():
        raise InputError(f"{where}: {key}: expected finite k-space, got NaN or infinity")
    sampled = _sampled(kspace, where, key)
    if options.matrix is not None:
        kspace = _crop(kspace, options.matrix, where, undersampled=sampled is not None)
    return View(kspace, sampled)


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
    outwards = {3: ("slice",) if "single" in key else ("coil",), 4: ("slice", "t"), 5: ("coil", "slice", "t")}.get(n)
    by_size = sorted(range(n), key=lambda axis: -shape[axis])
    if outwards is None or shape[by_size[1]] == shape[by_size[2]]:
        return None
    largest = set(by_size[:2])
    if largest == {0, 1}:
        return ("kx", "ky", *outwards)
    if largest == {n - 2, n - 1}:
        return (*outwards[::-1], "ky", "kx")
    return None


def read_pattern(path: str | Path) -> np.ndarray:
    """A sampling pattern from a ``.mat`` (v5, v7.3) or ``.npy`` file: bool, ``ky`` or ``t ky``, True = sampled.

    The file has one array of zeros and ones: one line of them (ky), a matrix with the readout (each line all zeros or
    all ones), or a series of such matrices, whose frames are the smallest dimension, first or last. The readout is the
    dimension along which nothing changes, so either order of the axes is read.

    Raises:
        InputError: no such array, other values, or a pattern that is not made of whole lines.
    """
    path, where = Path(path), str(path)
    if not path.is_file():
        raise InputError(f"{where}: expected a pattern file, .mat or .npy, found none")
    if path.suffix == ".npy":
        stored, readout_first = _load_npy(path), False
    else:
        stored, _, readout_first = _load(path, where, _pattern_key)
    if stored.dtype.kind not in "biuf" or not np.isin(stored, (0, 1)).all():
        raise InputError(f"{where}: expected a pattern of zeros and ones, got other values ({stored.dtype})")
    if not stored.any():
        raise InputError(f"{where}: expected a pattern that samples something, got only zeros")
    pattern = stored.astype(bool)
    if pattern.ndim != 3:
        pattern = pattern.squeeze()
    if pattern.ndim == 1:
        return pattern
    if pattern.ndim == 2:
        return _lines(pattern[None], where, readout_first)[0]
    if pattern.ndim != 3:
        raise InputError(f"{where}: expected a pattern of 1 to 3 dimensions (t, ky, kx), got {stored.shape}")
    first, middle, last = pattern.shape
    if min(first, last) >= min(middle, max(first, last)):
        raise InputError(f"{where}: expected fewer frames than lines, first or last, got {pattern.shape}")
    return _lines(pattern if first < last else pattern.transpose(2, 0, 1), where, readout_first)


def _lines(pattern: np.ndarray, where: str, readout_first: bool) -> np.ndarray:
    """``t`` and two dimensions, one of them the readout -> ``t ky``."""
    constant = [bool((pattern == pattern.take([0], axis)).all()) for axis in (1, 2)]
    if not any(constant):
        raise InputError(
            f"{where}: a two-dimensional pattern {pattern.shape[1:]}: expected whole lines, zero or one all along the "
            "readout; pseudo-radial patterns are not supported"
        )
    # All ones: constant along both, so only the container tells which dimension is the readout.
    readout = (1 if readout_first else 2) if all(constant) else 1 + constant.index(True)
    return pattern.take(0, readout)


def _subject(path: Path) -> str:
    """The folder, from ``Center`` on if there is one; a file with a name of its own is its own subject."""
    if not path.name.startswith("cine_"):
        return path.stem
    folders = path.resolve().parent.parts
    start = next((n for n, folder in enumerate(folders) if re.fullmatch(r"Center\d+", folder)), len(folders) - 1)
    return "/".join(folders[start:])


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


def _pattern_key(names: Sequence[str], where: str) -> str:
    found = [name for name in names if "mask" in name.lower()] or list(names)
    if len(found) != 1:
        raise InputError(f"{where}: expected one pattern, such as the variable mask, got {_listed(names)}")
    return found[0]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "no array at all"


def _load(path: Path, where: str, choose: Callable[[Sequence[str], str], str]) -> tuple[np.ndarray, str, bool]:
    """The chosen array as its container shows it, its name, and True for v5, whose order is MATLAB's own."""
    with path.open("rb") as file:
        head = file.read(520)
    if _HDF5_SIGNATURE in (head[:8], head[512:520]):
        return (*_load_hdf5(path, where, choose), False)
    return (*_load_v5(path, where, choose), True)


def _load_hdf5(path: Path, where: str, choose: Callable[[Sequence[str], str], str]) -> tuple[np.ndarray, str]:
    h5py = optional("h5py")
    try:
        with h5py.File(path, "r") as file:
            name = choose([name for name, entry in file.items() if isinstance(entry, h5py.Dataset)], where)
            return np.asarray(file[name][()]), name
    except (OSError, RuntimeError, KeyError) as error:
        raise InputError(f"{where}: the HDF5 file cannot be read ({type(error).__name__}); fetch it again") from None


def _load_v5(path: Path, where: str, choose: Callable[[Sequence[str], str], str]) -> tuple[np.ndarray, str]:
    """`simplify_cells` stays off: it drops dimensions of size 1, and the count of dimensions is what the rules need."""
    matlab = optional("scipy.io.matlab")
    try:
        name = choose([name for name, _, _ in matlab.whosmat(path, appendmat=False)], where)
        return np.asarray(matlab.loadmat(path, appendmat=False, variable_names=[name])[name]), name
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError, zlib.error, matlab.MatReadError) as error:
        raise InputError(
            f"{where}: expected a MATLAB file, v5 or v7.3; cannot be read ({type(error).__name__})"
        ) from None


def _load_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: expected a plain .npy array; cannot be read ({type(error).__name__})") from None


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
            "not supported, or ky and kx are exchanged: then give axes="
        )
    return None if lines.all() else lines


def _crop(kspace: np.ndarray, matrix: tuple[int, int], where: str, *, undersampled: bool) -> np.ndarray:
    """Crop or zero-pad the image about its centre, one direction after the other.

    The readout is complete, so this is exact along kx. Along ky it needs all lines, as a crop mixes them.
    """
    ny, nx = matrix
    if kspace.shape[-1] != nx:
        kspace = fftc(crop_or_pad(ifftc(kspace, (-1,)), (nx,), (-1,)), (-1,))
    if kspace.shape[-2] != ny:
        if undersampled:
            raise InputError(
                f"{where}: expected matrix={kspace.shape[-2]},{nx}: the source is undersampled, so its "
                f"{kspace.shape[-2]} lines cannot become {ny}"
            )
        kspace = fftc(crop_or_pad(ifftc(kspace, (-2,)), (ny,), (-2,)), (-2,))
    return np.ascontiguousarray(kspace)
