"""Progress: plain lines where there is no terminal, a bar below the lines on one."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from kmtr.progress import Bar, Screen

ROOT = Path(__file__).parents[1]


def on_a_terminal(code: str) -> str:
    """What a program writes to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    done = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stdin=subprocess.DEVNULL, cwd=ROOT)
    os.close(theirs)
    said = b""
    try:
        while block := os.read(ours, 1 << 16):
            said += block
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert done.wait() == 0
    return said.decode()


def test_without_a_terminal_every_tenth_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("verify: shards")
    for done in range(1, 26):
        bar(done, 25)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11, "the first, and each tenth"
    assert lines[0].startswith("  verify: shards 1/25  ")
    assert lines[-1].startswith("  verify: shards 25/25  ")
    assert all(line.endswith("/s") for line in lines)


def test_without_a_terminal_a_screen_is_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(4)
    screen.move(1, "loss 3")
    screen.line("a line")
    screen.close()
    assert capsys.readouterr().out == "a line\n"


def test_on_a_terminal_there_is_one_bar_that_stays_when_done() -> None:
    said = on_a_terminal("from kmtr.progress import Bar\nbar = Bar('subjects')\nfor n in range(5): bar(n + 1, 5)")
    last = said.rstrip().rpartition("\r")[2]
    assert "subjects: 100%" in last
    assert "5/5" in last
    assert said.count("\n") == 1


def test_on_a_terminal_lines_stand_above_the_bar_which_goes() -> None:
    code = (
        "from kmtr.progress import Screen\n"
        "s = Screen(4); s.line('first'); s.move(2, 'loss 3'); s.line('second'); s.close(); print('end')"
    )
    said = on_a_terminal(code)
    assert "2/4" in said
    assert "loss 3" in said
    shown = [line.rpartition("\r")[2] for line in said.replace("\r\n", "\n").split("\n")[:-1]]
    assert shown == ["first", "second", "end"]
