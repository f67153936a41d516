"""Masks and images of a few held-out subjects, made anew by the model: what figures show and no table keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float

from kmtr.config import Data, RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import Batch, Wanted
from kmtr.evaluate.baselines import lowrank_image, shared_image, zerofilled_image
from kmtr.evaluate.predictions import Name
from kmtr.evaluate.scores import panel
from kmtr.evaluate.task_tables import subject_means
from kmtr.inputs import full_image
from kmtr.metrics.dense import DICE, Pair
from kmtr.physics.sampling import VALIDATION
from kmtr.tasks.views import views_of

if TYPE_CHECKING:
    from kmtr.inference import TaskModel

PERCENTILES = (10, 50, 90)
PREDICTED = "predicted"
OTHERS = {"zero-filled": zerofilled_image, "temporally shared": shared_image, "low-rank + sparse": lowrank_image}
"""Images without a network, shown beside the predicted one."""


@dataclass(frozen=True)
class Chosen:
    """Held-out subjects that figures show, the worst first, and what they were chosen by.

    Attributes:
        score: name of the score, mean over R.
        percentiles, values: of each subject, among the held-out subjects.
        subjects: pseudonyms: for reading them, never for showing.
    """

    score: str
    percentiles: tuple[int, ...]
    values: tuple[float, ...]
    subjects: tuple[str, ...]


@dataclass(frozen=True)
class Look:
    """One subject at one nominal R.

    Attributes:
        number: place among the subjects shown, from 1.
        true_acceleration: R that was really acquired.
        full: view -> fully sampled magnitude image, ``slice t y x``.
        masks: view -> true and predicted classes; empty: the model draws none, or no mask is known.
        images: name (`OTHERS`, `PREDICTED`) -> view -> image; empty: the model makes none.
    """

    number: int
    acceleration: int
    true_acceleration: float
    full: Mapping[str, np.ndarray]
    masks: Mapping[str, Pair]
    images: Mapping[str, Mapping[str, np.ndarray]]


def choose(rows: pa.Table, ours: Name) -> Chosen | None:
    """The subjects at the percentiles of mean Dice, or of SSIM where no masks were scored, each once; None without
    either.
    """
    there = set(rows.filter(pc.equal(rows.column("system"), ours.system)).column("target").to_pylist())
    for score, targets in (("mean Dice", DICE), ("SSIM", ("ssim",))):
        if asked := tuple(target for target in targets if target in there):
            seen = panel(rows, targets=asked)
            values = subject_means(seen, ours)
            shown = {place: p for p, place in zip(PERCENTILES, at_percentiles(values), strict=True)}
            names = tuple(seen.subjects[place] for place in shown)
            return Chosen(score, tuple(shown.values()), tuple(float(values[place]) for place in shown), names)
    return None


def at_percentiles(values: Float[np.ndarray, " subject"]) -> list[int]:
    """Subjects whose value is nearest in rank to each of `PERCENTILES`; those without one are not asked."""
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    return [int(order[round(p / 100 * (len(order) - 1))]) for p in PERCENTILES]


def looks(
    config: RunConfig, dataset: Dataset, model: TaskModel | None, asked: Sequence[str], accelerations: Sequence[int]
) -> list[Look]:
    """The chosen subjects at every R, with the patterns that their scores were made with.

    Args:
        model: None: nothing is predicted, and the true masks stand for the predicted ones.
        asked: their pseudonyms.
    """
    reader = dataset.reader("test", config.data)
    every = subjects.held_out(config.seed, len(reader), config.evaluate.subjects)
    place = dict(zip(subjects.pseudonyms(reader, every), every, strict=True))
    wanted = Wanted(masks=model.prepare.wanted.masks if model else "segmentation" in config.task.tasks)
    device = model.device if model else torch.device("cpu")
    found = []
    for r in accelerations:
        fixed = override(config, {"sampling.accelerations": (r,)})
        for number, name in enumerate(asked, 1):
            (host,) = pipeline.read_in_order(reader, [place[name]], 1, fixed, wanted, VALIDATION)
            batch, data = host.to(device), config.data
            said = model(batch) if model else {}
            if model is None and batch.masks is not None:
                said = {"masks": batch.masks}
            full = full_image(batch, data.matrix)
            shown = {}
            if "image" in said:
                shown = {name: make(data.matrix)(batch)["image"] for name, make in OTHERS.items()}
                shown[PREDICTED] = said["image"]
            masks: Mapping[str, Pair] = {}
            if "masks" in said and batch.masks is not None:
                (masks,) = views_of(batch, data, batch.masks, said["masks"])
            images = {name: _views(batch, data, image) for name, image in shown.items()}
            true = float(batch.true_acceleration[0])
            found.append(Look(number, r, true, _views(batch, data, full), masks, images))
    return found


def place_of(full: Float[np.ndarray, "slice t y x"]) -> tuple[int, int]:
    """Slice and frame whose image is shown: the middle one, and what differs most from the mean over the cycle."""
    z = len(full) // 2
    return z, int(np.argmax(((full[z] - full[z].mean(0)) ** 2).sum((1, 2))))


def _views(batch: Batch, data: Data, image: torch.Tensor) -> dict[str, np.ndarray]:
    (views,) = views_of(batch, data, image, image)
    return {view: pair.truth for view, pair in views.items()}
