"""Files open for reading at any place: local ones and those of object stores, and many reads at a time."""

from __future__ import annotations

import os
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from kmtr.data.dataset.storage import check_bucket, patiently


class File(ABC):
    """A file open for reading at any place, by any number of threads at once. Close it when no thread reads any more.

    Attributes:
        name: for errors.
        size: bytes.
    """

    name: str
    size: int

    @abstractmethod
    def read_into(self, offset: int, *targets: Any) -> None:
        """Fill the targets (writable, contiguous), one after the other, with the bytes from `offset` on, by one read
        and without Python's lock.

        Raises:
            EOFError: the file ends before.
        """

    @abstractmethod
    def read_at(self, offset: int, nbytes: int) -> pa.Buffer:
        """The `nbytes` bytes from `offset` on.

        Raises:
            EOFError: the file ends before.
        """

    @abstractmethod
    def native(self) -> pa.NativeFile:
        """The same bytes as pyarrow wants them, e.g. for footers; usable until `close`."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ends(self, offset: int, nbytes: int) -> EOFError:
        return EOFError(
            f"{self.name}: expected {nbytes} bytes at {offset}, got the end of the file at {self.size}: truncated or "
            "changed; restore or rewrite it"
        )


class LocalFile(File):
    def __init__(self, path: str | Path, name: str, released: Callable[[], None] = lambda: None):
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, _release, self._number, released)
        self.name, self.size = name, os.fstat(self._number).st_size

    def read_into(self, offset: int, *targets: Any) -> None:
        rest = [view for target in targets if (view := _bytes(target))]
        start, nbytes = offset, sum(map(len, rest))
        while rest:
            got = os.preadv(self._number, rest, offset)  # at most 2 GiB at a time
            if not got:
                raise self._ends(start, nbytes)
            offset += got
            while rest and got >= len(rest[0]):
                got -= len(rest.pop(0))
            if rest:
                rest[0] = rest[0][got:]

    def read_at(self, offset: int, nbytes: int) -> pa.Buffer:
        if offset + nbytes > self.size:
            raise self._ends(offset, nbytes)
        buffer = pa.allocate_buffer(nbytes)
        self.read_into(offset, buffer)
        return buffer

    def native(self) -> pa.NativeFile:
        return pa.OSFile(f"/dev/fd/{self._number}", "rb")  # this very file, whatever its path names by now

    def touch(self) -> None:
        """Set the time of last use to now, finer than the system's clock ticks."""
        now = time.time_ns()
        os.utime(self._number, ns=(now, now))

    def close(self) -> None:
        self._close()


def _release(number: int, released: Callable[[], None]) -> None:
    os.close(number)
    released()


class RemoteFile(File):
    def __init__(self, store: fs.FileSystem, path: str, name: str):
        try:
            self._file = patiently(partial(store.open_input_file, path), path)
            self.size = patiently(self._file.size, path)
        except FileNotFoundError:
            check_bucket(store, path)
            raise
        self.name, self._path = name, path

    def read_into(self, offset: int, *targets: Any) -> None:
        views = [view for target in targets if (view := _bytes(target))]
        content = self.read_at(offset, sum(map(len, views)))  # Arrow's memory: no call of its reads into ours
        start = 0
        for view in views:
            pa.FixedSizeBufferWriter(pa.py_buffer(view)).write(content.slice(start, len(view)))
            start += len(view)

    def read_at(self, offset: int, nbytes: int) -> pa.Buffer:
        if offset + nbytes > self.size:
            raise self._ends(offset, nbytes)
        content = patiently(partial(self._file.read_at, nbytes, offset), self._path)
        if len(content) < nbytes:
            raise self._ends(offset, nbytes)
        return pa.py_buffer(content)

    def native(self) -> pa.NativeFile:
        return self._file

    def close(self) -> None:
        self._file.close()


def _bytes(target: Any) -> memoryview:
    view = memoryview(target)
    return view.cast("B") if view.nbytes else memoryview(b"")


def read_many(ranges: Iterable[tuple[File, int, Any]], threads: int = 8) -> None:
    """Fill many targets, several reads in flight: (file, offset, target) as in `File.read_into`; see `run_many`."""
    run_many([partial(file.read_into, offset, target) for file, offset, target in ranges], threads)


def run_many(calls: Iterable[Callable[[], object]], threads: int) -> None:
    """Make all calls, `threads` of them at a time; on return, and also after an error, none is under way any more."""
    if threads == 1:
        for call in calls:
            call()
        return
    running = [_pool(threads).submit(call) for call in calls]
    try:
        for read in running:
            read.result()
    finally:
        for read in running:
            read.cancel()
        wait(running)


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "storage")
