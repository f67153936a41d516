"""Forward and backward of one step of a stage, so that the gradient is that of the mean over the GLOBAL batch, however
it is divided over workers and micro-batches; of each task over those subjects of it who teach the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float
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
    own = {name: task for name, task in tasks.items() if not task.couples}
    shares = _shares(own, micro, prepare)
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
        if own:
            each = _weighted(out, stage, own, batch, {name: part[number] for name, part in shares.items()}, total)
            losses.append((each * ~batch.repeated).sum() * world() * len(micro) / batch.real)
        engine.backward(torch.stack(losses).sum())
    return total.step()


def _shares(
    tasks: Mapping[str, Task], micro: Sequence[Batch], prepare: Preparer
) -> dict[str, list[Float[Tensor, " batch"]]]:
    """Weights of the subjects of each micro-batch in the losses of tasks that not all of them teach (`Task.teaches`): 0
    of those who teach nothing, and of the others the subjects of the global batch over those of them who teach. A mean
    over the global batch is then one over the latter, and 0 where nobody teaches.
    """
    given = prepare.given()
    asked = {name: [task.teaches(batch, given) for batch in micro] for name, task in tasks.items()}
    known = {name: [part for part in parts if part is not None] for name, parts in asked.items()}
    known = {name: parts for name, parts in known.items() if parts}
    if not known:
        return {}
    counted = [[part & ~batch.repeated for part, batch in zip(known[name], micro, strict=True)] for name in known]
    teachers = torch.stack([torch.cat(parts).sum() for parts in counted])
    if world() > 1:
        dist.all_reduce(teachers)
    factors = (micro[0].real / teachers.clamp(min=1)).unbind()
    return {
        name: [part * factor for part in parts] for name, parts, factor in zip(known, counted, factors, strict=True)
    }


def _weighted(
    out: Outputs, stage: Stage, tasks: Mapping[str, Task], batch: Batch, shares: Mapping[str, Tensor], total: Sums
) -> Tensor:
    """Weighted sum of the losses of each subject, all of them logged.

    Args:
        shares: of those tasks that not all subjects teach, see `_shares`.
    """
    terms = []
    for name, task in tasks.items():
        loss, share = out[name][LOSS], shares.get(name)
        total.add(f"{task.label}_loss", loss, ~batch.repeated if share is None else share > 0)
        terms.append((loss if share is None else loss * share) * stage.tasks[name])
    summed = torch.stack(terms).sum(0)
    if len(tasks) == len(stage.tasks):
        total.add("loss", summed, ~batch.repeated)
    return summed
