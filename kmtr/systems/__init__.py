"""Systems: what is fitted. Adding one is a file and its line here (README.md)."""

from __future__ import annotations

from kmtr.config import RunConfig
from kmtr.systems.base import Features, Imaging, Mapped, Reader, Reading, System, Taught
from kmtr.systems.components import CleanComponents
from kmtr.systems.image import ImageEncoder
from kmtr.systems.kgin import KGIN
from kmtr.systems.kmae import KMAE
from kmtr.systems.kspace import KSpaceEncoder
from kmtr.systems.linet import LINet
from kmtr.systems.resnet import ResNet50
from kmtr.systems.unet import UNet
from kmtr.systems.xf import XFUNet
from kmtr.types import InputError

SYSTEMS: dict[str, System] = {
    "kspace": KSpaceEncoder(),
    "image": ImageEncoder(),
    "unet": UNet(),
    "linet": LINet(),
    "resnet50": ResNet50(),
    "xf": XFUNet(),
    "kgin": KGIN(),
    "kmae": KMAE(),
    "components": CleanComponents(),
}
"""Name (as in `task.system`) -> system."""


def system(name: str) -> System:
    """The system of this name.

    Raises:
        InputError: there is none.
    """
    if name not in SYSTEMS:
        raise InputError(f"task.system: expected one of {', '.join(SYSTEMS)}, got {name!r}")
    return SYSTEMS[name]


MOST_IMAGES = 1024


def at_once(config: RunConfig, subjects: int) -> int:
    """Subjects that are scored at once, at most as many as given: a system with maps keeps, where nothing is left out,
    those of all their slices and frames in memory.
    """
    if not isinstance(system(config.task.system), Mapped):
        return subjects
    return max(1, min(subjects, MOST_IMAGES // (config.data.slices * config.data.frames)))


def input_of(config: RunConfig) -> str:
    """Name of what the run's system sees of a subject.

    Raises:
        InputError: it does not take what `task.input` says.
    """
    able = system(config.task.system).inputs
    if config.task.input and config.task.input not in able:
        raise InputError(
            f"task.input: expected {' or '.join(able)}, which task.system={config.task.system} takes, got "
            f"{config.task.input!r}"
        )
    return config.task.input or able[0]


__all__ = [
    "SYSTEMS",
    "Features",
    "Imaging",
    "Mapped",
    "Reader",
    "Reading",
    "System",
    "Taught",
    "at_once",
    "input_of",
    "system",
]
