"""Local paths and object-store URIs behind one small interface (pyarrow.fs)."""

from __future__ import annotations

import os
from pathlib import Path

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


def exists(store: fs.FileSystem, path: str) -> bool:
    return store.get_file_info(path).type == fs.FileType.File
