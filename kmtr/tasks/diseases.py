"""Diseases: the probability of each, from a system's vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kmtr.metrics.diseases import detection
from kmtr.metrics.logistic import fit_logistic
from kmtr.tasks.base import LOSS, SCORE, Encode, Given
from kmtr.tasks.phenotypes import Asked, OnVector, Phenotypes, over_known

RAREST = 1e-3
"""Prevalence that the log odds begin at, where a disease is rarer still."""


class Diseases(OnVector):
    """A logit for each of `task.diseases`; the loss is the mean binary cross entropy over those that are known, over
    what the prevalence has of it. The odds begin at the training subjects' prevalence, unless `begin` gives more.

    Where the model regresses phenotypes too, the head also sees those that it predicts: most diseases are read off
    them. Phenotypes learn nothing from that.
    """

    name = label = "diseases"
    after = ("phenotypes",)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.config.task.diseases

    def head(self) -> nn.Module:
        direct = super().head()
        if "phenotypes" not in self.config.task.tasks:
            return direct
        seen = nn.Linear(len(self.config.task.targets), len(self.labels), bias=False)
        nn.init.zeros_(seen.weight)
        return nn.ModuleList([*direct, seen])  # type: ignore[misc]

    @property
    def begins(self) -> bool:
        return "phenotypes" in self.config.task.tasks

    def begin(
        self, head: Any, vectors: Float[Tensor, "subject channel"], labels: Float[Tensor, "subject label"], given: Given
    ) -> None:
        """Logistic regression, fitted on the true phenotypes, where the head sees those that the model predicts. On the
        vector it begins at zero.
        """
        if not self.begins:
            return
        known, mean, sd = Phenotypes(self.config).known(labels, given)
        phenotypes = ((known - mean) / sd).double().cpu().numpy()
        truth, prevalence, _ = self.known(labels, given)
        for row, ill in enumerate(truth.double().cpu().numpy().T):
            told = np.isfinite(ill) & np.isfinite(phenotypes).any(1)
            if not 0 < ill[told].sum() < told.sum() or not np.isfinite(phenotypes[told]).any(0).all():
                continue
            fitted = fit_logistic(phenotypes[told], ill[told])
            weights, begun = fitted.weights / fitted.scale, float(prevalence[row].clamp(RAREST, 1 - RAREST).logit())
            head[2].weight[row] = torch.from_numpy(weights).to(head[2].weight)
            head[1].bias[row] = fitted.bias - float(fitted.mean @ weights) - begun

    def logits(self, encode: Encode, head: Any, asked: Asked) -> Float[Tensor, "batch target"]:
        found = self.raw(encode, head, asked) + asked.mean.clamp(RAREST, 1 - RAREST).logit()
        if "phenotypes" in encode.answers:
            found = found + head[2](encode.answers["phenotypes"].detach().to(head[2].weight.dtype)).float()
        return found

    def forward(self, encode: Encode, head: Any, asked: Asked) -> dict[str, Tensor]:
        wanted = asked.truth.nan_to_num()
        error = F.binary_cross_entropy_with_logits(self.logits(encode, head, asked), wanted, reduction="none")
        p = asked.mean.clamp(RAREST, 1 - RAREST)
        constant = F.binary_cross_entropy(p, p)  # the mean entropy: what the prevalence itself has to pay
        return {LOSS: over_known(error, asked.truth) / constant}

    def predict(self, encode: Encode, head: Any, asked: Asked) -> dict[str, Tensor]:
        return dict(zip(self.labels, self.logits(encode, head, asked).sigmoid().unbind(1), strict=True))

    def counts_as(self, target: str) -> str:
        return "auroc"

    def score(
        self, truth: Mapping[str, np.ndarray], predicted: Mapping[str, np.ndarray], reference: Mapping[str, float]
    ) -> dict[str, float]:
        """AUROC and average precision of each disease, and the mean AUROC of those with both classes."""
        found: dict[str, float] = {}
        areas = []
        for name in self.labels:
            scored = detection(truth[name], predicted[name], threshold=reference[name])
            found |= {f"{name}_auroc": scored.auroc, f"{name}_ap": scored.average_precision}
            areas.append(scored.auroc)
        known = [area for area in areas if np.isfinite(area)]
        return found | {SCORE: float(np.mean(known)) if known else float("nan")}
