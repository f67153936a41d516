"""Text of ``COMMAND [RECIPE] --help``: what the command does, and its settings with the recipe's values."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from kmtr.config.commands import Confirm
from kmtr.config.core import flatten, typed
from kmtr.config.recipes import RECIPES, WITHOUT, named
from kmtr.config.run import Workers
from kmtr.config.used import settings_of
from kmtr.config.whole import RunConfig

WIDTH = 100
"""Columns of a line at most."""

_KIND_COLUMN, _TEXT_COLUMN = 44, 6

_KINDS = {bool: "true | false", int: "integer", float: "number", str: "text", Workers: "integer or range, as 2..8"}
_KINDS |= {Confirm: "trials x seeds, as 2x3"}
_MANY = {"integer": "integers", "number": "numbers", "text": "names"}

_UNITS = {"gib": "GiB", "s": "s", "seconds": "s", "deg": "degrees", "db": "dB"}
"""Last word of a key -> unit of its value."""

EXIT_STATUS = """\
exit status:
  0  done; the last line on stdout is JSON
  1  failed: one line on stderr
  2  bad input: one line on stderr says what was expected, what came and what to do"""


def help_text(usage: str, command: str, words: Sequence[str]) -> str:
    """Usage, recipes, and the settings of one command, grouped by section; no line is wider than `WIDTH`.

    Args:
        usage: docstring of the command, with its examples.
        words: as typed; a recipe among them is the one whose values are shown.
    """
    recipe = named(command, words)
    values = flatten(RECIPES[recipe]() if recipe else RunConfig())
    lines = usage.strip().splitlines()
    if command not in WITHOUT:
        lines += ["", "recipes:", *(line for name in RECIPES for line in _recipe(name))]
    shown = f"the values of recipe {recipe}" if recipe else "their defaults (no recipe is given)"
    lines += ["", *EXIT_STATUS.splitlines(), "", f"settings of {command}, with {shown}"]
    lines += ["(those of other commands are accepted too and not read):"]
    for section, found in groupby(settings_of(command), lambda setting: setting[0].rpartition(".")[0]):
        lines += ["", section or "general", *(line for key, info in found for line in _entry(key, info, values[key]))]
    return "\n".join(lines)


def _recipe(name: str) -> list[str]:
    text = " ".join((RECIPES[name].__doc__ or "").replace("``", "").split())
    return textwrap.wrap(f"{name:<6}  {text}", WIDTH, initial_indent="  ", subsequent_indent=" " * 10)


def _entry(key: str, info: Any, value: Any) -> Iterator[str]:
    """Lines of one setting: as it is typed, beside what it may be; below, what it means."""
    shown = f"{key}.KEY=" if get_origin(info.annotation) is dict else f"{key}={typed(value)}"
    yield from _beside(f"  {shown}", kind(key, info))
    indent = " " * _TEXT_COLUMN
    yield from textwrap.wrap(info.description or "", WIDTH, initial_indent=indent, subsequent_indent=indent)


def _beside(left: str, right: str) -> list[str]:
    """`left`, and `right` from `_KIND_COLUMN` on; on lines of its own where `left` leaves no room."""
    wrapped = textwrap.wrap(right, WIDTH - _KIND_COLUMN, break_on_hyphens=False)
    if len(left) < _KIND_COLUMN:
        first, *others = wrapped
        return [f"{left:<{_KIND_COLUMN}}{first}", *(" " * _KIND_COLUMN + line for line in others)]
    return [left, *(" " * _KIND_COLUMN + line for line in wrapped)]


def kind(key: str, info: Any) -> str:
    """Type of a setting with its choices or bounds and its unit, as ``integer from 1``."""
    text = _kind(info.annotation) + "".join(_bound(info.annotation, limit) for limit in info.metadata)
    unit = _UNITS.get(key.rpartition(".")[2].rpartition("_")[2], "")
    return f"{text}, {unit}" if unit else text


def _kind(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (Union, UnionType):
        (some,) = [part for part in parts if part is not type(None)]
        return f"{_kind(some)}, or empty"
    if origin is dict:
        return f"{_kind(parts[1])}, for each key"
    if origin is tuple:
        one = _kind(parts[0])
        return f"list of {_MANY.get(one, one)}" if parts[-1] is Ellipsis else f"{len(parts)} {_MANY.get(one, one)}"
    return _KINDS[annotation]


def _bound(annotation: Any, limit: Any) -> str:
    """A bound in words, for integers one that is itself allowed; empty: it is no bound."""
    for name, word, closed, step in (
        ("ge", "from", "from", 0),
        ("gt", "above", "from", 1),
        ("le", "to", "to", 0),
        ("lt", "below", "to", -1),
    ):
        if (value := getattr(limit, name, None)) is not None:
            return f" {closed} {value + step}" if annotation is int else f" {word} {value:g}"
    return ""
