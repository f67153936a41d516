"""HDF5 files of strangers: nothing outside the file is opened, and no memory is asked for on the word of a header.

The HDF5 library does both. A link or a data set can name any other file that the process may read, and the library's
gzip filter grows its buffer for as long as the stream goes on: a file of 1 MB whose header claims 16 KB took 1 GB.
So only hard links are followed, data sets that keep their data elsewhere are refused, and compressed chunks are
decoded here, each to the size that its shape has and no further.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from kmtr.data.sources import Options, check_size, optional
from kmtr.types import InputError

DEFLATE, SHUFFLE, FLETCHER32 = 1, 2, 3
"""Filters that are undone here, by their numbers in HDF5: gzip, the sorting of bytes before it, and a checksum."""

LONGEST_NAME = 256


@contextmanager
def opened(path: Path, where: str) -> Iterator[Any]:
    """The file, an `h5py.File` for reading; what the library cannot read, then or later, becomes an InputError."""
    h5py = optional("h5py")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except InputError:
        raise
    except (OSError, RuntimeError, KeyError) as error:
        raise InputError(f"{where}: the HDF5 file cannot be read ({type(error).__name__}); fetch it again") from None


def members(group: Any, kind: str) -> dict[str, Any]:
    """Members of a group itself: name -> data set or group (`kind` is "Dataset" or "Group").

    Left out are links, and names that no line of text should show.
    """
    h5py = optional("h5py")
    names = (name for name in group if isinstance(name, str) and name.isprintable() and len(name) < LONGEST_NAME)
    hard = (name for name in names if isinstance(group.get(name, getlink=True), h5py.HardLink))
    found = ((name, group[name]) for name in hard)
    return {name: entry for name, entry in found if isinstance(entry, getattr(h5py, kind))}


def dtype_of(dataset: Any, where: str, what: str) -> np.dtype:
    """The type of a data set's values; InputError where numpy has none like it."""
    try:
        return dataset.dtype
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {what}: expected usual numbers, got a type that cannot be read ({error})") from None


def check_inside(dataset: Any, where: str, what: str) -> None:
    """Refuse a data set that keeps its data in other files."""
    if dataset.is_virtual or dataset.external:
        raise InputError(f"{where}: {what}: expected data in the file itself, got a reference to other files")


def array(dataset: Any, where: str, what: str, options: Options) -> np.ndarray:
    """The whole data set as the file shows it.

    Raises:
        InputError: it holds no plain numbers, more than `options` allows, less than its header claims, or is packed in
            another way than gzip's.
    """
    check_inside(dataset, where, what)
    shape, dtype = dataset.shape, dtype_of(dataset, where, what)
    if shape is None or dtype.hasobject or dtype.kind not in "biufcV":
        raise InputError(f"{where}: {what}: expected an array of numbers, got {dtype}")
    check_size(where, what, shape or (1,), dtype.itemsize, options)
    if dataset.chunks is None:
        if dataset.id.get_storage_size() < dataset.nbytes:
            raise InputError(f"{where}: {what}: the file holds less than the array that its header claims")
        return np.asarray(dataset[()])
    check_size(where, f"a chunk of {what}", dataset.chunks, dtype.itemsize, options)
    if not dataset.id.get_type().equal(optional("h5py").h5t.py_create(dtype)):
        raise InputError(f"{where}: {what}: expected numbers of a usual format, got others ({dtype})")
    return _chunked(dataset, where, what)


def _chunked(dataset: Any, where: str, what: str) -> np.ndarray:
    chunk, filters = dataset.chunks, _filters(dataset, where, what)
    result = np.empty(dataset.shape, dataset.dtype)
    starts = [range(0, length, step) for length, step in zip(dataset.shape, chunk, strict=True)]
    if dataset.id.get_num_chunks() < math.prod(map(len, starts)):
        raise InputError(f"{where}: {what}: parts of the array were never written; the file is incomplete")
    for start in product(*starts):
        skipped, packed = dataset.id.read_direct_chunk(start)
        active = [code for n, code in enumerate(filters) if not skipped >> n & 1]
        part = _unpacked(packed, active, chunk, dataset.dtype)
        if part is None:
            raise InputError(f"{where}: {what}: a compressed part is damaged or not of the size that its shape has")
        window = tuple(slice(a, min(a + c, n)) for a, c, n in zip(start, chunk, dataset.shape, strict=True))
        result[window] = part[tuple(slice(0, w.stop - w.start) for w in window)]
    return result


def _filters(dataset: Any, where: str, what: str) -> list[int]:
    """Numbers of the filters, in the order in which they were applied; each at most once."""
    settings = dataset.id.get_create_plist()
    found = [settings.get_filter(n)[0] for n in range(settings.get_nfilters())]
    if not set(found) <= {DEFLATE, SHUFFLE, FLETCHER32} or len(set(found)) < len(found):
        raise InputError(
            f"{where}: {what}: expected gzip (with shuffle, fletcher32) as compression, got HDF5 filters {found}"
        )
    return found


def _unpacked(packed: bytes, filters: list[int], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
    """One chunk, or None where it does not come to exactly its size."""
    size = math.prod(shape) * dtype.itemsize
    for code in reversed(filters):
        if code == DEFLATE:
            stream = zlib.decompressobj()
            try:
                packed = stream.decompress(packed, size)
                more = stream.decompress(stream.unconsumed_tail, 1)
            except zlib.error:
                return None
            if more or not stream.eof:
                return None
        elif code == FLETCHER32:
            packed, stored = packed[:-4], packed[-4:]
            if len(stored) < 4 or [int(n) % 65535 for n in np.frombuffer(stored, "<u2")] != fletcher32(packed):
                return None
        elif len(packed) == size:
            packed = np.frombuffer(packed, np.uint8).reshape(dtype.itemsize, -1).T.tobytes()
    return np.frombuffer(packed, dtype).reshape(shape) if len(packed) == size else None


def fletcher32(data: bytes) -> list[int]:
    """HDF5's checksum of bytes: two sums over big-endian 16-bit words, modulo 65535."""
    words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2")
    plain, weighted = 0, 0
    for start in range(0, len(words), 1 << 16):
        part = words[start : start + (1 << 16)].astype(np.uint64)
        weights = np.arange(len(part), 0, -1, dtype=np.uint64)
        weighted = (weighted + len(part) * plain + int(part @ weights)) % 65535
        plain = (plain + int(part.sum())) % 65535
    return [plain, weighted]
