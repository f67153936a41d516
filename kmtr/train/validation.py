"""Validation during training: losses, and what a probe or the tasks themselves say of held-out subjects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import Batch, Wanted
from kmtr.metrics import effective_rank, embedding_deviation, probe
from kmtr.physics.fourier import magnitude_image
from kmtr.physics.sampling import true_acceleration
from kmtr.systems import at_once
from kmtr.tasks import STAGES, Engine, Preparer, Stage
from kmtr.tasks.base import EMBEDDING, LOSS, SCORE
from kmtr.train import choice, guard
from kmtr.train.held import R2, Column, Held
from kmtr.types import PROBED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHUNK = 16


def of(
    config: RunConfig, dataset: Dataset, prepare: Preparer, rank: int, world: int, device: torch.device
) -> Validation:
    """The validation of a run's stage."""
    kind = TaskValidation if config.stage == "task" else PretrainingValidation
    return kind(config, dataset, prepare, rank, world, device)


class Validation(ABC):
    """Scores an engine on held-out subjects; every worker takes an equal share, since ZeRO-3 needs all of them.

    The subjects are the same for any number of workers: where they can't be dealt evenly, the last share is filled up
    with repeats that do not count.

    Patterns are fixed and drawn at `evaluate.accelerations`, so that runs which differ in `sampling` compare.

    Attributes:
        held_out: subjects of the validation split that are asked; 0: there is none, and training subjects are.
        held: what the last call said of each of them.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        prepare: Preparer,
        rank: int,
        world: int,
        device: torch.device,
    ):
        fixed: dict[str, object] = {"sampling.accelerations": config.evaluate.accelerations}
        if config.train.eval_seed is not None:
            fixed["seed"] = config.train.eval_seed
        self.config = override(config, fixed)
        self.prepare, self.device = prepare, device
        self.rank, self.world = rank, world
        self.labels = self.labels_of(dataset)
        self.shown, self.held_out, self.held = "Held-out subject", 0, Held(())
        self.readers: dict[str, Reader] = {}
        self.rows: dict[str, np.ndarray] = {}
        for split in ("train", "val"):
            reader = dataset.reader(split, config.data)
            if split == "val" and len(reader) == 0:  # a dataset without a split: validate on what there is
                reader = self.readers["train"]
                self.shown = "Training subject (the dataset has no validation split)"
            self.readers[split] = reader
            chosen = subjects.validated(self.config.seed, len(reader), config.train.eval_subjects)
            self.rows[split] = np.array(chosen, int)
            if reader.split == "val":
                self.held_out = len(self.rows[split])

    @property
    def wanted(self) -> Wanted:
        """Columns of a batch that it needs."""
        return Wanted(tuple(self.labels), self.prepare.wanted.masks)

    @abstractmethod
    def labels_of(self, dataset: Dataset) -> list[str]:
        """Labels that it needs."""

    @abstractmethod
    def __call__(self, engine: Engine) -> tuple[dict[str, float], Figure | None]:
        """Metrics ``val/...`` (the same on all workers), and on rank 0 perhaps a figure."""

    def _losses(self, engine: Engine, stage: Stage) -> dict[str, float]:
        """Mean loss of each task of the stage over the subjects that teach it; nothing where nobody does."""
        losses, teachers = [], []
        for batch in self._batches("val"):
            out = engine(self.prepare(batch, stage))
            losses.append(torch.stack([out[name][LOSS] for name in stage.tasks]))
            known = [self.prepare.tasks[name].teaches(batch, self.prepare.given()) for name in stage.tasks]
            teachers.append(torch.stack([torch.ones_like(batch.repeated) if one is None else one for one in known]))
        counted = torch.cat(teachers, dim=1) & self._counted("val")
        both = torch.stack([(torch.cat(losses, dim=1) * counted).sum(1).double(), counted.sum(1).double()])
        dist.all_reduce(both)
        names = [f"val/{self.prepare.tasks[name].label}_loss" for name in stage.tasks]
        return {name: total / count for name, total, count in zip(names, *both.tolist(), strict=True) if count}

    def _agreed(self, metrics: dict[str, float]) -> dict[str, float]:
        """Those of rank 0: workers on unlike processors may differ in a last bit, and what follows from it must be the
        same on all.
        """
        said = torch.tensor(list(metrics.values()), dtype=torch.float64, device=self.device)
        dist.broadcast(said, 0)
        return dict(zip(metrics, said.tolist(), strict=True))

    def _gathered(self, mine: torch.Tensor, split: str) -> np.ndarray:
        """Rows of all workers in the order of the split's."""
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine.contiguous())
        found: np.ndarray = torch.stack(parts, dim=1).flatten(0, 1)[: len(self.rows[split])].cpu().numpy()
        return found

    def _dealt(self, split: str) -> np.ndarray:
        """Rows of all workers ``turn rank``, the last turn filled up with repeats."""
        rows = self.rows[split]
        return np.resize(rows, (-(-len(rows) // self.world), self.world))

    def _counted(self, split: str) -> torch.Tensor:
        """Which of this worker's subjects are no repeats."""
        turns = len(self._dealt(split))
        return torch.arange(turns, device=self.device) * self.world + self.rank < len(self.rows[split])

    def _batches(self, split: str) -> Iterator[Batch]:
        mine = self._dealt(split)[:, self.rank]
        chunk = at_once(self.config, CHUNK)
        read = pipeline.read_in_order(self.readers[split], mine.tolist(), chunk, self.config, self.wanted)
        return (host.to(self.device) for host in read)


class TaskValidation(Validation):
    """Predictions of all tasks for held-out subjects, against their labels; of those also `choice.SCORE`."""

    def labels_of(self, dataset: Dataset) -> list[str]:
        return list(self.prepare.labels)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> tuple[dict[str, float], Figure | None]:
        if len(self.rows["val"]) == 0:
            return {}, None
        stage = STAGES["task"](self.config)
        metrics = self._losses(engine, stage)
        said, labels, names = [], [], []
        for batch in self._batches("val"):
            out = engine(self.prepare(batch, stage), predict=True)
            numbers = {task: self.prepare.tasks[task].judge(batch, out[task]) for task in stage.tasks}
            names = [(task, target) for task in stage.tasks for target in numbers[task]]
            said.append(torch.stack([numbers[task][target] for task, target in names], dim=1))
            labels.append(batch.labels)
        both = self._gathered(torch.cat([torch.cat(said), torch.cat(labels)], dim=1), "val").astype(np.float64)
        truth = {name: both[:, len(names) + i] for i, name in enumerate(self.labels)}
        known = self.prepare.tables.get("label_mean", torch.empty(0))
        means = dict(zip(self.labels, known.tolist(), strict=True))
        for task in stage.tasks:
            predicted = {target: both[:, i] for i, (of, target) in enumerate(names) if of == task}
            for name, value in self.prepare.tasks[task].score(truth, predicted, means).items():
                metrics[f"val/{task}_{name}" if name == SCORE else f"val/{name}"] = value
        self.held = Held(
            tuple(
                Column(
                    task,
                    target,
                    kind,
                    truth.get(target, np.full(len(both), np.nan)),
                    both[:, i],
                    means.get(target, np.nan),
                )
                for i, (task, target) in enumerate(names)
                if (kind := self.prepare.tasks[task].counts_as(target))
            )
        )
        metrics = self._agreed(metrics)
        scores = [metrics.get(f"val/{task}_{SCORE}", np.nan) for task in stage.tasks]
        return metrics | (choice.overall(scores) if self.held_out else {}), None


class PretrainingValidation(Validation):
    """Loss of masked pretraining, the ridge probe on frozen embeddings, and a figure."""

    def labels_of(self, dataset: Dataset) -> list[str]:
        return [name for name in PROBED if dataset.labels.get(name)]

    @torch.no_grad()
    def __call__(self, engine: Engine) -> tuple[dict[str, float], Figure | None]:
        """Metrics ``val/...`` (the same on all workers), and on rank 0 the figure of one subject."""
        metrics: dict[str, float] = {}
        if len(self.rows["val"]) == 0:
            return metrics, None
        metrics |= self._losses(engine, STAGES["masked"](self.config))
        held, held_labels = self._embed(engine, "val")
        if self.labels:
            train, train_labels = self._embed(engine, "train")
            scores, said = {}, []
            parts = {"": slice(None)} | self._contents()
            for (part, features), (i, label) in product(parts.items(), enumerate(self.labels)):
                result = probe(train[:, features], train_labels[:, i], held[:, features], held_labels[:, i])
                if result is not None:
                    metrics[guard.r2_of(label) + part] = result.r2
                    if not part:
                        scores[label] = result.r2
                        predicted = np.full(len(held), np.nan)
                        predicted[np.isfinite(held_labels[:, i])] = result.predicted
                        truth, mean = held_labels[:, i].astype(np.float64), result.training_mean
                        said.append(Column("probe", label, R2, truth, predicted, mean))
            self.held = Held(tuple(said))
            if scores:
                metrics[guard.MEAN] = float(np.mean(list(scores.values())))
        metrics["val/effective_rank"] = effective_rank(held)
        metrics["val/embedding_deviation"] = embedding_deviation(held)
        return self._agreed(metrics), self._figure(engine)

    def _contents(self) -> dict[str, np.ndarray]:
        """Which features of the embedding are static and which dynamic: a probe that knows only the anatomy's says
        whether the motion was thrown away.
        """
        model, slices = self.config.model, self.config.data.slices
        static = [np.arange(3 * n) < n for n in (model.width, model.centre**2)]  # static, then cosine and sine
        of_slices = np.tile(np.concatenate(static), slices)
        return {"_static": of_slices, "_dynamic": ~of_slices}

    def _embed(self, engine: Engine, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings ``subject feature`` and labels ``subject label`` of a split, in the order of its rows."""
        features, labels = [], []
        for batch in self._batches(split):
            features.append(engine(self.prepare.embedding(batch))[EMBEDDING]["vector"])
            labels.append(batch.labels)
        mine = torch.cat([torch.cat(features), torch.cat(labels)], dim=1)
        both = self._gathered(mine, split)
        split_at = both.shape[1] - len(self.labels)
        return both[:, :split_at], both[:, split_at:]

    def _figure(self, engine: Engine) -> Figure | None:
        """k-space, zero-filled image and reconstruction of one held-out subject at the recipe's own accelerations."""
        reader = self.readers["val"]
        read = pipeline.read_in_order(reader, self.rows["val"][:1].tolist(), 1, self.config)
        batch = next(iter(read)).to(self.device)
        present = (~batch.padded).sum(-1)[0]
        z = int(torch.argmax((present == present.max()).to(torch.uint8) * (1 + _middle(len(present), self.device))))
        queried = torch.zeros_like(batch.sampled)
        queried[:, z] = batch.existing[:, z]
        inputs = self.prepare.queries(batch, queried)
        values, targets = engine(inputs, predict=True)["masked"]["values"], inputs.tasks["masked"].targets
        filled = self.prepare.readers["kspace"].lines.fill(batch.kspace, batch.sampled, values, targets)
        if self.rank != 0:
            return None
        from kmtr.report import figures_kspace as figures  # with Matplotlib, which the other workers do not need

        frames = slice(0, int(present[z]))
        sampled = batch.sampled[0, z, frames].cpu().numpy()
        shown = (slice(0, 1), slice(z, z + 1), frames)
        r = true_acceleration(batch.sampled[shown], batch.existing[shown])

        def image(kspace: torch.Tensor) -> np.ndarray:
            return magnitude_image(kspace[0, z])[frames].cpu().numpy()

        kept = batch.kspace * batch.sampled[:, :, None, :, :, None]
        return figures.reconstruction(
            batch.kspace[0, z, 0, frames].cpu().numpy(),
            sampled,
            image(kept),
            image(filled),
            image(batch.kspace),
            f"{self.shown}, R = {float(r):.2f} (true), family {self.config.sampling.family}",
        )


def _middle(slices: int, device: torch.device) -> torch.Tensor:
    """Preference for the middle of the first half of the slots, where the short axis is."""
    position = torch.arange(slices, device=device)
    return slices - (position - slices // 3).abs()
