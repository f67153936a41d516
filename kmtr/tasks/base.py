"""Base of all tasks: what is learnt, on which systems, with what head and which loss.

A task says once all that concerns it: what it asks of a batch, what it hides, its head, its loss. A stage trains a
weighted set of tasks (`stages`), `accumulate` makes the gradients of a step of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.inputs import Shared
from kmtr.model.packing import Pending
from kmtr.systems import Reader, Reading

EMBEDDING = "embedding"
"""In place of a task: the vector of a reading, without any head."""


@runtime_checkable
class Encode(Protocol):
    """Reading -> features of the system that it is for (`systems.Features`, or the system's own type).

    Attributes:
        answers: of this pass, what tasks leave to those that come `after` them, by task.
    """

    answers: dict[str, Tensor]

    def __call__(self, reading: Reading, /) -> Any: ...


Link = Callable[[int, dict[str, Tensor]], Tensor]
"""Number of a micro-batch and a task's output for it -> its part of a loss that couples subjects, summed over them."""


@dataclass(frozen=True)
class Inputs:
    """One micro-batch as the model sees it: name of a task -> what `Task.ask` made for it."""

    tasks: dict[str, Any]


@dataclass(frozen=True)
class Given:
    """Means by which a task makes its part of the inputs.

    Attributes:
        readers: of the run's systems, by name.
        frozen: systems that do not learn in the stage.
        labels: column of a batch's labels that holds each.
        tables: fitted on the training split, on the batch's device; for labels ``label_mean`` and ``label_sd``.
        whole: passes over all of a batch that were asked for already, by system.
        images: temporally shared images of the batch that were asked for already, by their matrix.
    """

    readers: Mapping[str, Any]
    frozen: frozenset[str] = frozenset()
    labels: Mapping[str, int] = field(default_factory=dict)
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Pending[Reading]] = field(default_factory=dict, repr=False)
    images: dict[tuple[int, int], Shared] = field(default_factory=dict, repr=False)

    def read(self, name: str, batch: Batch, **how: Any) -> Pending[Reading]:
        """One pass of a system over what `Reader` is told of the batch. Tasks that ask for all of it (`shown` not
        given) share one pass, whose number is the first one's.
        """
        if "shown" not in how and name in self.whole:
            return self.whole[name]
        pending: Pending[Reading] = self.readers[name](batch, learns=name not in self.frozen, **how)
        if "shown" not in how:
            pending = self.whole[name] = Pending(pending.cells, once(pending.make))
        return pending

    def shared(self, batch: Batch, matrix: tuple[int, int]) -> Shared:
        """The temporally shared image of the batch, made once for all tasks."""
        if matrix not in self.images:
            self.images[matrix] = Shared.of(batch, matrix)
        return self.images[matrix]


class Task(ABC):
    """One thing that is learnt.

    Attributes:
        name: in the configuration, of its head and of its output.
        systems: names of those that it trains, in the order in which their weights are drawn.
        label: its loss is logged as ``<label>_loss``.
        labels: columns that it needs of a batch, as the dataset names them.
        needs: of a subject, to be learnt: contours, or fully sampled images.
        after: tasks whose answers it uses, where a model has them.
        couples: the loss of a subject depends on the others of the global batch: `couple` takes the place of `LOSS`.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    couples: ClassVar[bool] = False
    needs: ClassVar[Literal["", "masks", "images"]] = ""
    after: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: RunConfig):
        self.config = config

    @property
    def labels(self) -> tuple[str, ...]:
        return ()

    @property
    @abstractmethod
    def systems(self) -> tuple[str, ...]: ...

    @property
    def head_factor(self) -> float:
        """Learning rate of its head over that of training on labels."""
        return self.config.task.head_factor

    def check(self) -> None:  # noqa: B027  most refuse nothing of their own
        """Refuse, before a worker starts, settings with which the task cannot be learnt.

        Raises:
            InputError: one line that names the key.
        """

    def readout(self, readers: Mapping[str, Reader]) -> int | None:
        """Central kx samples of a batch that the task looks at; None: all."""
        return widest(readers[name].readout for name in self.systems)

    def fit(self, batches: Callable[[], Iterable[Batch]], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tables of its own, by their names in `Given.tables`, of some training subjects.

        Args:
            batches: these subjects, on the CPU, as often as they are asked for.
            tables: those that there are already.
        """
        return {}

    @abstractmethod
    def head(self) -> nn.Module:
        """The part of the model that only this task has."""

    @property
    def begins(self) -> bool:
        """True if `begin` has weights to give."""
        return False

    def begin(  # noqa: B027  most begin as `head` made them
        self, head: Any, vectors: Float[Tensor, "subject channel"], labels: Float[Tensor, "subject label"], given: Given
    ) -> None:
        """Give the head, before the first step, weights that a closed form has for it.

        Args:
            vectors: of labelled training subjects, by the system as it begins.
            labels: of a batch, in their units; NaN: unknown.
        """

    @abstractmethod
    def ask(self, batch: Batch, given: Given) -> Pending[Any]:
        """The task's part of the inputs: readings, and targets; made without gradient, in fp32."""

    def teaches(self, batch: Batch, given: Given) -> Bool[Tensor, " batch"] | None:
        """Subjects that have something for the task to learn from: its loss is averaged over those of the global batch.
        None: all of them. Whether it is None may depend on the configuration alone, never on the batch.
        """
        return None

    @abstractmethod
    def forward(self, encode: Encode, head: Any, asked: Any) -> dict[str, Tensor]:
        """Inside the engine: `LOSS` ``batch``, and what else there is to log or to `couple`.

        Args:
            asked: what `ask` made.
        """

    def predict(self, encode: Encode, head: Any, asked: Any) -> dict[str, Tensor]:
        """Inside the engine: the predictions themselves, numbers by their target's name and in its unit."""
        raise NotImplementedError(f"{self.name} predicts nothing")

    def judge(self, batch: Batch, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Numbers ``batch`` of what was predicted: numbers as they are, scores of masks and images (NaN: has none)."""
        return dict(outputs)

    def score(
        self, truth: Mapping[str, np.ndarray], predicted: Mapping[str, np.ndarray], reference: Mapping[str, float]
    ) -> dict[str, float]:
        """Validation metrics of predictions ``subject`` by target; the greater the better where its name is `SCORE`.

        Args:
            reference: mean of the training labels.
        """
        return {}

    def counts_as(self, target: str) -> str:
        """How a target counts in the score: by its ``r2``, its ``auroc``, or as the ``mean`` of the subjects' scores;
        empty: it does not.
        """
        return ""

    def couple(self, outputs: Sequence[dict[str, Tensor]], micro: Sequence[Batch], log: Sums) -> Link:
        """Part of each micro-batch in a loss over the global batch, given the outputs for all of them."""
        raise NotImplementedError(f"{self.name} couples no subjects")


def once(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`make`, whose first result is every result."""
    made: list[Any] = []

    def first(lengths: Any) -> Any:
        if not made:
            made.append(make(lengths))
        return made[0]

    return first


SCORE = "score"
"""Metric of a task's validation by which checkpoints compare."""
LOSS = "loss"
"""Key of a task's loss per subject in its output."""


def widest(samples: Any) -> int | None:
    """The most central samples of several askers; None, which is all of them, where one asks for all."""
    found = list(samples)
    return None if None in found else max(found)


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
    """Number of workers that share the global batch."""
    return dist.get_world_size() if dist.is_initialized() else 1
