"""What is said of an error in one line: never nothing, never an empty line, never a traceback."""

from __future__ import annotations

import errno
import os

import pytest

from kmtr.data.dataset.storage import reason
from kmtr.types import first_line, last_line, with_kind


@pytest.mark.parametrize(
    ("error", "first", "last", "kind"),
    [
        (ValueError("one line"), "one line", "one line", "ValueError: one line"),
        (ValueError(""), "ValueError", "ValueError", "ValueError"),
        (ValueError(" \n\n"), "ValueError", "ValueError", "ValueError"),
        (RuntimeError("\n  reason\nadvice\n\n"), "reason", "advice", "RuntimeError: reason"),
        (KeyError("x"), "'x'", "'x'", "KeyError: 'x'"),
    ],
)
def test_an_error_is_one_line(error: Exception, first: str, last: str, kind: str) -> None:
    assert (first_line(error), last_line(error), with_kind(error)) == (first, last, kind)


def test_the_text_of_an_error_that_could_not_travel_has_a_last_line_too() -> None:
    assert last_line("Traceback (most recent call last):\n  File ...\nValueError: no\n") == "ValueError: no"


def test_a_reason_is_without_the_path_that_the_system_says() -> None:
    assert reason(OSError(errno.EIO, os.strerror(errno.EIO), "/data/Jane_Doe")) == os.strerror(errno.EIO)
    assert reason(OSError("footer\nmore")) == "footer"
