"""Local paths and object-store URIs behind one small interface (pyarrow.fs)."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
from pyarrow import fs

from kmtr.types import InputError


def absolute(root: str) -> str:
    """`root` as it must be before any worker starts, since Ray changes the workers' directory; URIs stay
    as they are.
    """
    return root if "://" in root else str(Path(root).expanduser().absolute())


def open_root(root: str) -> tuple[fs.FileSystem, str]:
    """File system and base path of a local path or URI.

    Raises:
        InputError: the URI's scheme is unknown or its store can't be reached.
    """
    if "://" not in root:
        return fs.LocalFileSystem(), absolute(root)
    try:
        return fs.FileSystem.from_uri(root)
    except (OSError, ValueError) as error:
        raise InputError(f"{root}: expected a path or an object-store URI, got {str(error).splitlines()[0]}") from None


def read_bytes(store: fs.FileSystem, path: str) -> bytes:
    with store.open_input_stream(path) as stream:
        return stream.read()


def write_atomic(store: fs.FileSystem, path: str, content: bytes) -> None:
    """The whole file or none of it: written under a temporary name, then renamed."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with store.open_output_stream(temporary) as stream:
        stream.write(content)
    store.move(temporary, path)


@contextmanager
def writing(root: str, name: str) -> Iterator[BinaryIO]:
    """A local file to write that becomes ``root/name`` at the end of the block: the whole of it, or nothing.

    What goes to an object store is written locally first (TMPDIR) and then uploaded.
    """
    store, base = open_root(root)
    target = f"{base}/{name}"
    store.create_dir(target.rpartition("/")[0], recursive=True)
    local = isinstance(store, fs.LocalFileSystem)
    with tempfile.TemporaryDirectory() if not local else nullcontext("") as folder:
        temporary = f"{target}.{os.getpid()}.tmp" if local else f"{folder}/file"
        try:
            with open(temporary, "wb") as file:
                yield file
            if local:
                os.replace(temporary, target)
            else:
                with open(temporary, "rb") as source, store.open_output_stream(target) as sink:
                    shutil.copyfileobj(source, sink, 16 << 20)
        finally:
            with suppress(FileNotFoundError):
                os.remove(temporary)


def exists(store: fs.FileSystem, path: str) -> bool:
    return store.get_file_info(path).type == fs.FileType.File


class File:
    """A file of a dataset open for reads at any place, from several threads.

    Attributes:
        size: in bytes.
    """

    def __init__(self, root: str, name: str):
        store, base = open_root(root)
        self._native = store.open_input_file(f"{base}/{name}")
        self.size = self._native.size()
        self._descriptor: int | None = None
        if isinstance(store, fs.LocalFileSystem):
            self._descriptor = os.open(f"{base}/{name}", os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)  # when the last reader lets go of it

    def native(self) -> pa.NativeFile:
        """For pyarrow's own readers."""
        return self._native

    def read_into(self, offset: int, *parts: memoryview) -> None:
        """Fill the parts, one after the other, with what is at `offset`.

        Raises:
            EOFError: the file ends before.
        """
        wanted = sum(map(len, parts))
        if self._descriptor is None:
            content = memoryview(self._native.read_at(wanted, offset))
            if len(content) == wanted:
                for part in parts:
                    part[:] = content[: len(part)]
                    content = content[len(part) :]
                return
            wanted = len(content)
        else:
            left = list(parts)
            while left:
                got = os.preadv(self._descriptor, left, offset)
                if not got:
                    break
                offset += got
                while left and got >= len(left[0]):
                    got -= len(left.pop(0))
                if left:
                    left[0] = left[0][got:]
            else:
                return
        raise EOFError(f"the file ends {self.size} bytes after its beginning, within what was to be read")
