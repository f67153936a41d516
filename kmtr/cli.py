"""Shared by all commands: arguments, one-line errors, exit status, and the last line on stdout (JSON)."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kmtr.config import RunConfig, flatten, parse
from kmtr.config.help import help_text
from kmtr.config.recipes import RECIPES
from kmtr.config.submitted import PATHS, places, refuse_relative_under_submit
from kmtr.ray_start import ray_logs, start_ray, stop_on_sigterm
from kmtr.types import InputError, KmtrError, first_line

__all__ = ["main", "recipe_config", "start_ray"]


def main(
    usage: str, run: Callable[[list[str]], dict[str, Any]], failed: Callable[[dict[str, Any]], bool] | None = None
) -> None:
    """Run a command: `run(words)` returns what the last line on stdout says.

    Args:
        failed: True for a result that, told in full, is nevertheless a failure (exit status 1).

    Exit status 0; 1 (failed) and 2 (bad input) with one line on stderr and no traceback.
    """
    command, words = Path(sys.argv[0]).stem, sys.argv[1:]
    if "-h" in words or "--help" in words:
        with contextlib.suppress(BrokenPipeError):  # as under `| head`
            print(help_text(usage, command, words), flush=True)
        return
    print(f"{command}: starting", flush=True)  # what it imports takes seconds
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("kmtr").setLevel(logging.WARNING)  # our own warnings are one line each, on stderr
    stop_on_sigterm()
    try:
        result = run(words)
    except InputError as error:
        _fail(str(error), 2)
    except KmtrError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(of_the_system(error, paths_of(words)), 1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from what is done", 1)
    logs = ray_logs()
    if logs:
        print(f"logs of all workers: {logs}")
    print(json.dumps(result), flush=True)
    if failed is not None and failed(result):
        sys.exit(1)


def _fail(line: str, status: int) -> None:
    print(f"error: {' '.join(line.split())}", file=sys.stderr, flush=True)
    logs = ray_logs()
    if status == 1 and logs:
        print(f"logs of all workers: {logs}", file=sys.stderr, flush=True)
    sys.exit(status)


def paths_of(words: Sequence[str]) -> list[tuple[str, str]]:
    """(key, path), absolute, of the keys in `PATHS` that a command as it is typed has, given or by its recipe."""
    recipe = next((RECIPES[word] for word in words if word in RECIPES), RunConfig)
    values = flatten(recipe()) | dict(word.split("=", 1) for word in words if "=" in word)
    found = [(key, path) for key in PATHS for path in places(key, values[key])]
    return [(key, os.path.abspath(os.path.expanduser(path))) for key, path in found if path and "://" not in path]


def of_the_system(error: OSError, paths: Sequence[tuple[str, str]]) -> str:
    """One line about a file that could not be read or written: the key whose path it belongs to, and what happened.

    Args:
        paths: (key, absolute path).
    """
    said = first_line(error)
    reason = os.strerror(error.errno).lower() if error.errno else said
    quoted = re.search(r"'(/[^']*)'", said)  # Arrow's errors have no file name
    where = os.path.abspath(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else ""
    where = where or (quoted[1] if quoted else "")
    within = [(key, path) for key, path in paths if where and _related(where, path)]
    if not where and error.errno == errno.ENOSPC:
        within = [(key, path) for key, path in paths if _room(path) < MIN_ROOM]
    if not within:
        return f"{where or type(error).__name__}: {reason}"
    key, path = max(within, key=lambda one: len(one[1]))
    return f"{key}: {path} can not be used: {reason}; choose another place by {key}=..."


def _related(where: str, path: str) -> bool:
    """True if a file lies in the folder of a setting, or is a folder above it (not the root of all)."""
    return Path(where).is_relative_to(path) or (where != "/" and Path(path).is_relative_to(where))


MIN_ROOM = 1 << 20
"""Bytes; a disk with less is full."""


def _room(path: str) -> int:
    """Free bytes of the disk that a path is or would be on."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def recipe_config(words: Sequence[str], usage: str) -> RunConfig:
    """The configuration of ``RECIPE key=value ...``."""
    if not words or "=" in words[0]:
        raise InputError(f"expected RECIPE first, one of {', '.join(RECIPES)}; usage: {usage.strip().splitlines()[0]}")
    config = parse(words[1:], words[0], RECIPES)
    refuse_relative_under_submit(config)
    return config
