"""Systems: what is fitted. Adding one is a file and its line here (README.md)."""

from __future__ import annotations

from kmtr.systems.base import Features, Reader, Reading, System
from kmtr.systems.components import CleanComponents
from kmtr.systems.image import ImageEncoder
from kmtr.systems.kspace import KSpaceEncoder
from kmtr.types import InputError

SYSTEMS: dict[str, System] = {"kspace": KSpaceEncoder(), "image": ImageEncoder(), "components": CleanComponents()}
"""Name (as in `task.system`) -> system."""


def system(name: str) -> System:
    """The system of this name.

    Raises:
        InputError: there is none.
    """
    if name not in SYSTEMS:
        raise InputError(f"task.system: expected one of {', '.join(SYSTEMS)}, got {name!r}")
    return SYSTEMS[name]


__all__ = ["SYSTEMS", "Features", "Reader", "Reading", "System", "system"]
