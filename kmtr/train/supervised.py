"""Training of the k-space encoder on labelled subjects: few of them, all in memory, one process, plain PyTorch.

All weights learn, from pretrained ones (fine-tuning) or from initial ones ("from scratch"). The head begins at zero on
the standardised embedding. Beginning at the head of a ridge probe (Kumar 2022) is worse here: with few labels that head
fits the training subjects almost exactly, and leaves the encoder little to learn from.

The last weights count, not the best of a held-out part: a tenth of 100 labels is too few to choose by, and would be
labels that this method alone goes without. The learning rate falls to zero instead, and every pass over a subject draws
another pattern and, with `augment.*`, another shift and rotation, which is what holds overfitting back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader.batch import Batch, Wanted
from kmtr.data.loader.collate import collate
from kmtr.data.loader.device import HostBatch
from kmtr.data.loader.order import permutation
from kmtr.encoder import KSpaceEncoder
from kmtr.physics.sampling import PATTERN
from kmtr.systems import system
from kmtr.train.engine import parameter_groups, warm_cosine

CHUNK = 32
"""Subjects embedded at once."""
MIN_KNOWN = 3
"""Subjects with a label, below which a target stays unknown."""


@dataclass(frozen=True)
class Training:
    """How long and how fast.

    Attributes:
        learning_rate: its peak, after a linear warm-up; a cosine to zero follows.
        batch: subjects per step; where fewer are labelled, all of them.
    """

    steps: int
    learning_rate: float
    batch: int = 32
    warmup_steps: int = 10


@dataclass(frozen=True)
class Labelled:
    """Labelled subjects as they lie in memory; patterns and augmentation are drawn in every epoch.

    Attributes:
        host: all of them, of the configuration's full shape.
    """

    host: HostBatch

    @staticmethod
    def read(reader: Reader, rows: list[int], config: RunConfig, targets: tuple[str, ...]) -> Labelled:
        """The subjects in these rows; R is drawn per epoch from `sampling.accelerations`."""
        return Labelled(collate(reader.samples(rows), config, None, 0, Wanted(targets), PATTERN))

    def __len__(self) -> int:
        return len(self.host)

    @property
    def labels(self) -> Float[np.ndarray, "subject target"]:
        """In their units; NaN: unknown."""
        return self.host.meta["labels"].numpy()

    def batch(
        self,
        index: Int[np.ndarray, " batch"],
        epoch: Int[np.ndarray, " batch"],
        device: torch.device,
        readout: int | None = None,
    ) -> Batch:
        """These subjects in this epoch each; `readout` as for `HostBatch.to`."""
        chosen = torch.from_numpy(index)
        meta = {name: values[chosen] for name, values in self.host.meta.items()}
        meta["epoch"] = torch.from_numpy(epoch)
        return replace(self.host, stored=self.host.stored[chosen], meta=meta, real=len(index)).to(device, readout)

    def in_order(self, device: torch.device, readout: int | None = None) -> Iterator[Batch]:
        """All of them once, in their first epoch."""
        for first in range(0, len(self), CHUNK):
            index = np.arange(first, min(first + CHUNK, len(self)))
            yield self.batch(index, np.zeros_like(index), device, readout)


class Regressor(nn.Module):
    """A k-space encoder and a linear head on its standardised static and dynamic embedding.

    Answers are in units of the training subjects' SD about their mean; `predict` gives them in the targets' units.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, encoder: KSpaceEncoder, labels: Float[np.ndarray, "subject target"], bf16: bool = False):
        super().__init__()
        self.encoder, self.device = encoder, encoder.device
        self.systems = nn.ModuleDict({"kspace": encoder.module})  # named as in training: parameter groups go by names
        self.bf16 = bf16
        features = system("kspace").channels(encoder.config)
        self.mean, self.sd = moments(labels)
        self.head = nn.Linear(features, labels.shape[1], device=self.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("centre", torch.zeros(features, device=self.device))
        self.register_buffer("scale", torch.ones(features, device=self.device))

    def embed(self, batch: Batch) -> Float[Tensor, "batch feature"]:
        return self.encoder.learnable(batch, self.bf16)

    def forward(self, batch: Batch) -> Float[Tensor, "batch target"]:
        return self.head((self.embed(batch) - self.centre) / self.scale)

    @torch.no_grad()
    def standardise(self, labelled: Labelled) -> None:
        """Take mean and SD of the embedding as it is now over these subjects; a feature that never differs stays 0."""
        self.eval()
        found = [self.embed(batch) for batch in labelled.in_order(self.device, self.encoder.readout)]
        features = torch.cat(found).double()
        scale = features.std(0, correction=0)
        self.centre.copy_(features.mean(0))
        self.scale.copy_(torch.where(scale > 0, scale, 1.0))

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error over the known labels of the batch, standardised; unknown ones (NaN) are not counted."""
        mean, sd = (torch.from_numpy(x).to(batch.labels) for x in (self.mean, self.sd))
        truth = (batch.labels - mean) / sd
        known = torch.isfinite(truth)
        error = torch.where(known, self(batch) - torch.where(known, truth, 0.0), 0.0)
        return error.square().sum() / known.sum().clamp(min=1)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Float[np.ndarray, "batch target"]:
        """In the targets' units, float64; NaN where too few labels were known to learn from."""
        self.eval()
        answer: np.ndarray = self(batch).double().cpu().numpy()
        return answer * self.sd + self.mean


@dataclass(frozen=True)
class Regressed:
    """Predictor (`evaluate.predictors`) of an encoder that was trained on labels, with its linear head."""

    regressor: Regressor
    targets: Sequence[str]

    def __call__(self, batch: Batch, /) -> dict[str, Tensor]:
        return dict(zip(self.targets, torch.from_numpy(self.regressor.predict(batch)).T, strict=True))


def moments(
    labels: Float[np.ndarray, "subject target"],
) -> tuple[Float[np.ndarray, " target"], Float[np.ndarray, " target"]]:
    """Mean and SD of the known labels of each target; the mean is NaN where fewer than MIN_KNOWN are."""
    known = np.isfinite(labels)
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, labels, 0.0).sum(0) / count
    sd = np.sqrt((np.where(known, labels - mean, 0.0) ** 2).sum(0) / count)
    return np.where(known.sum(0) >= MIN_KNOWN, mean, np.nan), np.where(sd > 0, sd, 1.0)


def train(
    regressor: Regressor,
    labelled: Labelled,
    training: Training,
    config: RunConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """Train all weights; subjects come in a new random order on every pass, as `config.seed` says.

    Returns:
        The loss of every step, before its update.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    groups = parameter_groups(regressor, config)
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=config.optimizer.betas)
    size = min(training.batch, len(labelled))
    losses = []
    regressor.train()
    for step in range(training.steps):
        rate = training.learning_rate * warm_cosine(step, training.steps, training.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        index, epoch = epochs_of(config.seed, step, size, len(labelled))
        optimizer.zero_grad(set_to_none=True)
        batch = labelled.batch(index, epoch, regressor.device, regressor.encoder.readout)
        loss = regressor.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(regressor.parameters(), config.optimizer.clip_norm)
        losses.append(float(loss.detach()))
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"step {step + 1}: loss is {losses[-1]}")
        optimizer.step()
        progress(step + 1, training.steps)
    regressor.eval()
    return losses


def epochs_of(seed: int, step: int, size: int, subjects: int) -> tuple[np.ndarray, np.ndarray]:
    """Subjects of a step and which pass over them each is on: the passes are one endless chain of permutations."""
    place = np.arange(step * size, (step + 1) * size)
    epoch = place // subjects
    orders = {int(v): permutation(seed, int(v), subjects) for v in np.unique(epoch)}
    index = np.array([orders[int(v)][p % subjects] for p, v in zip(place, epoch, strict=True)])
    return index, epoch
