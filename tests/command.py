"""A configuration as somebody would type it."""

from __future__ import annotations

from kmtr.config import RunConfig, flatten, typed
from kmtr.config.recipes import tiny


def words(config: RunConfig) -> list[str]:
    """``tiny key=value ...`` of all in which it differs from the recipe."""
    recipe, values = flatten(tiny()), flatten(config)
    given = {key: value for key, value in values.items() if value != recipe[key]}
    many = {key: value for key, value in given.items() if isinstance(value, dict)}
    given = {key: value for key, value in given.items() if key not in many}
    given |= {f"{key}.{each}": value for key, found in many.items() for each, value in found.items()}
    return ["tiny", *(f"{key}={typed(value)}" for key, value in given.items())]
