"""Model of a run: its systems and the heads of its tasks in one module, so that one engine holds all stages."""

from __future__ import annotations

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
        encoded: dict[int, Any] = {}

        def encode(reading: Reading) -> Any:
            if id(reading) not in encoded:  # tasks may share a reading
                encoded[id(reading)] = self.encode(reading)
            return encoded[id(reading)]

        for name, asked in inputs.tasks.items():
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
