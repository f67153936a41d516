"""Comparison of many methods at few labels, by their predictions for the same held-out subjects.

Files of a study, each written once and whole, so that a study that was killed goes on where it stopped:

    features/<source>-<R>-<labels>.npz           of labelled and held-out subjects, at one acceleration
    predictions/<seed>-<method>-<labels>.npz     of held-out subjects, at all accelerations
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from kmtr.config import RunConfig, Study, override
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader import patterns, pipeline
from kmtr.data.loader.order import permutation
from kmtr.encoder import WEIGHTS, load_encoder
from kmtr.evaluate import baselines, probes
from kmtr.metrics import probe
from kmtr.physics.sampling import VALIDATION
from kmtr.train import supervised
from kmtr.types import InputError

VERSION = 3
"""Version of a study; one of another version starts anew."""

MOST_ROWS = 2000
"""Rows of an augmented ridge at most: its time grows with their third power. More subjects get fewer copies."""

BASELINES: dict[str, probes.Features] = {"central": baselines.central, "lowres": baselines.low_resolution}


@dataclass(frozen=True)
class Cohort:
    """Labelled and held-out subjects, with their labels.

    Attributes:
        config: of the reading: its patterns are everybody's.
        folder: of the study.
        budgets: numbers of labelled subjects, ascending.
        labelled: seed -> rows of the training split; a smaller budget is the beginning of a larger one.
        held_out: rows of the test split, the same for all seeds.
        labels: seed -> of `labelled`, NaN where unknown.
        truth: of `held_out`.
    """

    config: RunConfig
    folder: Path
    targets: tuple[str, ...]
    budgets: tuple[int, ...]
    labelled: dict[int, list[int]]
    held_out: list[int]
    labels: dict[int, Float[np.ndarray, "subject target"]]
    truth: Float[np.ndarray, "held_out target"]

    @property
    def accelerations(self) -> tuple[int, ...]:
        return self.config.evaluate.accelerations

    def reader(self, split: str) -> Reader:
        return Dataset.open(self.config.data).reader(split, self.config.data)

    def at(self, acceleration: int) -> RunConfig:
        """The configuration that samples at this R."""
        return override(self.config, {"sampling.accelerations": (acceleration,)})


@dataclass(frozen=True)
class Result:
    """Predictions of one method, seed and budget for the held-out subjects, in the targets' units.

    Attributes:
        predicted: NaN where a target has too few labels.
        mean: of the labels it learnt from: what R2 compares with.
    """

    predicted: Float[np.ndarray, "acceleration subject target"]
    mean: Float[np.ndarray, " target"]

    def r2(self, truth: Float[np.ndarray, "subject target"]) -> Float[np.ndarray, "acceleration target"]:
        """NaN where fewer than 3 held-out subjects have the label."""
        error, spread = _squares(self, truth)
        with np.errstate(invalid="ignore"):
            return np.asarray(1 - error.sum(1) / spread.sum(0))


def cohort(config: RunConfig, dataset: Dataset, folder: Path, budgets: Sequence[int]) -> Cohort:
    """Labelled subjects of every seed and the held-out ones.

    Raises:
        InputError: a split has fewer than 3 subjects, or none of the targets is labelled.
    """
    targets = tuple(name for name in config.study.targets if dataset.labels.get(name))
    if not targets:
        wanted, known = ", ".join(config.study.targets), ", ".join(dataset.labels) or "no labels"
        raise InputError(f"study.targets: expected at least one that the dataset has, got {wanted}; it has {known}")
    readers = {split: dataset.reader(split, config.data) for split in ("train", "test")}
    for split, reader in readers.items():
        if len(reader) < 3:
            raise InputError(f"study: expected at least 3 subjects in split {split}, got {len(reader)}")
    there = len(readers["train"])
    some: tuple[int, ...] = tuple(sorted({min(budget, there) for budget in budgets}))
    labelled = {seed: permutation(seed + 2, 0, there)[: some[-1]].tolist() for seed in config.study.seeds}
    held_out = permutation(config.seed + 2, 0, len(readers["test"]))[: config.evaluate.subjects].tolist()
    labels = {seed: _labels(readers["train"], rows, targets) for seed, rows in labelled.items()}
    return Cohort(
        config, folder, targets, some, labelled, held_out, labels, _labels(readers["test"], held_out, targets)
    )


def _labels(reader: Reader, rows: list[int], targets: Sequence[str]) -> np.ndarray:
    meta = reader.samples(rows).meta
    return np.stack([meta.column(name).to_numpy().astype(np.float64) for name in targets], axis=1)


_NAMED = {"seeds", "labels", "ablation_labels", "longer_steps", "longer_seeds", "groups", "concurrent"}
"""Settings of a study that the names of its files tell, or that change no result."""


def digest(config: RunConfig, run_name: str) -> str:
    """Hash of all that decides a study but its seeds, budgets and encoders, which name its files."""
    study = config.study.model_dump_json(exclude=_NAMED)
    reading = config.evaluate.model_dump_json(include={"accelerations", "subjects"}) + patterns.digest(config.sampling)
    said = f"{VERSION} {baselines.VERSION} {run_name} {study} {reading} {config.seed}"
    return hashlib.sha256(said.encode()).hexdigest()[:8]


# ----------------------------------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class Source:
    """Source of features.

    Attributes:
        encoder: folder of an exported one; empty: the baseline of this name.
        untrained: its architecture with initial weights.
        seeds: whose labelled subjects need features.
        augmented: labelled subjects are there in more copies, augmented as training does.
    """

    name: str
    encoder: str = ""
    untrained: bool = False
    seeds: tuple[int, ...] = ()
    augmented: bool = False

    def budgets(self, cohort: Cohort) -> tuple[int, ...]:
        """Numbers of labelled subjects that have a file each: all in one where nothing moves, else each in its own,
        since the more there are, the fewer copies.
        """
        return cohort.budgets if self.augmented else cohort.budgets[-1:]

    def copies(self, cohort: Cohort, budget: int) -> int:
        """Augmented copies of each labelled subject."""
        return min(cohort.config.study.copies, max(1, MOST_ROWS // budget - 1)) if self.augmented else 0

    def rows(self, cohort: Cohort, budget: int) -> list[int]:
        return sorted({row for seed in self.seeds for row in cohort.labelled[seed][:budget]})

    def path(self, cohort: Cohort, acceleration: int, budget: int) -> Path:
        """Named by all that decides the features."""
        said = f"{self.rows(cohort, budget)} {cohort.held_out} {self.untrained} {self.copies(cohort, budget)} " + (
            hashlib.sha256((Path(self.encoder) / WEIGHTS).read_bytes()).hexdigest() if self.encoder else ""
        )
        name = f"{self.name}-R{acceleration}-{budget}-{hashlib.sha256(said.encode()).hexdigest()[:8]}.npz"
        return cohort.folder / "features" / name


def write_features(cohort: Cohort, source: Source, acceleration: int, budget: int, device: str) -> None:
    """Features of a source at one R, of its labelled and of the held-out subjects, on validation's patterns.

    The labelled ones' are ``subject copy feature``: as they are, then augmented copies on patterns of their own.
    """
    if source.encoder:
        make = probes.embedding(load_encoder(source.encoder, device, untrained=source.untrained))
    else:
        make = BASELINES[source.name]
    rows, config, on = source.rows(cohort, budget), cohort.at(acceleration), torch.device(device)
    found = {"rows": np.array(rows)}
    for split, wanted in (("train", rows), ("test", cohort.held_out)):
        read = pipeline.read_in_order(cohort.reader(split), wanted, probes.CHUNK, config, cohort.targets, VALIDATION)
        found[split] = np.concatenate([make(host.to(on)) for host in read])
    augmented = _augmented_copies(cohort, rows, source.copies(cohort, budget), config, make, on)
    found["train"] = np.stack([found["train"], *augmented], 1)
    _save(source.path(cohort, acceleration, budget), found)


def _augmented_copies(
    cohort: Cohort, rows: list[int], count: int, config: RunConfig, make: probes.Features, device: torch.device
) -> list[Float[np.ndarray, "subject feature"]]:
    """Features of the first `count` epochs of labelled subjects, as training sees them."""
    moving, reader = override(config, augmentation(config.study)), cohort.reader("train")
    copies: list[list[np.ndarray]] = [[] for _ in range(count)]
    for first in range(0, len(rows) if count else 0, probes.CHUNK):
        some = supervised.Labelled.read(reader, rows[first : first + probes.CHUNK], moving, cohort.targets)
        for epoch, parts in enumerate(copies):
            parts.append(make(some.batch(np.arange(len(some)), np.full(len(some), epoch), device)))
    return [np.concatenate(parts) for parts in copies]


# -------------------------------------------------------------------------------------------------------- predictions


def result_path(cohort: Cohort, seed: int, method: str, budget: int) -> Path:
    return cohort.folder / "predictions" / f"{seed}-{method}-{budget}.npz"


def write_probes(cohort: Cohort, source: Source, method: str, seed: int) -> None:
    """Ridge probes of a source's features at each R, for every budget that is not done yet."""
    open_ones = [b for b in cohort.budgets if not result_path(cohort, seed, method, b).is_file()]
    shape = (len(cohort.accelerations), *cohort.truth.shape)
    predicted = {budget: np.full(shape, np.nan) for budget in open_ones}
    for i, acceleration in enumerate(cohort.accelerations):
        for within in source.budgets(cohort):
            with np.load(source.path(cohort, acceleration, within)) as found:
                rows, train, test = found["rows"], found["train"], found["test"]
            for budget in open_ones if not source.augmented else [b for b in open_ones if b == within]:
                mine = train[np.searchsorted(rows, cohort.labelled[seed][:budget])]
                for j, target in enumerate(cohort.labels[seed][:budget].T):
                    # It is asked of every held-out subject; which of them are labelled, R2 looks up itself.
                    fitted = probe(mine, target, test, np.zeros(len(test)))
                    if fitted is not None:
                        predicted[budget][i, :, j] = fitted.predicted
    for budget in open_ones:
        _write_result(cohort, seed, method, budget, predicted[budget])


def write_mean(cohort: Cohort, seed: int, budget: int) -> None:
    """Always the mean of the labels."""
    shape = (len(cohort.accelerations), *cohort.truth.shape)
    mean, _ = supervised.moments(cohort.labels[seed][:budget])
    _write_result(cohort, seed, "mean", budget, np.broadcast_to(mean, shape))


def write_trained(
    cohort: Cohort, encoder: str, method: str, seed: int, budget: int, scratch: bool, device: str
) -> None:
    """Train an encoder on the labels of a budget, from its weights or from scratch, and ask it at each R.

    One model for all R, which every epoch draws anew for a subject, as in pretraining.
    """
    study = cohort.config.study
    if scratch:
        training = supervised.Training(
            study.scratch_steps, study.scratch_learning_rate, study.batch, study.warmup_steps
        )
    else:
        training = supervised.Training(study.steps, study.learning_rate, study.batch, study.warmup_steps)
    config = override(
        cohort.config, {"sampling.accelerations": cohort.accelerations, "seed": seed, **augmentation(study)}
    )
    rows = cohort.labelled[seed][:budget]
    labelled = supervised.Labelled.read(cohort.reader("train"), rows, config, cohort.targets)
    regressor = supervised.Regressor(
        load_encoder(encoder, device, untrained=scratch), labelled.labels, config.train.bf16
    )
    regressor.standardise(labelled)
    supervised.train(regressor, labelled, training, config)
    reader = cohort.reader("test")
    predicted = [
        supervised.predict_rows(regressor, reader, cohort.held_out, cohort.at(r), cohort.targets)
        for r in cohort.accelerations
    ]
    _write_result(cohort, seed, method, budget, np.stack(predicted))


def augmentation(study: Study) -> dict[str, Any]:
    """Settings of augmentation between epochs, by what no phenotype depends on."""
    return {"augment.shift": study.shift, "augment.rotation_deg": study.rotation_deg}


def read_result(cohort: Cohort, seed: int, method: str, budget: int) -> Result:
    with np.load(result_path(cohort, seed, method, budget)) as found:
        return Result(found["predicted"], found["mean"])


def _write_result(cohort: Cohort, seed: int, method: str, budget: int, predicted: np.ndarray) -> None:
    mean, _ = supervised.moments(cohort.labels[seed][:budget])
    _save(result_path(cohort, seed, method, budget), {"predicted": predicted, "mean": mean})


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        np.savez(file, **dict(arrays))  # type: ignore[arg-type]
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Difference:
    """Mean R2 of one method over another's, on the same held-out subjects.

    Attributes:
        value: mean over seeds, accelerations and targets.
        subjects: 95 % bootstrap interval over held-out subjects, the seeds as they are.
        both: the same over seeds too; where there is one seed, that of `subjects`.
        each: of every seed.
    """

    value: float
    subjects: tuple[float, float]
    both: tuple[float, float]
    each: tuple[float, ...]


def difference(
    a: Sequence[Result],
    b: Sequence[Result],
    truth: Float[np.ndarray, "subject target"],
    resamples: int,
    accelerations: Iterable[int] | None = None,
    targets: Iterable[int] | None = None,
) -> Difference:
    """R2(a) - R2(b), paired by held-out subject and by seed.

    Args:
        a, b: one result per seed, in the same order.
        accelerations, targets: indices whose mean is taken; None: all.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"difference: expected as many results of both, at least one, got {len(a)} and {len(b)}")
    which_r = slice(None) if accelerations is None else list(accelerations)
    which_t = slice(None) if targets is None else list(targets)
    rng = np.random.Generator(np.random.Philox(0))
    subjects = len(truth)
    counts = rng.multinomial(subjects, np.full(subjects, 1 / subjects), size=resamples).astype(np.float64)
    counts = np.concatenate([np.ones((1, subjects)), counts])  # the first is the cohort itself
    gains = []
    for one, other in zip(a, b, strict=True):
        missed = []  # 1 - R2
        for error, spread in (_squares(one, truth), _squares(other, truth)):
            with np.errstate(invalid="ignore"):
                total = np.einsum("ns,rst->nrt", counts, error[which_r][..., which_t])
                missed.append(total / (counts @ spread[:, which_t])[:, None])
        gains.append(np.nanmean(missed[1] - missed[0], axis=(1, 2)))
    each = np.stack(gains, axis=1)
    drawn = rng.integers(0, len(a), (resamples, len(a)))
    both = np.take_along_axis(each[1:], drawn, axis=1).mean(1)
    return Difference(float(each[0].mean()), _interval(each[1:].mean(1)), _interval(both), tuple(map(float, each[0])))


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def _squares(
    result: Result, truth: Float[np.ndarray, "subject target"]
) -> tuple[Float[np.ndarray, "acceleration subject target"], Float[np.ndarray, "subject target"]]:
    """Squared error of a result and of the mean; both zero where a label is unknown, so that nothing counts there."""
    known = np.isfinite(truth) & np.isfinite(result.mean)
    error = np.where(known, result.predicted - truth, 0.0) ** 2
    return error, np.where(known, truth - result.mean, 0.0) ** 2


def scores(results: Sequence[Result], cohort: Cohort) -> dict[str, Any]:
    """R2 of each acceleration and target, mean over seeds and its SD: what a table and a file show."""
    each = np.stack([result.r2(cohort.truth) for result in results])
    mean = np.nanmean(each, axis=2)
    spread = mean.std(0, ddof=1) if len(results) > 1 else np.zeros(mean.shape[1])
    return {
        str(r): {
            "mean": float(mean[:, i].mean()),
            "sd": float(spread[i]),
            **{target: float(each[:, i, j].mean()) for j, target in enumerate(cohort.targets)},
        }
        for i, r in enumerate(cohort.accelerations)
    }
