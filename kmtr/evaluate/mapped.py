"""Phenotypes and diseases by areas of masks: which subjects the maps are fitted on, and whose masks these see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kmtr import machine
from kmtr.config import Data, RunConfig
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import Batch, Wanted
from kmtr.data.loader.device import HostBatch
from kmtr.data.loader.order import permutation
from kmtr.evaluate import probes
from kmtr.evaluate.predictions import MASK_RIDGE, Name
from kmtr.metrics import from_phenotypes
from kmtr.metrics.areas import NO_DISEASES, AreaMap, areas
from kmtr.metrics.from_phenotypes import Regressions
from kmtr.physics.sampling import VALIDATION
from kmtr.systems import at_once
from kmtr.tasks.views import slices_of, views_of
from kmtr.types import DISEASES, PHENOTYPES

Masks = Callable[[Batch], Mapping[str, Tensor]]
"""Batch -> ``masks`` uint8 ``batch slice t y x`` among other outputs."""

Fit = Callable[[RunConfig, Reader, Sequence[int], Iterable[HostBatch]], Mapping[Name, Masks]]


@dataclass(frozen=True)
class Mapped:
    """Phenotypes that maps make of areas of masks, diseases that are read off these, and the labelled training subjects
    on which all is fitted.

    Attributes:
        labelled: all labelled subjects, in the training split.
        places: of those in `labelled` that maps are fitted on; empty: no maps are wanted.
        targets: phenotypes.
        known: theirs of these subjects; NaN: unknown.
        diseases: from the true phenotypes of all labelled subjects.
    """

    reader: Reader
    labelled: Sequence[int]
    places: Sequence[int]
    targets: tuple[str, ...]
    known: Float[np.ndarray, "subject target"]
    diseases: Regressions

    @classmethod
    def of(cls, config: RunConfig, reader: Reader, labelled: Sequence[int], labels: Sequence[str]) -> Mapped:
        """Draw `evaluate.mapped` of the labelled subjects, and read the labels.

        Args:
            labels: phenotypes and diseases that are wanted; where there are none of the former, nothing is.
        """
        targets = tuple(name for name in labels if name in PHENOTYPES)
        some = sorted(map(int, permutation(config.seed, 0, len(labelled))[: config.evaluate.mapped])) if targets else []
        known = subjects.labels_of(reader, [labelled[i] for i in some], targets)
        ill = tuple(name for name in labels if name in DISEASES) if targets else ()
        diseases = NO_DISEASES
        if ill:
            given = dict(zip((*targets, *ill), subjects.labels_of(reader, labelled, (*targets, *ill)).T, strict=True))
            diseases = from_phenotypes.fit({name: given[name] for name in targets}, {name: given[name] for name in ill})
        return cls(reader, labelled, some, targets, known, diseases)

    @property
    def rows(self) -> list[int]:
        """Those that maps are fitted on, in the training split."""
        return [self.labelled[i] for i in self.places]

    def readings(self, own: bool, floors: bool) -> int:
        """Subjects read at each R."""
        return len(self.rows) * (own + floors) + (len(self.labelled) if floors and self.rows else 0)

    def of_model(self, fixed: RunConfig, own: Mapping[Name, Masks], tell: probes.Counter) -> dict[Name, AreaMap]:
        """Maps of masks that are learnt otherwise, at the R of these settings; `tell` counts the subjects read."""
        seen = self._seen(fixed, own, self.rows, tell) if own and self.rows else {}
        return fit_maps(fixed.data, seen, self.known, self.targets, self.diseases)

    def of_floor(self, fixed: RunConfig, fit: Fit, tell: probes.Counter) -> dict[Name, AreaMap]:
        """Map of the linear map to masks, at the R of these settings. That knows the masks of the subjects that it is
        fitted on all but exactly: so each half of the subjects is seen by the one of the other half.

        Args:
            fit: the floors of masks of some subjects (`masks.fit`).
        """
        found: dict[Name, np.ndarray] = {}
        for half in (0, 1) if self.rows else ():
            others = self.labelled[1 - half :: 2]
            fitted = fit(fixed, self.reader, others, self._read(fixed, others, tell, Wanted(masks=True)))
            linear = {name: floor for name, floor in fitted.items() if name == MASK_RIDGE}
            mine = [i for i, place in enumerate(self.places) if place % 2 == half]
            for name, seen in self._seen(fixed, linear, [self.rows[i] for i in mine], tell).items():
                found.setdefault(name, np.full((len(self.rows), seen.shape[1]), np.nan))[mine] = seen
        return fit_maps(fixed.data, found, self.known, self.targets, self.diseases)

    def _seen(
        self, fixed: RunConfig, predictors: Mapping[Name, Masks], rows: Sequence[int], tell: probes.Counter
    ) -> dict[Name, Float[np.ndarray, "subject feature"]]:
        device = torch.device(machine.device(fixed.train.device))
        return seen_by(fixed.data, predictors, self._read(fixed, rows, tell, Wanted(spacing=True)), device)

    def _read(self, fixed: RunConfig, rows: Sequence[int], tell: probes.Counter, wanted: Wanted) -> Iterator[HostBatch]:
        chunk = at_once(fixed, probes.CHUNK)
        return tell(pipeline.read_in_order(self.reader, rows, chunk, fixed, wanted, VALIDATION))


def seen_by(
    data: Data, predictors: Mapping[Name, Masks], batches: Iterable[HostBatch], device: torch.device
) -> dict[Name, Float[np.ndarray, "subject feature"]]:
    """`metrics.areas` of the masks of each predictor.

    Args:
        batches: subjects with the size of their pixels, at one R.
    """
    slices, found = slices_of(data), {name: list[np.ndarray]() for name in predictors}
    for host in batches if predictors else ():
        batch = host.to(device)
        for name, predictor in predictors.items():
            masks = predictor(batch)["masks"]
            found[name] += [areas(views, slices) for views in views_of(batch, data, masks, masks)]
    return {name: np.stack(some) for name, some in found.items() if some}


def fit_maps(
    data: Data,
    seen: Mapping[Name, Float[np.ndarray, "subject feature"]],
    labels: Float[np.ndarray, "subject target"],
    targets: Sequence[str],
    diseases: Regressions = NO_DISEASES,
) -> dict[Name, AreaMap]:
    """The map of each predictor; none of one whose masks say too little.

    Args:
        seen: of labelled subjects (`seen_by`).
        labels: NaN: unknown.
        diseases: on phenotypes among the targets.
    """
    fitted = {name: AreaMap.fit(slices_of(data), some, labels, targets, diseases) for name, some in seen.items()}
    return {name: one for name, one in fitted.items() if one is not None}
