"""Tasks: what is learnt on systems, and the stages that train weighted sets of them (README.md)."""

from kmtr.tasks.base import Inputs, Step, Task
from kmtr.tasks.model import Model
from kmtr.tasks.prepare import Preparer
from kmtr.tasks.registry import TASKS, tasks_of
from kmtr.tasks.stages import STAGES, Stage, stage_of, stages_of
from kmtr.tasks.step import Engine, accumulate

__all__ = [
    "STAGES",
    "TASKS",
    "Engine",
    "Inputs",
    "Model",
    "Preparer",
    "Stage",
    "Step",
    "Task",
    "accumulate",
    "stage_of",
    "stages_of",
    "tasks_of",
]
