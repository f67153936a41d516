"""A check: what it found, in one line."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kmtr.types import KmtrError


@dataclass(frozen=True)
class Check:
    """Result of a check: one line, and with warn or FAIL what to do."""

    name: str
    state: Literal["ok", "warn", "FAIL"]
    found: str


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """A refusal of the project's own code is a check that failed."""
    try:
        return check()
    except KmtrError as error:
        return Check(name, "FAIL", str(error))


def summary(done: Sequence[Check]) -> dict[str, Any]:
    """Results of all checks, for the last line on stdout."""
    return {
        "checks": {check.name: check.state for check in done},
        "failed": [check.name for check in done if check.state == "FAIL"],
    }


def lines(*command: str) -> list[str] | None:
    """Output of a command; None: it does not exist or failed."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [line.strip() for line in ran.stdout.splitlines() if line.strip()]


def first_line(*command: str) -> str | None:
    """First line of a command's output; None: see `lines`."""
    found = lines(*command)
    return found[0] if found else None
