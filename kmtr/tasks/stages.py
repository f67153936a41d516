"""Stages: weighted sets of tasks, trained one after the other; what each trains and what stays frozen is said here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kmtr.config import RunConfig
from kmtr.config.run import Align, Masked, Task
from kmtr.tasks.registry import TASKS


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        name: before the names of what it logs.
        tasks: name -> weight of its loss, in the order of `registry.TASKS`: a system's passes are made in it, and their
            gradients added up, so that another order gives other last bits.
        settings: steps, learning rate and warm-up.
        frozen: systems that do not learn in it.
        fresh: tasks whose heads begin with it -> at how many times the rate these learn; for the first `head_steps`
            steps they alone, without warm-up, since until they say something their gradient would only disturb the
            rest.
    """

    name: str
    tasks: Mapping[str, float]
    settings: Masked | Align | Task
    frozen: frozenset[str] = frozenset()
    fresh: Mapping[str, float] = field(default_factory=dict)
    head_steps: int = 0


def masked(config: RunConfig) -> Stage:
    """Masked pretraining of k-space, and with `masked.image_weight` of images beside it."""
    weights = {"masked": 1.0, "masked_images": config.masked.image_weight}
    return Stage("masked", {name: weight for name, weight in weights.items() if weight}, config.masked)


def align(config: RunConfig) -> Stage:
    """Alignment, with the loss of masked pretraining kept. Its teacher is frozen unless it is to learn as well, which
    then keeps its own masked loss.
    """
    settings = config.align
    learns = settings.train_image_encoder
    weights = {
        "masked": settings.masked_weight,
        "masked_images": settings.masked_weight * config.masked.image_weight * learns,
        "align": 1.0,
    }
    frozen = frozenset() if learns else frozenset({"image"})
    return Stage(
        "align",
        {name: weight for name, weight in weights.items() if weight},
        settings,
        frozen,
        {"align": settings.head_factor},
        settings.head_steps,
    )


def task(config: RunConfig) -> Stage:
    """Training of `task.tasks` on labels, each loss with the same weight; heads are new."""
    settings = config.task
    weights = dict.fromkeys(settings.tasks, 1.0)
    frozen = frozenset({settings.system}) if settings.frozen else frozenset()
    fresh = {name: TASKS[name](config).head_factor for name in settings.tasks}
    return Stage("task", weights, settings, frozen, fresh)


STAGES: dict[str, Callable[[RunConfig], Stage]] = {"masked": masked, "align": align, "task": task}


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run, in their order."""
    steps = {"masked": config.masked_steps, "align": config.align_steps, "task": config.task_steps}
    return tuple(make(config) for name, make in STAGES.items() if steps[name])


def stage_of(config: RunConfig, step: int) -> tuple[Stage, int]:
    """Stage of a step of the run, and the step within it."""
    first = 0
    for stage in stages_of(config):
        if step < first + stage.settings.steps:
            return stage, step - first
        first += stage.settings.steps
    raise ValueError(f"step: expected less than {first}, got {step}")
