"""Settings as data: frozen sections, dotted keys, overrides as typed on a command line, errors of one line.

Nothing here knows what the keys mean; every function takes the model that they belong to.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, TypeVar, get_args, get_origin

import pydantic
from pydantic import BaseModel, ConfigDict

from kmtr.types import InputError


class Section(BaseModel):
    """Settings that can't be changed; an unknown key or a wrong type is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


S = TypeVar("S", bound=Section)


def keys(model: type[BaseModel] | BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and pydantic field of every setting, in order."""
    cls = model if isinstance(model, type) else type(model)
    for name, info in cls.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from keys(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def flatten(config: BaseModel) -> dict[str, Any]:
    """Dotted key -> value of every setting."""
    values: dict[str, Any] = {}
    for key, _ in keys(config):
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        values[key] = value
    return values


def plain(config: BaseModel) -> dict[str, Any]:
    """Dotted key -> value as JSON has it."""
    tree = config.model_dump(mode="json")
    values: dict[str, Any] = {}
    for key, _ in keys(config):
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        values[key] = value
    return values


def changed(config: BaseModel) -> dict[str, Any]:
    """`plain` of the settings that differ from their defaults."""
    defaults = plain(type(config)())
    return {key: value for key, value in plain(config).items() if value != defaults[key]}


def override(config: S, changes: dict[str, Any]) -> S:
    """The configuration with dotted keys changed; values may be strings as typed on a command line.

    A setting of type dict has a key for each of its own: ``section.setting.KEY``.

    Raises:
        InputError: an unknown key (names the nearest), a wrong type or an impossible combination.
    """
    known = dict(keys(config))
    tree = config.model_dump()
    for key, value in changes.items():
        if field := next((name for name, info in known.items() if _is_dict(info) and key.startswith(f"{name}.")), ""):
            node = tree
            for part in field.split("."):
                node = node[part]
            node[key.removeprefix(f"{field}.")] = value
            continue
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown key {key!r}; the nearest one is {near!r} (settings of a command: --help)")
        node = tree
        *parents, leaf = key.split(".")
        for part in parents:
            node = node[part]
        node[leaf] = _read(key, known[key], value) if isinstance(value, str) else value
    try:
        return type(config).model_validate(tree)
    except pydantic.ValidationError as error:
        raise InputError(_one_line(type(config), error, changes)) from None


def typed(value: Any) -> str:
    """A value as on a command line."""
    if isinstance(value, dict):
        return " ".join(f"{key}={typed(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(typed, value))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def to_json(config: BaseModel) -> str:
    return config.model_dump_json(indent=2)


def load(model: type[S], text: str) -> S:
    """The settings that `to_json` wrote.

    Raises:
        InputError: the text holds something else.
    """
    try:
        return model.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise InputError(_one_line(model, error, {})) from None


def _read(key: str, info: Any, text: str) -> Any:
    """A value as pydantic takes it, of what was typed."""
    if not text and type(None) in get_args(info.annotation):
        return None
    if _is_dict(info):
        if text:
            raise InputError(f"{key}: expected {key}.KEY=..., got {key}={text}")
        return {}
    return _parse(text) if _is_tuple(info.annotation) else text


def _is_dict(info: Any) -> bool:
    return get_origin(info.annotation) is dict


def _is_tuple(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(get_origin(part) is tuple for part in get_args(annotation))


def _parse(text: str) -> list[str]:
    """``4,8`` or ``(4, 8)`` or ``[4, 8]`` -> its items as strings; pydantic converts them."""
    return [item.strip().strip("'\"") for item in text.strip().strip("()[]").split(",") if item.strip()]


def _one_line(model: type[BaseModel], error: pydantic.ValidationError, changes: dict[str, Any]) -> str:
    first = error.errors()[0]
    parts = [str(p) for p in first["loc"]]
    known = dict(keys(model))
    key = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known), "")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and not key:
        return message
    message = message[0].lower() + message[1:]
    got = changes.get(key, first.get("input"))
    key = key or ".".join(parts) or "configuration"
    return f"{key}: {message}" + ("" if "got" in message else f", got {got!r}")
