"""Phenotypes: numbers of the heart, regressed from a system's vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kmtr.data.loader.batch import Batch
from kmtr.metrics.phenotypes import agreement
from kmtr.metrics.ridge import fit_ridges
from kmtr.model.packing import Pending
from kmtr.systems import Reading, system
from kmtr.tasks.base import LOSS, SCORE, Encode, Given, Task


@dataclass(frozen=True)
class Asked:
    """A reading of the subjects and their labels.

    Attributes:
        truth: in their units; NaN: unknown.
        mean, sd: of the training subjects.
    """

    seen: Reading
    truth: Float[Tensor, "batch target"]
    mean: Float[Tensor, " target"]
    sd: Float[Tensor, " target"]


class OnVector(Task):
    """Base of tasks that read a system's vector: one number for each of some labels.

    The head begins at zero on the normalised vector, which answers the training subjects' mean, unless `begin` gives it
    more.
    """

    @property
    def systems(self) -> tuple[str, ...]:
        return (self.config.task.system,)

    def head(self) -> nn.Module:
        width = system(self.config.task.system).channels(self.config)
        linear = nn.Linear(width, len(self.labels))
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(nn.LayerNorm(width), linear)

    def ask(self, batch: Batch, given: Given) -> Pending[Asked]:
        reading = given.read(self.systems[0], batch, number=2)
        truth, mean, sd = self.known(batch.labels, given)
        return Pending(reading.cells, lambda lengths: Asked(reading.make(lengths), truth, mean, sd))

    def known(
        self, labels: Float[Tensor, "subject label"], given: Given
    ) -> tuple[Float[Tensor, "subject target"], Float[Tensor, " target"], Float[Tensor, " target"]]:
        """The task's own labels, with their mean and SD over the training subjects, all in their units."""
        columns = [given.labels[label] for label in self.labels]
        return labels[:, columns], given.tables["label_mean"][columns], given.tables["label_sd"][columns]

    def teaches(self, batch: Batch, given: Given) -> Bool[Tensor, " batch"]:
        """Subjects of whom a label is known."""
        return torch.isfinite(batch.labels[:, [given.labels[label] for label in self.labels]]).any(1)

    def raw(self, encode: Encode, head: Any, asked: Asked) -> Float[Tensor, "batch target"]:
        """Output of the head, fp32."""
        vector = encode(asked.seen).vector
        norm, linear = head[0], head[1]
        found: Tensor = linear(self.scaled(norm(vector.to(linear.weight.dtype)))).float()
        return found

    def scaled(self, vector: Float[Tensor, "batch channel"]) -> Float[Tensor, "batch channel"]:
        """The normalised vector as the linear layer sees it: over the root of its width where the head begins at zero.
        AdamW moves every weight alike, and thousands of channels would take the answer SDs away in a few steps (of
        readouts and width see Yang et al., arXiv 2203.03466).
        """
        return vector if self.regressed else vector / vector.shape[1] ** 0.5

    @property
    def regressed(self) -> bool:
        """True where the weights begin as a regression on the vector, made for the vector as it is."""
        return False


class Phenotypes(OnVector):
    """`task.targets` in units of the training subjects' SD; the loss is the mean square over those that are known."""

    name = label = "phenotypes"

    @property
    def labels(self) -> tuple[str, ...]:
        return self.config.task.targets

    @property
    def begins(self) -> bool:
        return True

    @property
    def regressed(self) -> bool:
        return self.config.task.begin == "probe"

    def begin(
        self, head: Any, vectors: Float[Tensor, "subject channel"], labels: Float[Tensor, "subject label"], given: Given
    ) -> None:
        """The ridge regression on the normalised vector. From the mean, fine-tuning would first have to find what a
        linear probe knows, and distort the system meanwhile (Kumar et al., ICLR 2022, arXiv 2202.10054).
        """
        norm, linear = head[0], head[1]
        known, mean, sd = self.known(labels, given)
        features, truth = norm(vectors).double().cpu().numpy(), ((known - mean) / sd).double().cpu().numpy()
        for name, ridge in fit_ridges(features, truth, self.labels).items():
            row, weights = self.labels.index(name), ridge.weights / ridge.scale
            linear.weight[row] = torch.from_numpy(weights).to(linear.weight)
            linear.bias[row] = float(ridge.bias - ridge.mean @ weights)

    def forward(self, encode: Encode, head: Any, asked: Asked) -> dict[str, Tensor]:
        wanted = (asked.truth - asked.mean) / asked.sd
        return {LOSS: over_known((self.answer(encode, head, asked) - wanted.nan_to_num()).square(), wanted)}

    def answer(self, encode: Encode, head: Any, asked: Asked) -> Float[Tensor, "batch target"]:
        """In units of the training subjects' SD about their mean; left to the tasks that use it."""
        encode.answers[self.name] = found = self.raw(encode, head, asked)
        return found

    def predict(self, encode: Encode, head: Any, asked: Asked) -> dict[str, Tensor]:
        found = self.answer(encode, head, asked) * asked.sd + asked.mean
        return dict(zip(self.labels, found.unbind(1), strict=True))

    def counts_as(self, target: str) -> str:
        return "r2"

    def score(
        self, truth: Mapping[str, np.ndarray], predicted: Mapping[str, np.ndarray], reference: Mapping[str, float]
    ) -> dict[str, float]:
        """R2 and MAE of each phenotype, and the mean R2 of those that validation subjects have."""
        found: dict[str, float] = {}
        r2 = []
        for name in self.labels:
            scored = agreement(truth[name], predicted[name], reference[name])
            found |= {f"{name.rsplit('_', 1)[0]}_r2": scored.r2, f"{name.rsplit('_', 1)[0]}_mae": scored.mae}
            r2.append(scored.r2)
        known = [value for value in r2 if np.isfinite(value)]
        return found | {SCORE: float(np.mean(known)) if known else float("nan")}


def over_known(error: Float[Tensor, "batch target"], truth: Float[Tensor, "batch target"]) -> Float[Tensor, " batch"]:
    """Mean error of each subject over its known labels; 0 of a subject that has none. Unknown ones have no gradient."""
    known = torch.isfinite(truth)
    return torch.where(known, error, 0.0).sum(1) / known.sum(1).clamp(min=1)
