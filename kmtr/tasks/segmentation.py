"""Segmentation: the class of every pixel, from a system's tokens or maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from kmtr.data.loader.batch import Batch
from kmtr.metrics.dense import mask_scores
from kmtr.systems import Taught
from kmtr.tasks import priors
from kmtr.tasks.base import LOSS, SCORE, Encode, Given
from kmtr.tasks.dense import Asked, Chosen, Dense
from kmtr.tasks.losses import cross_entropy_and_dice
from kmtr.tasks.views import of_subjects, views_of
from kmtr.types import SEGMENTATION_CLASSES, UNLABELLED


class Segmentation(Dense):
    """The six classes of `kmtr.types.SEGMENTATION_CLASSES`; the loss is cross entropy and soft Dice, over what the
    training subjects' mean mask has of it.

    Logits begin at the log of each class's frequency at the pixel (of the slice slot), so that step 0 answers the mean
    mask. A system with maps answers at several resolutions, each of half the weight of the finer one before it, against
    every second pixel of that one's truth (nnU-Net's deep supervision). With a `systems.Lesson` the loss is the mean
    over both images', and the gap on top. Nothing is asked where the truth is UNLABELLED; where a source does not draw
    a class, its background may be that class.
    """

    name = label = "segmentation"
    outputs = len(SEGMENTATION_CLASSES)
    needs = "masks"

    def fit(self, batches: Callable[[], Iterable[Batch]], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``mask_log_prior``, where the logits begin, and ``mask_constant``, the loss there."""
        prior = priors.mask_log_prior(self.config.data, batches())
        own = {"mask_log_prior": prior, "mask_constant": priors.mask_constant(batches(), prior)}
        return super().fit(batches, tables) | own

    def teaching(self, batch: Batch) -> Bool[Tensor, "batch slice t"]:
        assert batch.masks is not None
        return (batch.masks != UNLABELLED).any(-1).any(-1)

    def extra(self, batch: Batch, given: Given, chosen: Chosen) -> Mapping[str, Any]:
        prior = given.tables["mask_log_prior"][chosen.cells.index[:, 0]]
        if batch.masks is None or batch.contoured is None:
            return {"prior": prior}
        drawn = batch.contoured[chosen.place[:2]]
        truth = batch.masks[chosen.place]
        return {"prior": prior, "truth": truth, "drawn": drawn, "constant": given.tables["mask_constant"]}

    def forward(self, encode: Encode, head: Any, asked: Asked) -> dict[str, Tensor]:
        features = encode(asked.seen)
        loss = self._loss(self.levels(features, head, asked), asked, asked.extra["truth"])
        if isinstance(features, Taught) and (lesson := features.lesson):
            known = asked.extra["truth"].masked_fill(~lesson.known[:, None, None], UNLABELLED)
            loss = (loss + self._loss(head(lesson.levels), asked, known)) / 2 + lesson.gap
        return {LOSS: loss}

    def _loss(
        self, levels: Sequence[Float[Tensor, "cell output _ _"]], asked: Asked, truth: UInt8[Tensor, "cell y x"]
    ) -> Float[Tensor, " batch"]:
        """Loss of the logits at every resolution against the truth at every second pixel of the finer one's, over that
        of the training subjects' mean mask.
        """
        losses, weights = [], []
        for level, found in enumerate(levels):
            every = [whole // coarse for whole, coarse in zip(self.config.data.matrix, found.shape[-2:], strict=True)]
            there, prior = (one[..., :: every[0], :: every[1]] for one in (truth, asked.extra["prior"]))
            weights.append(0.5**level)
            loss = cross_entropy_and_dice(found + prior, there, asked.extra["drawn"], asked.cells.lengths.counts)
            losses.append(weights[-1] * loss)
        return torch.stack(losses).sum(0) / sum(weights) / asked.extra["constant"]

    def predict(self, encode: Encode, head: Any, asked: Asked) -> dict[str, Tensor]:
        """``masks`` uint8 ``batch slice t y x``, UNLABELLED where nothing is there."""
        logits = self.raw(encode, head, asked) + asked.extra["prior"]
        found = logits.max(1).indices.to(torch.uint8)  # argmax takes six times as long on CPUs
        return {"masks": asked.on_grid(found, UNLABELLED)}

    def judge(self, batch: Batch, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Dice of each class at the truth's end-diastole and end-systole, ``dice_<class>_ed``, ``..._es``."""
        assert batch.masks is not None
        scores = [mask_scores(views) for views in views_of(batch, self.config.data, batch.masks, outputs["masks"])]
        return of_subjects(scores, batch.key.device)

    def counts_as(self, target: str) -> str:
        return "mean" if target.startswith("dice") else ""

    def score(
        self, truth: Mapping[str, np.ndarray], predicted: Mapping[str, np.ndarray], reference: Mapping[str, float]
    ) -> dict[str, float]:
        """Mean Dice over the subjects of every class and phase, and over all of them."""
        means = {n: float(np.nanmean(v)) for n, v in predicted.items() if n.startswith("dice") and np.isfinite(v).any()}
        return means | {SCORE: float(np.mean(list(means.values()))) if means else float("nan")}
