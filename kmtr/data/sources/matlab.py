"""One array of numbers out of a MATLAB file: v5 (as ``save -v6`` and ``-v7`` write it), and v7.3, which is HDF5.

v5 is read here, by MathWorks' "MAT-File Format" (level 5), because SciPy believes the sizes in a file: a damaged one
ended the process (bus error), and a compressed variable of less than a MB may inflate to 4 GB. Here no more is inflated
than the array's shape has, and that is held against `Options.most_bytes` first.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kmtr.data.sources import Options, check_size, hdf5
from kmtr.types import InputError

Choose = Callable[[Sequence[str], str], str]
"""(names of the arrays in a file, what messages call the file) -> the wanted name, or InputError."""

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_V5_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
"""Type of a data element -> numpy's; MATLAB stores numbers in the smallest type that holds them."""
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
"""Class of an array -> numpy's type of its values."""
_OTHERS = {1: "cell", 2: "struct", 3: "object", 4: "char", 5: "sparse"}
_PIECE = 1 << 20
_MOST_DIMENSIONS = 32
_NAME = re.compile(rb"\w{0,63}", re.ASCII)


class _DamagedError(Exception):
    """The file does not go on as its format says."""


def load(path: Path, where: str, choose: Choose, options: Options | None = None) -> tuple[np.ndarray, str, bool]:
    """The chosen array as its container shows it, its name, and True for v5, whose order is MATLAB's own.

    Raises:
        InputError: no MATLAB file, cut short, damaged, no such array, or one larger than `options` allows.
    """
    options = options or Options()
    with path.open("rb") as file:
        head = file.read(520)
        if _HDF5_SIGNATURE not in (head[:8], head[512:520]):
            try:
                return (*_load_v5(file, where, choose, options), True)
            except (_DamagedError, zlib.error, OSError) as error:
                reason = str(error) if isinstance(error, _DamagedError) else type(error).__name__
                raise InputError(
                    f"{where}: expected a MATLAB file, v5 or v7.3; cannot be read ({reason}); fetch it again"
                ) from None
    with hdf5.opened(path, where) as container:
        arrays = hdf5.members(container, "Dataset")
        name = choose(list(arrays), where)
        return hdf5.array(arrays[name], where, name, options), name, False


class _Element:
    """The bytes of one variable, inflated as they are asked for and no further."""

    def __init__(self, file: BinaryIO, size: int, packed: bool) -> None:
        self._file, self._left = file, size
        self._stream = zlib.decompressobj() if packed else None
        self._tail = b""

    def take(self, count: int) -> bytearray:
        """The next `count` bytes. Memory grows with what is there, not with what is asked for."""
        taken = bytearray()
        while len(taken) < count:
            wanted = min(count - len(taken), _PIECE)
            piece = self._tail or self._file.read(min(self._left, wanted))
            self._left -= 0 if self._tail else len(piece)
            got = self._stream.decompress(piece, wanted) if self._stream else piece
            self._tail = self._stream.unconsumed_tail if self._stream else b""
            if not piece and not got:
                raise _DamagedError("cut short")
            taken += got
        return taken


@dataclass(frozen=True)
class _Array:
    """The head of a variable: its class (number of `_CLASSES` or `_OTHERS`), whether it is complex, shape and name."""

    kind: int
    is_complex: bool
    shape: tuple[int, ...]
    name: str


def _load_v5(file: BinaryIO, where: str, choose: Choose, options: Options) -> tuple[np.ndarray, str]:
    end = file.seek(0, 2)
    file.seek(0)
    order = {b"IM": "<", b"MI": ">"}.get(file.read(_V5_HEADER)[126:])
    if order is None:
        raise _DamagedError("no such header")
    starts: dict[str, int] = {}
    position = _V5_HEADER
    while position < end:
        element, size = _opened(file, position, order)
        position += 8 + size
        if position > end:
            raise _DamagedError("cut short")
        starts[_head(element, order).name] = position - 8 - size
    name = choose([name for name in starts if name], where)
    element, _ = _opened(file, starts[name], order)
    array = _head(element, order)
    if array.kind not in _CLASSES:
        kind = _OTHERS.get(array.kind, "variable of an unknown class")
        raise InputError(f"{where}: {name}: expected complex numbers, or zeros and ones, got a MATLAB {kind}")
    dtype = np.dtype(_CLASSES[array.kind])
    check_size(where, name, array.shape, dtype.itemsize * (2 if array.is_complex else 1), options)
    real = _numbers(element, order, math.prod(array.shape))
    if not array.is_complex:
        return real.astype(dtype).reshape(array.shape, order="F"), name
    values = np.empty(real.size, np.complex64 if dtype == np.float32 else np.complex128)
    values.real, values.imag = real, _numbers(element, order, real.size)
    return values.reshape(array.shape, order="F"), name


def _opened(file: BinaryIO, position: int, order: str) -> tuple[_Element, int]:
    """The variable at a position, and the bytes that it takes in the file after its tag."""
    file.seek(position)
    kind, size = struct.unpack(f"{order}II", _Element(file, 8, False).take(8))
    if kind not in (_MATRIX, _COMPRESSED):
        raise _DamagedError(f"a variable of type {kind}")
    element = _Element(file, size, kind == _COMPRESSED)
    if kind == _COMPRESSED and struct.unpack(f"{order}II", element.take(8))[0] != _MATRIX:
        raise _DamagedError("a compressed variable that is no array")
    return element, size


def _head(element: _Element, order: str) -> _Array:
    kind, flags = _part(element, order, 8)
    if len(flags) == 8 and struct.unpack(f"{order}I", flags[:4])[0] & 0xFF not in _CLASSES | _OTHERS:
        return _Array(0, False, (), "")  # such as MATLAB's own objects, which go on otherwise
    shape_kind, shape = _part(element, order, 4 * _MOST_DIMENSIONS)
    _, name = _part(element, order, 64)
    if len(flags) != 8 or _STORED.get(kind) != "u4" or _STORED.get(shape_kind) != "i4" or len(shape) % 4:
        raise _DamagedError("an array without flags or shape")
    (word,) = struct.unpack(f"{order}I", flags[:4])
    dimensions = struct.unpack(f"{order}{len(shape) // 4}i", shape)
    if not _NAME.fullmatch(name):
        raise _DamagedError("a name that is none")
    return _Array(word & 0xFF, bool(word & 0x800), dimensions, name.decode("ascii"))


def _numbers(element: _Element, order: str, count: int) -> np.ndarray:
    """The next part, exactly `count` numbers of any stored type."""
    kind, values = _part(element, order, 8 * count)
    dtype = np.dtype(order + _STORED.get(kind, "V1"))
    if kind not in _STORED or len(values) != count * dtype.itemsize:
        raise _DamagedError("other numbers than its shape has")
    return np.frombuffer(values, dtype)


def _part(element: _Element, order: str, most: int) -> tuple[int, bytearray]:
    """Type and bytes of the next data element of an array, of at most so many bytes; small ones share their tag."""
    (word,) = struct.unpack(f"{order}I", element.take(4))
    rest = element.take(4)
    if word >> 16:
        if (size := word >> 16) > 4:
            raise _DamagedError("a small element that is none")
        return word & 0xFFFF, rest[:size]
    (size,) = struct.unpack(f"{order}I", rest)
    if size > most:
        raise _DamagedError("a part larger than its array")
    values = element.take(size)
    element.take(-size % 8)
    return word, values
