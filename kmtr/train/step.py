"""The training step: the only place where a batch becomes an update of the weights.

The loop of a run, the tests of golden losses and of equivalence, and the step benchmark all run this one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.device import HostBatch
from kmtr.tasks import Inputs, Preparer, Step, accumulate, stage_of
from kmtr.train.engine import learning_rates
from kmtr.types import KmtrError


@runtime_checkable
class Engine(Protocol):
    """The engine of a step: `train.engine.ShardedEngine`, or another that the benchmark compares with it."""

    def __call__(self, inputs: Inputs, predict: bool = False) -> dict[str, dict[str, Tensor]]: ...
    def backward(self, loss: Tensor) -> None: ...
    def update(self, rates: Mapping[str, float]) -> bool: ...


@dataclass(frozen=True)
class Report:
    """Record of one optimizer step.

    Attributes:
        stage: that it belongs to.
        means: what the tasks logged, as means over the global batch.
        rates: learning rate of each domain.
        applied: the weights changed; False: the gradient was not finite, and they are as they were.
        batch: this worker's part of the global batch, on the device.
    """

    stage: str
    means: dict[str, float]
    rates: dict[str, float]
    applied: bool
    batch: Batch


class TrainingStep:
    """Host batch -> device -> tasks, forward and backward -> a look at the numbers -> update.

    Args:
        world: number of workers that share the global batch.
    """

    def __init__(self, config: RunConfig, engine: Engine, prepare: Preparer, device: torch.device, world: int) -> None:
        self.config, self.engine, self.prepare, self.device = config, engine, prepare, device
        self.micro_batch = config.data.global_batch // world // config.accumulation(world)

    def __call__(self, step: int, host: HostBatch) -> Report:
        """One optimizer step, counted from 0.

        Raises:
            KmtrError: with `train.on_nonfinite=stop`, on all workers, before anything was changed: a loss or a
                gradient is not finite.
        """
        stage, _ = stage_of(self.config, step)
        batch = host.to(self.device, self.prepare.readout(stage))
        micro = [batch[i : i + self.micro_batch] for i in range(0, len(batch), self.micro_batch)]
        means = reduce(accumulate(self.engine, micro, self.prepare, stage), self.device)
        stops = self.config.train.on_nonfinite == "stop"
        wrong = [name for name, value in means.items() if not math.isfinite(value)]
        if wrong and stops:
            raise KmtrError(_not_finite(step, stage.name, f"{wrong[0]} is {means[wrong[0]]}"))
        rates = learning_rates(self.config, step)
        applied = self.engine.update(rates)
        if not applied and stops:
            raise KmtrError(_not_finite(step, stage.name, "gradient is not finite although its loss is"))
        return Report(stage.name, means, rates, applied, batch)


def _not_finite(step: int, stage: str, what: str) -> str:
    return (
        f"step {step + 1}: {stage} {what}, expected a finite number; nothing was updated; lower {stage}.learning_rate, "
        "resume from the last checkpoint by the same command, or pass over such steps with train.on_nonfinite=skip"
    )


def reduce(step: Step, device: torch.device) -> dict[str, float]:
    """Means over the global batch of what a step logged; nothing of what no subject of it had."""
    names = sorted(step.sums)
    totals = torch.stack([step.sums[n] for n in names] + [step.counts[n] for n in names]).to(device, torch.float64)
    dist.all_reduce(totals)
    sums, counts = totals.cpu().chunk(2)
    means = (sums / counts.clamp(min=1)).tolist()
    return {name: mean for name, mean, count in zip(names, means, counts.tolist(), strict=True) if count}
