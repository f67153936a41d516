"""A command ends with one line and a status, whatever happens to its files."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kmtr import cli
from kmtr.data.dataset import storage


def ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], raised: BaseException
) -> tuple[int, str]:
    """Status and the line on stderr of a command that raises."""

    def run(_: list[str]) -> dict[str, Any]:
        raise raised

    monkeypatch.setattr(sys, "argv", ["job", *words])
    monkeypatch.setattr(cli, "ray_logs", lambda: "")  # other tests of this process may use Ray
    with pytest.raises(SystemExit) as end:
        cli.main("usage", run)
    line, *more = capsys.readouterr().err.splitlines()
    assert not more
    return int(str(end.value.code)), line


def system(number: int, path: Path | None = None) -> OSError:
    return OSError(number, os.strerror(number), *([str(path)] if path else []))


@pytest.mark.parametrize("key", ["data.root", "storage.root"])
def test_a_file_that_cannot_be_written_names_its_key(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "read only"
    error = system(errno.EROFS, place / "deep" / "file")
    status, line = ended(monkeypatch, capsys, ["labels", "tiny", f"{key}={place}"], error)
    assert status == 1
    assert line == (f"error: {key}: {place} can not be used: read-only file system; choose another place by {key}=...")


def test_a_full_disk_names_the_key_even_without_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_room", lambda path: 0 if path == str(tmp_path / "full") else 1 << 40)
    words = ["tiny", f"storage.root={tmp_path / 'full'}", f"data.root={tmp_path / 'data'}"]
    status, line = ended(monkeypatch, capsys, words, system(errno.ENOSPC))
    assert status == 1
    assert line.startswith(f"error: storage.root: {tmp_path / 'full'} can not be used: no space left on device")


def test_a_recipe_s_own_folder_is_named_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = system(errno.EACCES, Path("runs/tiny/shards").absolute())
    _, line = ended(monkeypatch, capsys, ["tiny"], error)
    assert line.startswith("error: data.root: ")


def test_a_folder_that_can_t_be_made_names_the_key_of_what_is_to_lie_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    root = tmp_path / "file/deep/data"
    with pytest.raises(OSError, match="Not a directory") as error:
        storage.make_folder(*storage.open_root(str(root)))
    _, line = ended(monkeypatch, capsys, ["tiny", f"data.root={root}"], error.value)
    assert line == f"error: data.root: {root} can not be used: not a directory; choose another place by data.root=..."


def test_any_other_file_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, line = ended(monkeypatch, capsys, [], system(errno.ENOENT, Path("/no/such/file")))
    assert line == "error: /no/such/file: no such file or directory"
    _, line = ended(monkeypatch, capsys, [], OSError("two\nlines"))
    assert line == "error: OSError: two"


def test_sigterm_ends_a_command_as_ctrl_c_does() -> None:
    """In the middle of its work, in one line and with status 1."""
    code = (
        "import time; from kmtr.cli import main; main('usage', lambda _: (print('works', flush=True), time.sleep(60)))"
    )
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    while "works" not in running.stdout.readline():
        pass
    running.send_signal(signal.SIGTERM)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 1
    assert told.splitlines() == ["error: interrupted; the same command goes on from what is done"]
