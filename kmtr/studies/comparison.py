"""Comparison of many methods at few labels, by their predictions for the same held-out subjects.

Files of a study, each written once and whole, so that a study that was killed goes on where it stopped:

    features/<source>-<R>-<labels>.npz             of labelled and held-out subjects, at one acceleration
    predictions/<seed>-<method>-<labels>.parquet   rows of one method (`evaluate.predictions`), at all accelerations
    predictions.parquet                            all rows that the tables are computed from
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float

from kmtr import machine
from kmtr.config import RunConfig, Study, override
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader import patterns, pipeline, subjects
from kmtr.encoder import WEIGHTS, load_encoder
from kmtr.evaluate import baselines, probes
from kmtr.evaluate.predictions import CENTRAL, FILE, LINES, MEAN, RIDGE, HeldOut, Name, joined, read, rows, write
from kmtr.evaluate.predictors import Features, predict, true_accelerations
from kmtr.evaluate.scores import Result, panel, results_of, summary
from kmtr.metrics import fit_ridges
from kmtr.studies.running import each
from kmtr.train import supervised

VERSION = 4
"""Version of a study; one of another version starts anew."""

MOST_ROWS = 2000
"""Rows of an augmented ridge at most: its time grows with their third power. More subjects get fewer copies."""

BASELINES: dict[str, tuple[str, Features]] = {
    "central": (CENTRAL.input, baselines.central),
    "lowres": (RIDGE.input, baselines.low_resolution),
}
"""Name -> input of the baseline, and its features."""


@dataclass(frozen=True)
class Cohort:
    """Labelled and held-out subjects, with their labels.

    Attributes:
        config: settings of reading; its patterns are those of all methods.
        folder: the study's, in which all its files lie.
        budgets: numbers of labelled subjects, ascending.
        labelled: seed -> rows of the training split; a smaller budget is the beginning of a larger one.
        rows: places of the held-out subjects in the test split, the same for all seeds.
        labels: seed -> labels of its `labelled` subjects, NaN where unknown.
        held_out: pseudonyms, targets and truth of the held-out subjects.
    """

    config: RunConfig
    folder: Path
    budgets: tuple[int, ...]
    labelled: dict[int, list[int]]
    rows: list[int]
    labels: dict[int, Float[np.ndarray, "subject target"]]
    held_out: HeldOut

    @property
    def targets(self) -> tuple[str, ...]:
        return self.held_out.targets

    @property
    def truth(self) -> Float[np.ndarray, "subject target"]:
        return self.held_out.truth

    @property
    def accelerations(self) -> tuple[int, ...]:
        return self.config.evaluate.accelerations

    def reader(self, split: str) -> Reader:
        """A reader of a split; opened where it is needed, since it does not travel."""
        return Dataset.open(self.config.data).reader(split, self.config.data)

    def at(self, acceleration: int) -> RunConfig:
        """The configuration that samples at this R."""
        return override(self.config, {"sampling.accelerations": (acceleration,)})


def cohort(config: RunConfig, dataset: Dataset, folder: Path, budgets: Sequence[int]) -> Cohort:
    """Labelled subjects of every seed and the held-out ones.

    Raises:
        InputError: a split has fewer than 3 subjects, or none of the targets is labelled.
    """
    targets = probes.targets_of(config.study.targets, dataset, "study.targets")
    readers = probes.readers_of(dataset, config, "study")
    there = len(readers["train"])
    some: tuple[int, ...] = tuple(sorted({min(budget, there) for budget in budgets}))
    labelled = {seed: subjects.labelled(seed, there, some[-1]) for seed in config.study.seeds}
    labels = {seed: subjects.labels_of(readers["train"], mine, targets) for seed, mine in labelled.items()}
    asked = subjects.held_out(config.seed, len(readers["test"]), config.evaluate.subjects)
    held_out = probes.held_out_of(readers["test"], asked, targets)
    return Cohort(config, folder, some, labelled, asked, labels, held_out)


_NAMED = {"seeds", "labels", "ablation_labels", "longer_steps", "longer_seeds", "groups", "concurrent"} | {
    "task_labels",
    "single_labels",
    "rows",
    "train",
}
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
        encoder: folder of an exported encoder; empty: the baseline of this name.
        untrained: take its architecture with initial weights.
        seeds: seeds that drew the labelled subjects.
        augmented: add copies of the labelled subjects, augmented as training does.
    """

    name: str
    encoder: str = ""
    untrained: bool = False
    seeds: tuple[int, ...] = ()
    augmented: bool = False

    @property
    def input(self) -> str:
        """Name of the input: the part of a subject that the features are made of."""
        return LINES if self.encoder else BASELINES[self.name][0]

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
        said = f"{self.rows(cohort, budget)} {cohort.rows} {self.untrained} {self.copies(cohort, budget)} " + (
            hashlib.sha256((Path(self.encoder) / WEIGHTS).read_bytes()).hexdigest() if self.encoder else ""
        )
        name = f"{self.name}-R{acceleration}-{budget}-{hashlib.sha256(said.encode()).hexdigest()[:8]}.npz"
        return cohort.folder / "features" / name


def write_features(cohort: Cohort, source: Source, acceleration: int, budget: int) -> None:
    """Features of a source at one R, of its labelled and of the held-out subjects, on validation's patterns.

    The labelled ones' are ``subject copy feature``: as they are, then augmented copies on patterns of their own.
    """
    make: Features
    device = machine.device(cohort.config.train.device)
    if source.encoder:
        make = load_encoder(source.encoder, device, untrained=source.untrained).features
    else:
        make = BASELINES[source.name][1]
    mine, config, on = source.rows(cohort, budget), cohort.at(acceleration), torch.device(device)
    found: dict[str, list[np.ndarray]] = {"train": [], "test": [], "true_acceleration": []}
    for split, wanted in (("train", mine), ("test", cohort.rows)):
        for host in pipeline.read_in_order(cohort.reader(split), wanted, probes.CHUNK, config):
            batch = host.to(on)
            found[split].append(make(batch))
            if split == "test":
                found["true_acceleration"].append(true_accelerations(batch))
    arrays = {name: np.concatenate(parts) for name, parts in found.items()}
    augmented = _augmented_copies(cohort, mine, source.copies(cohort, budget), config, make, on)
    arrays |= {"rows": np.array(mine), "train": np.stack([arrays["train"], *augmented], 1)}
    _save(source.path(cohort, acceleration, budget), arrays)


def _augmented_copies(
    cohort: Cohort, rows: list[int], count: int, config: RunConfig, make: Features, device: torch.device
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


def part(cohort: Cohort, seed: int, method: str, budget: int) -> Path:
    """File of the rows of one method, seed and number of labels."""
    return cohort.folder / "predictions" / f"{seed}-{method}-{budget}.parquet"


def write_probes(cohort: Cohort, source: Source, method: str, seed: int) -> None:
    """Rows of ridge probes of a source's features at each R, for every budget that is not done yet."""
    open_ones = [b for b in cohort.budgets if not part(cohort, seed, method, b).is_file()]
    said: dict[int, list[pa.Table]] = {budget: [] for budget in open_ones}
    for acceleration in cohort.accelerations:
        for within in source.budgets(cohort):
            with np.load(source.path(cohort, acceleration, within)) as file:
                found = dict(file)
            for budget in open_ones if not source.augmented else [b for b in open_ones if b == within]:
                mine = found["train"][np.searchsorted(found["rows"], cohort.labelled[seed][:budget])]
                ridges = fit_ridges(mine, cohort.labels[seed][:budget], cohort.targets)
                values = np.full(cohort.truth.shape, np.nan)
                for target, ridge in ridges.items():
                    values[:, cohort.targets.index(target)] = ridge(found["test"])
                said[budget].append(
                    rows(
                        Name(method, source.input),
                        cohort.held_out,
                        values,
                        acceleration=acceleration,
                        seed=seed,
                        labels=budget,
                        true_acceleration=found["true_acceleration"],
                    )
                )
    for budget, tables in said.items():
        write(part(cohort, seed, method, budget), joined(tables))


def write_mean(cohort: Cohort, seed: int, budget: int) -> None:
    """Rows that always say the mean of the labels."""
    path = part(cohort, seed, MEAN.system, budget)
    if path.is_file():
        return
    mean, _ = supervised.moments(cohort.labels[seed][:budget])
    values = np.broadcast_to(mean, cohort.truth.shape)
    write(
        path,
        joined(
            [
                rows(MEAN, cohort.held_out, values, acceleration=r, seed=seed, labels=budget)
                for r in cohort.accelerations
            ]
        ),
    )


def write_trained(cohort: Cohort, encoder: str, method: str, seed: int, budget: int, scratch: bool) -> None:
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
    mine = cohort.labelled[seed][:budget]
    labelled = supervised.Labelled.read(cohort.reader("train"), mine, config, cohort.targets)
    start = load_encoder(encoder, machine.device(config.train.device), untrained=scratch)
    regressor = supervised.Regressor(start, labelled.labels, config.train.bf16)
    regressor.standardise(labelled)
    supervised.train(regressor, labelled, training, config)
    predictor = supervised.Regressed(regressor, cohort.targets)
    reader, readout = cohort.reader("test"), regressor.encoder.readout
    said = [
        predict(
            {Name(method, LINES): predictor},
            pipeline.read_in_order(reader, cohort.rows, probes.CHUNK, cohort.at(r)),
            cohort.held_out,
            config.data,
            acceleration=r,
            seed=seed,
            labels=budget,
            device=regressor.device,
            readout=readout,
        )
        for r in cohort.accelerations
    ]
    write(part(cohort, seed, method, budget), joined(said))


def probe_all(cohort: Cohort, sources: Mapping[tuple[int, str], Source]) -> None:
    """Rows of the probes of all (seed, method) from their sources, and of the mean; what is there stays."""
    missing = {
        (seed, method): source
        for (seed, method), source in sources.items()
        if not all(part(cohort, seed, method, budget).is_file() for budget in cohort.budgets)
    }
    distinct = list(dict.fromkeys(missing.values()))
    features = [
        (cohort, source, r, budget)
        for source in distinct
        for r in cohort.accelerations
        for budget in source.budgets(cohort)
        if not source.path(cohort, r, budget).is_file()
    ]
    each(write_features, features, "study: features", cohort.config.train.device)
    probes = [(cohort, source, method, seed) for (seed, method), source in missing.items()]
    each(write_probes, probes, "study: probes", "cpu")
    for seed in {seed for seed, _ in sources}:
        for budget in cohort.budgets:
            write_mean(cohort, seed, budget)


def augmentation(study: Study) -> dict[str, Any]:
    """Settings of augmentation between epochs, by what no phenotype depends on."""
    return {"augment.shift": study.shift, "augment.rotation_deg": study.rotation_deg}


def gather(cohort: Cohort, wanted: Collection[tuple[str, int, int]]) -> dict[tuple[str, int, int], Result]:
    """Rows of all parts made one file, ``predictions.parquet``, and the results that it holds.

    Args:
        wanted: (method, seed, number of labels) of each part; the mean's are taken as well.
    """
    asked = dict.fromkeys([*wanted, *((MEAN.system, seed, budget) for _, seed, budget in wanted)])
    path = cohort.folder / FILE
    write(path, joined([read(part(cohort, seed, method, budget)) for method, seed, budget in asked]))
    return results_of(panel(read(path), cohort.accelerations, cohort.targets))


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        np.savez(file, **dict(arrays))  # type: ignore[arg-type]
    temporary.replace(path)


def scores(results: Sequence[Result], cohort: Cohort) -> Mapping[str, Mapping[str, float]]:
    """`scores.summary` of results for the cohort's held-out subjects."""
    return summary(results, cohort.truth, cohort.accelerations, cohort.targets)
