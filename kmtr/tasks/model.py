"""Model of a run: its systems and the heads of its tasks in one module, so that one engine holds all stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.model.transformer import Block
from kmtr.systems import Reading, system
from kmtr.tasks.base import EMBEDDING, Inputs
from kmtr.tasks.registry import tasks_of


class Model(nn.Module):
    """Systems and heads; weights are drawn task by task, a system's when the first task asks for it."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.tasks = tasks_of(config)
        self.systems, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for task in self.tasks.values():
            for name in task.systems:
                if name not in self.systems:
                    self.systems[name] = system(name).module(config)
            self.heads[task.name] = task.head()
        if config.train.compile:
            for module in self.modules():
                if isinstance(module, Block):
                    module.compiled()

    def forward(self, inputs: Inputs, predict: bool = False) -> dict[str, dict[str, Tensor]]:
        """Output of each task: its loss, and what is logged or coupled; or its predictions.

        All goes through here, since ZeRO-3 gathers weights around an engine's call.
        """
        out: dict[str, dict[str, Tensor]] = {}
        encode = _Pass(self.encode)
        for name in sorted(inputs.tasks, key=lambda name: name in self.tasks and bool(self.tasks[name].after)):
            asked = inputs.tasks[name]
            if name == EMBEDDING:
                out[name] = {"vector": encode(asked).vector}
            else:
                task, head = self.tasks[name], self.heads[name]
                out[name] = (task.predict if predict else task.forward)(encode, head, asked)
        return out

    def encode(self, reading: Reading) -> Any:
        """Features of a reading; without gradient where its system is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and reading.learns):
            return self.systems[reading.system](*reading.arguments)


class _Pass:
    """`tasks.base.Encode` of one call of the model: tasks that share a reading share its features."""

    def __init__(self, make: Callable[[Reading], Any]):
        self.make, self.encoded = make, dict[int, Any]()
        self.answers: dict[str, Tensor] = {}

    def __call__(self, reading: Reading, /) -> Any:
        if id(reading) not in self.encoded:
            self.encoded[id(reading)] = self.make(reading)
        return self.encoded[id(reading)]
