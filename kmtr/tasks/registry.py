"""Which tasks there are, and which of them a run has."""

from __future__ import annotations

from kmtr.config import RunConfig
from kmtr.tasks.align import Align
from kmtr.tasks.base import Task
from kmtr.tasks.diseases import Diseases
from kmtr.tasks.masked import Masked, MaskedImages
from kmtr.tasks.phenotypes import Phenotypes
from kmtr.tasks.reconstruction import Reconstruction
from kmtr.tasks.segmentation import Segmentation
from kmtr.types import InputError

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Masked, MaskedImages, Align, Phenotypes, Diseases, Segmentation, Reconstruction)
}
"""Name -> task. Adding one is a file and its line here."""


def tasks_of(config: RunConfig) -> dict[str, Task]:
    """The tasks of a run's model, those of a stage that it leaves out too: all stages have the same weights.

    Raises:
        InputError: `task.tasks` names one that there is not.
    """
    names = list(config.task.tasks)
    if config.stage != "task":
        names = ["masked"]
        names += ["masked_images"] if config.masked.image_weight else []
        names += ["align"] if config.align.steps else []
    if unknown := [name for name in names if name not in TASKS]:
        raise InputError(f"task.tasks: expected some of {', '.join(TASKS)}, got {unknown[0]!r}")
    return {name: TASKS[name](config) for name in names}
