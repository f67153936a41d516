"""MONAI's networks, imported where one is built: it is an extra, and takes seconds to import."""

from __future__ import annotations

from types import ModuleType

from kmtr.types import InputError


def networks(name: str) -> ModuleType:
    """`monai.networks.nets`.

    Args:
        name: of the system that needs it.

    Raises:
        InputError: MONAI is not installed.
    """
    try:
        from monai.networks import nets
    except ImportError:
        raise InputError(
            f"task.system: {name} needs MONAI, which is not installed here; pip install 'kmtr[baselines]'"
        ) from None
    return nets
