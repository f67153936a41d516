"""Base of tasks whose output is an image: what all of them ask of a batch, and the decoder that is their head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kmtr.data.loader.batch import Batch
from kmtr.inputs import Shared
from kmtr.model.dense import HALF, DenseDecoder, PixelHead
from kmtr.model.packing import Pending, Places, gather, indices
from kmtr.physics import random
from kmtr.systems import SYSTEMS, Mapped, Reader, Reading, system
from kmtr.tasks import priors
from kmtr.tasks.base import Encode, Given, Task
from kmtr.types import InputError

SHOWN = 3
"""Images that a query sees of its slice: the temporally shared one of its frame, their mean over the cycle, and what
moves, the frame less the mean, at a scale of its own: it has a tenth of the SD of the image, and ejection fraction is
all in it.
"""


@dataclass(frozen=True)
class Chosen:
    """Slices and frames whose pixels are wanted.

    Attributes:
        cells: (slice, t), slices as the configuration numbers them.
        place: of each cell in the batch: subject, slice, t.
        seen: what acquired lines show; None: the task does not look.
    """

    cells: Places
    place: tuple[Int[Tensor, " cell"], ...]
    seen: Shared | None


@dataclass(frozen=True)
class Asked:
    """A reading of the subjects, and the slices and frames whose pixels are wanted.

    Attributes:
        cells: (slice, t), slices as the configuration numbers them.
        place: of each cell in the batch: subject, slice, t.
        size: subjects, slices and frames of the batch.
        shown: images of the cells that a query may see; None: nothing but k-space's tokens.
        extra: what else the task needs of the cells.
    """

    seen: Reading
    cells: Places
    place: tuple[Int[Tensor, " cell"], ...]
    size: tuple[int, ...]
    shown: Float[Tensor, "cell image y x"] | None
    extra: Mapping[str, Any]

    def on_grid(self, values: Tensor, empty: int | float) -> Tensor:
        """Values ``cell ...`` as ``batch slice t ...``, `empty` where no cell was asked for."""
        whole = values.new_full((*self.size, *values.shape[1:]), empty)
        whole[self.place] = values
        return whole


class Dense(Task):
    """Base of tasks that answer every pixel of slices and frames, by a decoder that reads a transformer's tokens, or
    from a convolutional system's maps.

    In training only frames that can teach are decoded, with `task.frames` so many of each subject, drawn anew in every
    epoch; elsewhere all that are there.
    """

    outputs: ClassVar[int]

    @property
    def systems(self) -> tuple[str, ...]:
        return (self.config.task.system,)

    @property
    def mapped(self) -> bool:
        """Whether the system offers maps; else it offers tokens."""
        return isinstance(system(self.config.task.system), Mapped)

    @property
    def shows(self) -> bool:
        """Whether queries see images."""
        return self.config.task.queries == "shared" and not self.mapped

    @property
    def head_factor(self) -> float:
        """The rate of a decoder is its own, since it has no closed form to begin from."""
        task = self.config.task
        return task.head_factor if self.mapped else task.decoder_factor

    @property
    def looks(self) -> bool:
        """Whether the task needs the temporally shared image."""
        return self.shows

    def readout(self, readers: Mapping[str, Reader]) -> int | None:
        return None if self.looks else super().readout(readers)

    def check(self) -> None:
        task, matrix = self.config.task, self.config.data.matrix
        if self.mapped:
            return
        if any(p < HALF or p % HALF or n % p for n, p in zip(matrix, task.patch, strict=True)):
            raise InputError(f"task.patch: expected even divisors of data.matrix={matrix}, got {task.patch}")
        if not system(task.system).tokens:
            able = ", ".join(name for name, one in SYSTEMS.items() if one.tokens or isinstance(one, Mapped))
            raise InputError(
                f"task.system: expected one that offers tokens or maps for {self.name}, {able}, got {task.system}, "
                "which offers neither"
            )

    def head(self) -> nn.Module:
        config, chosen = self.config, system(self.config.task.system)
        if isinstance(chosen, Mapped):
            return PixelHead(chosen.maps(config), self.outputs)
        shown, channels = SHOWN * self.shows, config.task.channels
        return DenseDecoder(config.data, config.model, config.task.patch, self.outputs, shown, channels)

    def fit(self, batches: Callable[[], Iterable[Batch]], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``moving_sd`` of the images that queries see, once for all tasks; a task adds its own."""
        missing = self.shows and "moving_sd" not in tables
        return {"moving_sd": priors.moving_sd(self.config.data, batches())} if missing else {}

    @abstractmethod
    def teaching(self, batch: Batch) -> Bool[Tensor, "batch slice t"]:
        """Slices and frames that have something to learn from."""

    @abstractmethod
    def extra(self, batch: Batch, given: Given, chosen: Chosen) -> Mapping[str, Any]:
        """What the task itself needs of the chosen cells."""

    def teaches(self, batch: Batch, given: Given) -> Bool[Tensor, " batch"]:
        return (self.teaching(batch) & ~batch.padded).flatten(1).any(1)

    def chosen(self, batch: Batch) -> Bool[Tensor, "batch slice t"]:
        """Slices and frames whose pixels are decoded."""
        if batch.epoch is None:
            return ~batch.padded
        cells = self.teaching(batch) & ~batch.padded
        if not self.config.task.frames:
            return cells
        able = cells.any(1)
        u = random.uniform(self.config.seed, batch.passes, batch.key, random.FRAMES, able.shape[1:])
        rank = u.masked_fill(~able, torch.inf).argsort(1).argsort(1)
        return cells & (rank < self.config.task.frames)[:, None]

    def ask(self, batch: Batch, given: Given) -> Pending[Asked]:
        chosen = self.chosen(batch)
        told = {"shown": chosen} if self.mapped else {}
        reading = given.read(self.systems[0], batch, number=2, **told)
        seen = given.shared(batch, self.config.data.matrix) if self.looks else None

        def make(lengths: Sequence[Any]) -> Asked:
            local = gather(chosen, lengths[-1])
            place = (local.lengths.subject, *local.index.unbind(-1))
            slots = indices(batch.slots, chosen.device)
            cells = replace(local, index=torch.stack([slots[place[1]], place[2]], dim=-1))
            shown = self.images(given, seen, ~batch.padded, cells, place) if self.shows and seen is not None else None
            extra = self.extra(batch, given, Chosen(cells, place, seen))
            return Asked(reading.make(lengths[:-1]), cells, place, tuple(chosen.shape), shown, extra)

        return Pending((*reading.cells, chosen), make)

    def images(
        self,
        given: Given,
        seen: Shared,
        there: Bool[Tensor, "batch slice t"],
        cells: Places,
        place: tuple[Int[Tensor, " cell"], ...],
    ) -> Float[Tensor, "cell image y x"]:
        """`SHOWN` images of the cells, in the population's SD: about its mean image, of what moves about zero."""
        mean, sd, moving_sd = (given.tables[name] for name in ("image_mean", "image_sd", "moving_sd"))
        row, z, _ = place
        frame, still = seen.image[place], seen.still(there)[row, z, 0]
        away = mean[cells.index[:, 0]]
        return torch.stack([(frame - away) / sd, (still - away) / sd, (frame - still) / moving_sd], dim=1)

    def levels(self, features: Any, head: Any, asked: Asked) -> tuple[Float[Tensor, "cell output _ _"], ...]:
        """Output of the head, fp32, zero at step 0: of maps at every resolution, finest first."""
        if self.mapped:
            found: tuple[Tensor, ...] = head(features.levels)
            return found
        return (head(features, asked.cells, asked.shown),)

    def raw(self, encode: Encode, head: Any, asked: Asked) -> Float[Tensor, "cell output y x"]:
        """Output of the head for every pixel."""
        return self.levels(encode(asked.seen), head, asked)[0]
