"""Which tasks there are, and which of them a run has."""

from __future__ import annotations

from kmtr.config import RunConfig
from kmtr.tasks.align import Align
from kmtr.tasks.base import Task
from kmtr.tasks.masked import Masked, MaskedImages

TASKS: dict[str, type[Task]] = {task.name: task for task in (Masked, MaskedImages, Align)}
"""Name -> task. Adding one is a file and its line here."""


def tasks_of(config: RunConfig) -> dict[str, Task]:
    """The tasks of a run's model, those of a stage that it leaves out too: all stages have the same weights."""
    names = ["masked"]
    names += ["masked_images"] if config.masked.image_weight else []
    names += ["align"] if config.align.steps else []
    return {name: TASKS[name](config) for name in names}
