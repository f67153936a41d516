"""Predictors: fitted systems with their heads, all the same to evaluation, and how they are asked for predictions.

A source of features (a frozen encoder, an image of the acquired lines) becomes a predictor by ridge regressions fitted
on labelled subjects: a probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from kmtr.config import Data
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.device import HostBatch
from kmtr.evaluate.predictions import HeldOut, Name, by_areas, from_masks, joined, rows
from kmtr.inputs import known_image
from kmtr.metrics import Ridge
from kmtr.metrics.areas import AreaMap
from kmtr.metrics.dense import mask_distances, mask_scores, masks_phenotypes, reconstruction_scores
from kmtr.metrics.from_phenotypes import Regressions
from kmtr.tasks.views import views_of

Outputs = Mapping[str, Tensor]
"""Target -> ``batch``, in its unit; a dense output (mask, image) by its name -> ``batch ...``."""

Features = Callable[[Batch], np.ndarray]
"""Batch -> float32 ``subject feature``."""


@runtime_checkable
class Predictor(Protocol):
    """A fitted system with its heads."""

    def __call__(self, batch: Batch, /) -> Outputs: ...


@dataclass(frozen=True)
class Probed:
    """Predictor of ridge regressions on a source of features, one for each target."""

    features: Features
    ridges: Mapping[str, Ridge]

    def __call__(self, batch: Batch, /) -> Outputs:
        found = self.features(batch)
        return {target: torch.from_numpy(np.asarray(ridge(found))) for target, ridge in self.ridges.items()}


@dataclass(frozen=True)
class ReadOff:
    """Predictor of diseases from the phenotypes that another predictor says."""

    predictor: Predictor
    regressions: Regressions

    def __call__(self, batch: Batch, /) -> Outputs:
        said, diseases = self.predictor(batch), tuple(self.regressions.of)
        phenotypes = torch.stack([said[name].double().cpu() for name in self.regressions.phenotypes], dim=1)
        found = torch.from_numpy(self.regressions(phenotypes.numpy(), diseases))
        return dict(zip(diseases, found.unbind(1), strict=True))


@dataclass(frozen=True)
class Constant:
    """Predictor that says the same of every subject: with the labelled subjects' means, the reference of R2."""

    values: Mapping[str, float]

    def __call__(self, batch: Batch, /) -> Outputs:
        return {target: torch.full((len(batch),), v, dtype=torch.float64) for target, v in self.values.items()}


def predict(
    predictors: Mapping[Name, Predictor],
    batches: Iterable[HostBatch],
    held_out: HeldOut,
    data: Data,
    *,
    acceleration: int,
    seed: int,
    labels: int,
    device: torch.device,
    readout: int | None = None,
    areas: Mapping[Name, AreaMap] = MappingProxyType({}),
) -> pa.Table:
    """Rows of what each predictor says of the held-out subjects' targets; targets that it lacks have none. Masks and
    images become their scores, masks also phenotypes under a name of their own (`numbers`).

    Args:
        batches: the held-out subjects in their order, at this acceleration.
        labels: number of labelled subjects that the predictors learnt from.
        readout: central kx samples that the predictors look at; None: all.
        areas: maps that make phenotypes of a predictor's masks besides.
    """
    found: dict[Name, list[np.ndarray]] = {}
    true: list[np.ndarray] = []
    for host in batches:
        batch = host.to(device, readout)
        true.append(true_accelerations(batch))
        for name, predictor in predictors.items():
            missing = torch.full((len(batch),), torch.nan)
            for who, outputs in numbers(name, batch, predictor(batch), data, areas.get(name)).items():
                said = [outputs.get(target, missing).double().cpu() for target in held_out.targets]
                found.setdefault(who, []).append(torch.stack(said, dim=1).numpy())
    return joined(
        [
            rows(
                name,
                held_out,
                np.concatenate(parts),
                acceleration=acceleration,
                seed=seed,
                labels=labels,
                true_acceleration=np.concatenate(true),
            )
            for name, parts in found.items()
        ]
    )


def numbers(
    name: Name, batch: Batch, outputs: Outputs, data: Data, areas: AreaMap | None = None
) -> dict[Name, dict[str, Tensor]]:
    """A predictor's outputs as numbers ``batch``: those that are, and of masks and images the scores (`metrics.dense`).

    Returns:
        By name of the system; phenotypes that were measured on the masks have one of their own, and so have those that
        `areas` makes of them.
    """
    own = {target: values for target, values in outputs.items() if values.ndim == 1}
    more: dict[Name, dict[str, Tensor]] = {}
    if "masks" in outputs and areas is not None:
        drawn = views_of(batch, data, outputs["masks"], outputs["masks"])
        more[by_areas(name)] = _stacked([areas(each) for each in drawn])
    if "masks" in outputs and batch.masks is not None:
        views = list(views_of(batch, data, batch.masks, outputs["masks"]))
        own |= _stacked([mask_scores(each) | mask_distances(each) for each in views])
        if measured := _stacked([masks_phenotypes(each) for each in views]):
            more[from_masks(name)] = measured
    if "image" in outputs:
        views = list(views_of(batch, data, known_image(batch, data.matrix), outputs["image"]))
        boxes: list[dict[str, np.ndarray]] = [{} for _ in views]
        if batch.masks is not None:
            true = views_of(batch, data, batch.masks, batch.masks)
            boxes = [{view: pair.truth for view, pair in each.items()} for each in true]
        own |= _stacked([reconstruction_scores(each, box) for each, box in zip(views, boxes, strict=True)])
    return {name: own, **more}


def _stacked(subjects: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
    return {key: torch.tensor([one[key] for one in subjects], dtype=torch.float64) for key in subjects[0]}


def true_accelerations(batch: Batch) -> Float[np.ndarray, " batch"]:
    """`Batch.true_acceleration`, on the host."""
    found: np.ndarray = batch.true_acceleration.cpu().numpy()
    return found
