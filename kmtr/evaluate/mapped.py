"""Phenotypes by areas of masks: which labelled subjects the maps are fitted on, and whose masks these see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from kmtr import machine
from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import Wanted
from kmtr.data.loader.device import HostBatch
from kmtr.data.loader.order import permutation
from kmtr.evaluate import areas, probes
from kmtr.evaluate.predictions import MASK_RIDGE, Name
from kmtr.physics.sampling import VALIDATION
from kmtr.systems import at_once

Fit = Callable[[RunConfig, Reader, Sequence[int], Iterable[HostBatch]], Mapping[Name, areas.Masks]]


@dataclass(frozen=True)
class Mapped:
    """Phenotypes that maps make of areas of masks, and the labelled training subjects on which these are fitted.

    Attributes:
        labelled: all labelled subjects, in the training split.
        places: of those in `labelled` that maps are fitted on; empty: no maps are wanted.
        known: labels of these; NaN: unknown.
    """

    reader: Reader
    labelled: Sequence[int]
    places: Sequence[int]
    targets: tuple[str, ...]
    known: Float[np.ndarray, "subject target"]

    @classmethod
    def of(cls, config: RunConfig, reader: Reader, labelled: Sequence[int], targets: Sequence[str]) -> Mapped:
        """Draw `areas.MOST` of the labelled subjects, and read their labels."""
        some = sorted(map(int, permutation(config.seed, 0, len(labelled))[: areas.MOST])) if targets else []
        known = subjects.labels_of(reader, [labelled[i] for i in some], targets)
        return cls(reader, labelled, some, tuple(targets), known)

    @property
    def rows(self) -> list[int]:
        """Those that maps are fitted on, in the training split."""
        return [self.labelled[i] for i in self.places]

    def readings(self, own: bool, floors: bool) -> int:
        """Subjects read at each R."""
        return len(self.rows) * (own + floors) + (len(self.labelled) if floors and self.rows else 0)

    def of_model(
        self, fixed: RunConfig, own: Mapping[Name, areas.Masks], tell: probes.Counter
    ) -> dict[Name, areas.AreaMap]:
        """Maps of masks that are learnt otherwise, at the R of these settings; `tell` counts the subjects read."""
        seen = self._seen(fixed, own, self.rows, tell) if own and self.rows else {}
        return areas.fit_maps(fixed.data, seen, self.known, self.targets)

    def of_floor(self, fixed: RunConfig, fit: Fit, tell: probes.Counter) -> dict[Name, areas.AreaMap]:
        """Map of the linear map to masks, at the R of these settings. That knows the masks of the subjects that it is
        fitted on all but exactly: so each half of the subjects is seen by the one of the other half.

        Args:
            fit: the floors of masks of some subjects (`masks.fit`).
        """
        found: dict[Name, np.ndarray] = {}
        for half in (0, 1) if self.rows else ():
            others = self.labelled[1 - half :: 2]
            fitted = fit(fixed, self.reader, others, self._read(fixed, others, tell))
            linear = {name: floor for name, floor in fitted.items() if name == MASK_RIDGE}
            mine = [i for i, place in enumerate(self.places) if place % 2 == half]
            for name, seen in self._seen(fixed, linear, [self.rows[i] for i in mine], tell).items():
                found.setdefault(name, np.full((len(self.rows), seen.shape[1]), np.nan))[mine] = seen
        return areas.fit_maps(fixed.data, found, self.known, self.targets)

    def _seen(
        self, fixed: RunConfig, predictors: Mapping[Name, areas.Masks], rows: Sequence[int], tell: probes.Counter
    ) -> dict[Name, Float[np.ndarray, "subject feature"]]:
        device = torch.device(machine.device(fixed.train.device))
        return areas.seen_by(fixed.data, predictors, self._read(fixed, rows, tell), device)

    def _read(self, fixed: RunConfig, rows: Sequence[int], tell: probes.Counter) -> Iterator[HostBatch]:
        chunk = at_once(fixed, probes.CHUNK)
        return tell(pipeline.read_in_order(self.reader, rows, chunk, fixed, Wanted(masks=True), VALIDATION))
