"""One array out of a MATLAB file: v5 (and v4) through SciPy, v7.3 as HDF5.

What a file claims is held against `Options.most_bytes` before memory is asked for. SciPy believes the sizes in a file,
and a compressed variable of a few MB can inflate to 4 GB, so each is inflated once, piece by piece and counted, before
SciPy reads it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kmtr.data.sources import Options, check_size, hdf5, optional
from kmtr.types import InputError

Choose = Callable[[Sequence[str], str], str]
"""(names of the arrays in a file, what messages call the file) -> the wanted name, or InputError."""

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_COMPRESSED = 15
_V5_HEADER = 128
_SLACK = 1 << 20
"""Bytes of a variable beside its numbers: tags, name, padding."""
_ITEMSIZE = {"double": 8, "single": 4, "logical": 1} | {
    f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def load(path: Path, where: str, choose: Choose, options: Options | None = None) -> tuple[np.ndarray, str, bool]:
    """The chosen array as its container shows it, its name, and True for v5, whose order is MATLAB's own.

    Raises:
        InputError: no MATLAB file, cut short, damaged, no such array, or one larger than `options` allows.
    """
    options = options or Options()
    with path.open("rb") as file:
        head = file.read(520)
    if _HDF5_SIGNATURE in (head[:8], head[512:520]):
        with hdf5.opened(path, where) as container:
            arrays = hdf5.members(container, "Dataset")
            name = choose(list(arrays), where)
            return hdf5.array(arrays[name], where, name, options), name, False
    return (*_load_v5(path, where, choose, options), True)


def _load_v5(path: Path, where: str, choose: Choose, options: Options) -> tuple[np.ndarray, str]:
    """`simplify_cells` stays off: it drops dimensions of size 1, and the count of dimensions is what callers need."""
    matlab = optional("scipy.io.matlab")
    try:
        with path.open("rb") as file:
            _check_inflated(file, where, options)
        listed = {name: (shape, kind) for name, shape, kind in matlab.whosmat(path, appendmat=False)}
        name = choose(list(listed), where)
        shape, kind = listed[name]
        if kind not in _ITEMSIZE:
            raise InputError(f"{where}: {name}: expected complex numbers, or zeros and ones, got a MATLAB {kind}")
        check_size(where, name, shape, _ITEMSIZE[kind], options)
        return np.asarray(matlab.loadmat(path, appendmat=False, variable_names=[name])[name]), name
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, IndexError, OverflowError, NotImplementedError) as error:
        reason = type(error).__name__
    except (zlib.error, struct.error, matlab.MatReadError) as error:
        reason = type(error).__name__
    raise InputError(f"{where}: expected a MATLAB file, v5 or v7.3; cannot be read ({reason})")


def _check_inflated(file: BinaryIO, where: str, options: Options) -> None:
    """Inflate each compressed variable of a v5 file, keeping nothing. Other files are left to SciPy."""
    header = file.read(_V5_HEADER)
    order = {b"IM": "<", b"MI": ">"}.get(header[126:128])
    while order and len(tag := file.read(8)) == 8:
        kind, size = struct.unpack(f"{order}II", tag)
        if kind != _COMPRESSED:
            file.seek(size, 1)
            continue
        stream, inflated = zlib.decompressobj(), 0
        while size > 0 and (piece := file.read(min(size, _SLACK))):
            size -= len(piece)
            while piece:
                inflated += len(stream.decompress(piece, _SLACK))
                piece = stream.unconsumed_tail
                if inflated > options.most_bytes + _SLACK:
                    raise InputError(
                        f"{where}: a compressed variable is larger than {options.most_bytes / 2**30:.3g} GiB; if that "
                        "is true, raise ingest.gib"
                    )
