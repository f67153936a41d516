"""From a batch to the inputs of a model: what each task asks for, made in fp32 outside of the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch, Wanted
from kmtr.model.packing import joint
from kmtr.systems import Reader, system
from kmtr.tasks.base import EMBEDDING, Given, Inputs, widest
from kmtr.tasks.registry import tasks_of

if TYPE_CHECKING:
    from kmtr.tasks.stages import Stage

TABLES = (
    *("label_mean", "label_sd", "mask_log_prior", "mask_constant", "image_constant"),
    *("image_mean", "image_sd", "moving_sd"),
)
"""What tasks look up: moments of their labels, in their order; log of each class's frequency at each pixel; losses of
the mean mask and of the mean image; the population's mean image, its SD, and that of what moves in what lines show.
"""


class Preparer:
    """Batch -> `Inputs`, on the batch's device, without gradient; the host asks the device once for a batch.

    Attributes:
        tasks: of the run, by name.
        readers: of the systems that they train, by name.
        labels: columns that they need of a batch.
    """

    def __init__(self, config: RunConfig, tables: dict[str, Tensor], device: torch.device):
        self.config, self.tasks = config, tasks_of(config)
        names = dict.fromkeys(name for task in self.tasks.values() for name in task.systems)
        self.readers: dict[str, Any] = {name: system(name).reader(config, tables, device) for name in names}
        self.labels = tuple(dict.fromkeys(label for task in self.tasks.values() for label in task.labels))
        self.tables = {name: tables[name].to(device) for name in TABLES if name in tables}

    @property
    def wanted(self) -> Wanted:
        """Columns that a batch has to carry for the tasks."""
        return Wanted(self.labels, any(task.needs == "masks" for task in self.tasks.values()))

    def readout(self, stage: Stage) -> int | None:
        """Central kx samples of a batch that a stage looks at; None: all."""
        return widest(self.tasks[name].readout(self.readers) for name in stage.tasks)

    @torch.no_grad()
    def __call__(self, batch: Batch, stage: Stage) -> Inputs:
        if self.labels and not batch.labels.shape[1]:  # to predict, none is known
            unknown = torch.full((len(batch), len(self.labels)), torch.nan, device=batch.key.device)
            batch = replace(batch, labels=unknown)
        given = self.given(stage.frozen)
        return Inputs(joint({name: self.tasks[name].ask(batch, given) for name in stage.tasks}).settle())

    def given(self, frozen: frozenset[str] = frozenset()) -> Given:
        """Means by which tasks make their part."""
        columns = {label: column for column, label in enumerate(self.labels)}
        return Given(self.readers, frozen, columns, self.tables)

    @torch.no_grad()
    def embedding(self, batch: Batch, name: str = "kspace") -> Inputs:
        """All that a system sees of a batch, for its vector."""
        reader: Reader = self.readers[name]
        return Inputs(joint({EMBEDDING: reader(batch)}).settle())

    @torch.no_grad()
    def queries(self, batch: Batch, queried: Bool[Tensor, "batch slice t ky"]) -> Inputs:
        """All acquired lines as input of masked pretraining; the `queried` ones to predict, whose values are of no
        use.
        """
        asked = self.tasks["masked"].asked(batch, self.given(), batch.sampled, queried, batch.sampled)  # type: ignore[attr-defined]
        return Inputs(joint({"masked": asked}).settle())
