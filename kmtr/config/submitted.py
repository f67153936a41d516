"""Paths of a command that `ray job submit` runs in a throwaway copy of the project.

python -m kmtr.config.submitted JOB [WORD ...]      the command as `make submit` submits it, its words ended by NUL
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kmtr.config.core import changed, flatten, typed
from kmtr.config.recipes import RECIPES, named
from kmtr.config.used import settings_of
from kmtr.config.whole import RunConfig
from kmtr.types import InputError, redact

PATHS = (
    "data.root",
    "data.more",
    "data.cache",
    "storage.root",
    "shards.split_from",
    "ingest.labels",
    "sampling.file",
    "evaluate.encoder",
    "task.encoder",
    "run.begin",
    "bench.folder",
    "predict.out",
    "export.out",
    "study.rows",
)
"""Keys of files and folders that a command reads or writes."""

ALWAYS = {"data.root", "storage.root"}
"""Those that must be absolute on a cluster in every command, given or by its recipe."""

PLACES = {"ingest": 1, "predict": 0}
"""Command -> number of the word behind it that is a path and no setting."""

TRACKING, SQLITE = "tracking.uri", "sqlite:///"


def relative(place: str) -> bool:
    """True for a path, or SQLite's, that means another file in another working directory."""
    path = place.removeprefix(SQLITE)
    named = path in ("", "none") or "://" in path or path.startswith("models:")
    return not named and not os.path.isabs(path)


def absolute(place: str) -> str:
    """A path as it must be in another working directory; what is none stays as it is."""
    if not relative(place):
        return place
    path = place.removeprefix(SQLITE)
    return place.removesuffix(path) + os.path.abspath(os.path.expanduser(path))


def places(key: str, value: Any) -> list[str]:
    """Paths that a setting names, as typed or as the configuration has it."""
    text = typed(value)
    return text.split(",") if isinstance(flatten(RunConfig())[key], tuple) else [text]


def submitted(job: Sequence[str]) -> list[str]:
    """Words of a command as a cluster runs them: paths absolute, and those that were left to recipe or environment
    given.

    Args:
        job: as typed, ``pretrain tiny key=value ...``.

    Raises:
        InputError: no such command.
    """
    command, *words = job or [""]
    script = next((path for path in (f"jobs/{command}.py", f"tune/{command}.py") if Path(path).is_file()), None)
    if script is None or not command.isidentifier():
        raise InputError(
            f'submit: expected JOB="pretrain tiny ..." naming a file of jobs/ or tune/, got "{shlex.join(job)}"'
        )
    there = [_there(word, number == PLACES.get(command)) for number, word in enumerate(words)]
    return ["python", script, *there, *_left_out(command, words)]


def _there(word: str, place: bool) -> str:
    key, equals, value = word.partition("=")
    if key in (*PATHS, TRACKING) and equals:
        return _setting(key, value)
    return absolute(word) if place and not equals else word


def _setting(key: str, value: Any) -> str:
    return f"{key}={','.join(map(absolute, places(key, value)))}"


def _left_out(command: str, words: Sequence[str]) -> Iterator[str]:
    """Settings with a path that nobody gave, of those that the command uses or that may never be relative there: the
    recipe's, and MLflow's store.
    """
    recipe = named(command, words)
    given = dict(word.split("=", 1) for word in words if "=" in word)
    values = flatten(RECIPES[recipe]() if recipe else RunConfig()) | given
    values[TRACKING] = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{values['storage.root']}/mlflow.db"
    used = ALWAYS | {key for key, _ in settings_of(command)}
    for key in (*PATHS, TRACKING):
        if key in used - given.keys() and values[key]:
            yield _setting(key, values[key])


def under_submit() -> bool:
    """True in a command that `ray job submit` started."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def refuse_relative_under_submit(config: RunConfig) -> None:
    """Refuse relative paths under `ray job submit`: they would be lost with the working directory.

    Raises:
        InputError: a path is relative; says which key.
    """
    if not under_submit():
        return
    given = flatten(config) | {TRACKING: config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")}
    checked = [key for key in PATHS if key in ALWAYS | changed(config).keys()]
    for key in (*checked, TRACKING):
        for place in places(key, given[key]):
            refuse_relative(key, place)


def refuse_relative(what: str, place: str) -> None:
    """Refuse a relative path of a command that `ray job submit` started. Raises InputError."""
    if under_submit() and relative(place):
        raise InputError(
            f"{what}: expected an absolute path under ray job submit, since the working directory is a throwaway "
            f"upload, got {place!r}; use make submit, or give it as /absolute/path"
        )


def main() -> None:
    """Print the command to be submitted, each word ended by NUL, and one line of it on stderr."""
    try:
        words = submitted(sys.argv[1:])
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    sys.stderr.write(f"submit: {redact(shlex.join(words))}\n")
    sys.stdout.write("".join(f"{word}\0" for word in words))


if __name__ == "__main__":
    main()
