"""Files below a root, opened for reading, and a local cache of those that an object store has."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from kmtr.data.dataset.files import File, LocalFile, RemoteFile
from kmtr.data.dataset.storage import is_local, open_root, write_all
from kmtr.types import InputError

PIECE_BYTES = 16 << 20
PIECES_IN_FLIGHT = 4
"""Pieces of a download at once: enough to fill a fast network, 64 MiB of memory."""

POLL_S = 0.01
"""Between looks at a lock that another process or thread holds."""

_opened: Counter[Path] = Counter()
_opened_lock = threading.RLock()
"""Cached files that this process holds open; they are not evicted. Re-entrant: a collected file releases its own."""


def open_file(root: str, name: str, cache: Cache | None = None, size: int | None = None, version: str = "") -> File:
    """The file `name` below `root`.

    Args:
        cache: keeps whole files of stores that are not local; a file in it is opened without a request.
        size: what the file must have, bytes.
        version: content's identity (e.g. SHA-256), part of the cache's key: two files of one size aren't mistaken.

    Raises:
        FileNotFoundError: no such file.
        EOFError: another size than `size`.
        InputError: the store refuses, has no such bucket, or the file is larger than the cache.
        StoreError: the store failed after all tries.
    """
    store, base = open_root(root)
    path = f"{base}/{name}"
    if is_local(store):
        file: File = LocalFile(path, name)
    elif cache is None:
        file = RemoteFile(store, path, name)
    else:
        remote = partial(RemoteFile, store, path, name)
        expected = remote().size if size is None else size
        file = cache.open(remote, name, _key(root, name, expected, version), expected)
    if size is not None and file.size != size:
        found = file.size
        file.close()
        raise EOFError(f"{name}: expected {size} bytes, got {found}: truncated or changed; restore or rewrite it")
    return file


@dataclass(frozen=True)
class Cache:
    """Whole files of an object store in a local folder that all processes of a node share.

    A file is downloaded once, to a temporary name, by whoever gets its lock first; others wait and then open it. Room
    is made before a download begins, temporary files included: the least recently opened go first, never those that
    this process holds open. Another process may evict them all the same: an open file stays readable without its name,
    and its space is free once it is closed. If there is no room even so, the file is read from the store. A process
    that dies leaves at most a temporary file, which the next that needs room removes.

    Attributes:
        folder: local; an empty lock file stays in it for each file that it ever had.
        gib: of all its files together.
    """

    folder: str
    gib: float

    def open(self, remote: Callable[[], File], name: str, key: str, size: int) -> File:
        """The cached file of `key`, downloaded if need be; `remote()` if there is no room for it or its size
        differs.

        Raises:
            InputError: the file is larger than the cache, or the folder can't be used.
        """
        if size > self._bound:
            raise InputError(
                f"{name}: expected files that fit into data.cache_gib={self.gib:g}, got one of {size / 2**30:.3g} GiB; "
                "enlarge the cache, or use none"
            )
        folder = Path(self.folder).expanduser().resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _open_cached(folder / f"{key}.file", name, size) or self._fetch(remote, name, folder / key, size)
        except OSError as error:
            if error.errno is None:  # of the store; this machine's have a number
                raise
            raise InputError(
                f"data.cache={self.folder}: expected a local folder with room for {self.gib:g} GiB, "
                f"got: {error.strerror}"
            ) from None

    @property
    def _bound(self) -> int:
        return int(self.gib * 2**30)

    def _fetch(self, remote: Callable[[], File], name: str, stem: Path, size: int) -> File:
        part, whole = stem.with_suffix(".part"), stem.with_suffix(".file")
        with _alone(part):
            if cached := _open_cached(whole, name, size):
                return cached  # another was faster
            source = remote()
            if source.size != size or not self._reserve(part, size):
                return source
            try:
                with source, part.open("r+b") as file:
                    _download(source, file.fileno())
                    os.fsync(file.fileno())
                os.replace(part, whole)
            finally:
                part.unlink(missing_ok=True)
            return _open_cached(whole, name, size) or remote()  # evicted meanwhile, in a cache of few files

    def _reserve(self, own: Path, size: int) -> bool:
        """Make the temporary file `own`, of this size, having evicted what is needed; False, nothing done: no room."""
        folder = own.parent
        with _alone(folder / "room"), _opened_lock:
            own.unlink(missing_ok=True)  # of a process that died
            for part in folder.glob("*.part"):
                _remove_if_left(part)
            # Parts first: one that becomes a file meanwhile counts twice, not never.
            excess = size - self._bound + sum(s.st_size for _, s in _stats(folder, "*.part"))
            files = sorted((s.st_mtime_ns, s.st_size, path) for path, s in _stats(folder, "*.file"))
            excess += sum(nbytes for _, nbytes, _ in files)
            evicted = []
            for _, nbytes, path in files:
                if excess > 0 and not _opened[path]:
                    evicted.append(path)
                    excess -= nbytes
            if excess > 0:
                return False
            for path in evicted:
                path.unlink(missing_ok=True)
            with own.open("wb") as file:
                file.truncate(size)
            return True


def _key(root: str, name: str, size: int, version: str) -> str:
    return hashlib.sha256("\n".join((root, name, str(size), version)).encode()).hexdigest()[:32]


def _open_cached(path: Path, name: str, size: int) -> File | None:
    """A file of the cache, marked as used now; None if it isn't there, or was torn by a power failure."""
    with _opened_lock:
        try:
            file = LocalFile(path, name, partial(_forget, path))
        except FileNotFoundError:
            return None
        _opened[path] += 1
    if file.size != size:
        file.close()
        path.unlink(missing_ok=True)
        return None
    file.touch()
    return file


def _forget(path: Path) -> None:
    with _opened_lock:
        _opened[path] -= 1
        if not _opened[path]:
            del _opened[path]


def _download(source: File, number: int) -> None:
    def piece(offset: int) -> None:
        content = source.read_at(offset, min(PIECE_BYTES, source.size - offset))
        write_all(number, memoryview(content), offset)

    with ThreadPoolExecutor(PIECES_IN_FLIGHT) as pool:  # its end waits: nobody writes to a closed file's number
        list(pool.map(piece, range(0, source.size, PIECE_BYTES)))


def _alone(path: Path) -> contextlib.AbstractContextManager[object]:
    """Hold the lock beside `path` against every other process and thread; it ends with its process."""
    return FileLock(path.with_suffix(".lock")).acquire(poll_interval=POLL_S)


def _remove_if_left(part: Path) -> None:
    """Remove a temporary file that nobody is writing: its process died."""
    with contextlib.suppress(Timeout), FileLock(part.with_suffix(".lock")).acquire(timeout=0):
        part.unlink(missing_ok=True)


def _stats(folder: Path, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            yield path, path.stat()
