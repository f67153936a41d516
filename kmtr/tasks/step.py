"""Forward and backward of one step of a stage, so that the gradient is that of the mean over the GLOBAL batch, however
it is divided over workers and micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kmtr.data.loader.batch import Batch
from kmtr.tasks.base import LOSS, Inputs, Link, Step, Sums, Task, world
from kmtr.tasks.prepare import Preparer
from kmtr.tasks.stages import Stage

Outputs = dict[str, dict[str, Tensor]]


@runtime_checkable
class Engine(Protocol):
    """An engine that averages gradients over workers and accumulated micro-batches, as DeepSpeed's does."""

    def __call__(self, inputs: Inputs, predict: bool = False) -> Outputs: ...

    def backward(self, loss: Tensor) -> Any: ...


def accumulate(engine: Engine, micro: Sequence[Batch], prepare: Preparer, stage: Stage) -> Step:
    """Gradients of the stage's weighted losses over the micro-batches of this worker's share.

    Where a task couples subjects, all micro-batches come first: its loss needs them all. With several of them that
    pass has no graph, and each is run again.

    Returns:
        What there is to log.
    """
    tasks, total = {name: prepare.tasks[name] for name in stage.tasks}, Sums()
    coupled = [task for task in tasks.values() if task.couples]
    links: dict[str, Link] = {}
    inputs: list[Inputs] = []
    outputs: list[Outputs] = []
    if coupled:
        inputs = [prepare(batch, stage) for batch in micro]
        with torch.set_grad_enabled(len(micro) == 1):
            outputs = [engine(each) for each in inputs]
        for task in coupled:
            links[task.name] = task.couple([out[task.name] for out in outputs], micro, total)
    for number, batch in enumerate(micro):
        if coupled and len(micro) == 1:
            out = outputs[0]
        else:
            out = engine(inputs[number] if coupled else prepare(batch, stage))
        losses = [stage.tasks[name] * link(number, out[name]) for name, link in links.items()]
        own = {name: task for name, task in tasks.items() if not task.couples}
        if own:
            each = _weighted(out, stage, own, batch, total)
            losses.append((each * ~batch.repeated).sum() * world() * len(micro) / batch.real)
        engine.backward(torch.stack(losses).sum())
    return total.step()


def _weighted(out: Outputs, stage: Stage, tasks: Mapping[str, Task], batch: Batch, total: Sums) -> Tensor:
    """Weighted sum of the losses of each subject, all of them logged."""
    terms = []
    for name, task in tasks.items():
        total.add(f"{task.label}_loss", out[name][LOSS], ~batch.repeated)
        terms.append(out[name][LOSS] * stage.tasks[name])
    loss = torch.stack(terms).sum(0)
    if len(tasks) == len(stage.tasks):
        total.add("loss", loss, ~batch.repeated)
    return loss
