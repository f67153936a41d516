"""Base of all systems: what is fitted, from an input to features.

A system has two halves. Its `Reader` stands outside of the training engine: it makes the system's input of a batch, on
the batch's device, in fp32 (a bf16 engine would cast its tables) and without gradient. Its module stands inside: the
input to `Features`, which the heads of tasks read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.model.packing import Pending
from kmtr.physics import random


@dataclass(frozen=True)
class Reading:
    """One pass of a system over a micro-batch.

    Attributes:
        system: its name.
        arguments: of its module's forward.
        learns: a gradient goes to its weights; else it is frozen, and whole: no stochastic depth.
    """

    system: str
    arguments: tuple[Any, ...]
    learns: bool = True


@runtime_checkable
class Features(Protocol):
    """Output of a system's module. All offer a vector; what else there is (frame vectors, tokens, maps) is said by the
    system's own type, and a head that needs it says so.
    """

    @property
    def vector(self) -> Float[Tensor, "batch channel"]:
        """One vector per subject, fp32."""
        ...


@runtime_checkable
class Reader(Protocol):
    """The half outside of the engine.

    Attributes:
        readout: central kx samples of a batch that it looks at; None: all.
    """

    @property
    def readout(self) -> int | None: ...

    def __call__(
        self, batch: Batch, shown: Tensor | None = None, number: int = 0, learns: bool = True
    ) -> Pending[Reading]:
        """The input of the module.

        Args:
            shown: part of the input that may be looked at (True), of a shape that the system says; None: all of it.
            number: of this pass among those that the system makes of one batch: each draws its own stochastic depth.
            learns: as of `Reading`.
        """
        ...


@runtime_checkable
class System(Protocol):
    """A system as a run knows it.

    Attributes:
        inputs: names of what it can see of a subject (`kmtr.inputs.INPUTS`), first the one that it sees unless
            `task.input` says another.
        tokens: its features are `model.encoder.Encoded`: tokens and a vector per slice and frame beside the vector.
    """

    @property
    def inputs(self) -> tuple[str, ...]: ...

    @property
    def tokens(self) -> bool: ...

    def module(self, config: RunConfig) -> nn.Module:
        """The half that learns; initial weights are drawn from torch's generator."""
        ...

    def channels(self, config: RunConfig) -> int:
        """Width of the vector that its features offer."""
        ...

    def reader(self, config: RunConfig, tables: Mapping[str, Tensor], device: torch.device) -> Reader:
        """The half outside of the engine; `tables` of `data.loader.statistics`."""
        ...


@runtime_checkable
class Mapped(System, Protocol):
    """A system whose features hold maps, `levels` ``cell channel y x``, of the slices and frames that its reader is
    told by `shown` ``batch slice t``; finest first, the first of the full matrix.
    """

    def maps(self, config: RunConfig) -> tuple[int, ...]:
        """Channels of each."""
        ...


@dataclass(frozen=True)
class Lesson:
    """Targets that a `Mapped` system has from clean images besides; to predict, it does without.

    Attributes:
        levels: maps of the clean images of the slices and frames that it is told.
        known: those whose clean image is known.
        gap: of each subject, how far what the system makes of its input is from that; is added to the loss.
    """

    levels: tuple[Float[Tensor, "cell _ _ _"], ...]
    known: Bool[Tensor, " cell"]
    gap: Float[Tensor, " batch"]


@runtime_checkable
class Taught(Protocol):
    """Features of a system with a `Lesson`, None where it does not learn."""

    @property
    def lesson(self) -> Lesson | None: ...


@runtime_checkable
class Imaging(System, Protocol):
    """A system whose features hold its own reconstruction, `kspace` ``batch slice coil t ky kx`` on the matrix of the
    configuration: a head of images takes it as it is, and adds nothing.

    Attributes:
        unit: what 1 in that k-space's image is.
    """

    @property
    def unit(self) -> Literal["rms of the temporally shared image"]: ...


def depth_draws(config: RunConfig, batch: Batch, number: int) -> Float[Tensor, "batch block 2"] | None:
    """Uniform numbers for stochastic depth, of (seed, epoch, subject, pass): neither workers nor recomputation change
    them. None: nothing is left out, as outside of training.
    """
    if batch.epoch is None or not config.model.drop_path:
        return None
    shape, origin = (1, config.model.depth, 2), (-number, 0, 0)
    return random.uniform(config.seed, batch.epoch, batch.key, random.DEPTH, shape, origin)[:, 0]
