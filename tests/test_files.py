"""A small file is its old content or its whole new one, whatever happens in between, and nothing is left beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kmtr import files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "state.json"
    path.write_text("old")
    return path


def beside(path: Path) -> list[str]:
    return sorted(other.name for other in path.parent.iterdir())


def test_text_and_bytes_replace_what_was_there(path: Path) -> None:
    files.write_atomic(path, "µ")
    assert path.read_bytes() == "µ".encode()
    files.write_atomic(path, b"\0")
    assert path.read_bytes() == b"\0"
    files.write_atomic(path.with_name("new"), "new")
    assert beside(path) == ["new", "state.json"]


def test_an_error_while_writing_leaves_the_old_file_alone(path: Path) -> None:
    def half_written() -> None:
        with files.replacing(path) as temporary:
            temporary.write_text("ha")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        half_written()
    assert path.read_text() == "old"
    assert beside(path) == ["state.json"]


def test_a_full_disk_at_the_sync_leaves_the_old_file_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert beside(path) == ["state.json"]


def test_a_process_killed_between_writing_and_replacing_leaves_the_old_file(path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from kmtr import files
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomic(Path(sys.argv[1]), "new")
"""
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    name, left = sorted(beside(path), key=len)
    assert name == "state.json"
    assert left.startswith("state.json.")
    assert left.endswith(".tmp")
    files.write_atomic(path, "new")
    assert path.read_text() == "new"
