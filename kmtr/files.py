"""Small files written whole or not at all."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_name(path: str) -> str:
    """A path beside `path` for what is not whole yet: nobody else's, also on a file system that several nodes share."""
    return f"{path}.{uuid.uuid4().hex[:12]}.tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, written in the block, that takes the place of `path` at its end.

    After a crash at any moment, also of the machine, `path` is the old file or the whole new one. An error in the block
    leaves the old file and no temporary one. The names of temporary files end with ``.tmp``.
    """
    temporary = Path(temporary_name(str(path)))
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a local file, the whole of it or nothing, as `replacing` does; text as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Inside, no other process or thread is in such a block of the same folder; waits for one that is. For changes that
    take moments; a dead process leaves nothing behind. (What a process owns for long: `kmtr.owner`.)
    """
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, last through a power failure."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
