"""Base of all tasks: the engine that they need, the quantities that a step logs, and sums over the workers.

A task is a function of an engine and the micro-batches of one step. It runs forward and backward so that the gradient
is that of the mean over the GLOBAL batch, however it is divided over workers and micro-batches, and returns what to
log. The engine is anything with ``engine(inputs, stage)`` and ``engine.backward(loss)`` that averages gradients over
workers and accumulated micro-batches, as DeepSpeed's does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from kmtr.data.loader.batch import Batch
from kmtr.tasks.inputs import Inputs


@runtime_checkable
class Engine(Protocol):
    def __call__(self, inputs: Inputs, stage: str) -> dict[str, Tensor]: ...

    def backward(self, loss: Tensor) -> Any: ...


@dataclass(frozen=True)
class Step:
    """Terms that a step minimised: names as they are logged -> sum over this worker's subjects (or anchors),
    and their count.
    """

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]


class Sums:
    """Running sums and counts of what is logged."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, counted: Tensor) -> None:
        values, counted = values.detach().float(), counted.float()
        self.sums[name] = self.sums.get(name, values.new_zeros(())) + (values * counted).sum()
        self.counts[name] = self.counts.get(name, values.new_zeros(())) + counted.sum()

    def step(self) -> Step:
        return Step(self.sums, self.counts)


def share(batch: Batch, micro: int) -> float:
    """Factor from a sum over a micro-batch to the global mean, given that the engine averages over both."""
    return world() * micro / batch.real


def weigh(out: dict[str, Tensor], weights: dict[str, float]) -> Float[Tensor, " batch"]:
    terms = [out[name] * weight for name, weight in weights.items() if name in out]
    return torch.stack(terms).sum(0)


class _Gather(torch.autograd.Function):
    """All workers' tensors concatenated along the first axis; its adjoint sums what every worker did with our part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous()
        dist.all_reduce(total)
        size = len(total) // dist.get_world_size()
        return total[dist.get_rank() * size : (dist.get_rank() + 1) * size]


def gather(x: Tensor) -> Tensor:
    """Rows of all workers, in rank order, with gradient."""
    return _Gather.apply(x) if world() > 1 else x


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
