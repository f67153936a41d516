"""Predictions of a model of tasks and of its floors for held-out subjects, all of the same labels and patterns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float

from kmtr import machine
from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import NOTHING, Wanted
from kmtr.encoder import KSpaceEncoder
from kmtr.evaluate import baselines, masks, probes
from kmtr.evaluate.mapped import Mapped
from kmtr.evaluate.predictions import (
    CEILING,
    LOWRANK,
    READ_OFF,
    RIDGE,
    SHARED,
    UNTRAINED,
    ZEROFILLED,
    HeldOut,
    Name,
    joined,
    model_name,
)
from kmtr.evaluate.predictions import rows as predictions_of
from kmtr.evaluate.predictors import Features, Predictor, ReadOff, predict
from kmtr.inference import TaskModel
from kmtr.metrics import from_phenotypes
from kmtr.metrics.areas import AreaMap
from kmtr.metrics.dense import DICE, DISTANCES, IMAGES, IN_BOX, masks_phenotypes
from kmtr.metrics.from_phenotypes import Regressions
from kmtr.physics.sampling import VALIDATION
from kmtr.progress import Bar
from kmtr.systems import at_once
from kmtr.train import start
from kmtr.types import DISEASES, PHENOTYPES


def predictions(
    config: RunConfig,
    dataset: Dataset,
    model: TaskModel,
    labelled: Sequence[int] | None = None,
    systems: Literal["all", "model", "floors"] = "all",
    command: str = "finetune",
    by_areas: Sequence[str] = (),
) -> pa.Table:
    """Rows of the model and of its floors for the test split; arguments as of `by_split`."""
    return by_split(config, dataset, model, ("test",), labelled, systems, command, by_areas).tables["test"]


@dataclass(frozen=True)
class Answered:
    """Predictions of systems for held-out subjects.

    Attributes:
        tables: split -> rows.
        maps: nominal R -> the model's map from areas of its masks.
    """

    tables: dict[str, pa.Table]
    maps: dict[int, AreaMap]


def by_split(
    config: RunConfig,
    dataset: Dataset,
    model: TaskModel,
    splits: Sequence[str] = ("test",),
    labelled: Sequence[int] | None = None,
    systems: Literal["all", "model", "floors"] = "all",
    command: str = "finetune",
    by_areas: Sequence[str] = (),
) -> Answered:
    """Rows of the model and of its floors, all of the same held-out subjects, labels and patterns: for the test split,
    and of validation subjects, who choose thresholds of diseases (`thresholds`), and what a model answers by areas.

    Args:
        config: its seed draws the held-out subjects, and the patterns.
        labelled: training subjects that the floors are fitted on; None: those whose labels the run had.
        systems: those that are asked; the ceiling goes with the floors.
        command: for the screen, and for errors.
        by_areas: phenotypes that maps make of the areas of all masks besides (`metrics.areas`), fitted on the first of
            `labelled` as a draw orders them; and diseases that are read off these.
    """
    device = torch.device(machine.device(config.train.device))
    train = probes.readers_of(dataset, config, command)["train"]
    if labelled is None:
        labelled = start.labelled(config, dataset)
    asked = [one for split in splits for one in asked_of(config, dataset, model, split, by_areas)]
    floors = Floors.of(config, dataset, model, train, labelled) if systems != "model" else None
    who = trained(config)
    ours = Name(who.system, model.reads or who.input)
    mapped = Mapped.of(config, train, labelled, by_areas)
    drawing = {ours: model.masks} if systems != "floors" else {}
    total = sum(len(one.rows) for one in asked) + mapped.readings(bool(drawing), bool(floors))
    total += floors.readings * len(labelled) if floors else 0
    tell = probes.Counter(Bar(f"{command}: subjects"), len(config.evaluate.accelerations) * total)
    parts: dict[str, list[pa.Table]] = {split: [] for split in splits}
    kept: dict[int, AreaMap] = {}
    about: dict[str, Any] = {"seed": config.seed, "labels": len(labelled)}
    for r in config.evaluate.accelerations:
        fixed = override(config, {"sampling.accelerations": (r,)})
        about |= {"acceleration": r}
        fitted = floors.numbers(fixed, tell) if floors else {}
        dense = floors.dense(fixed, tell) if floors and any(one.of == "all" for one in asked) else {}
        maps = mapped.of_model(fixed, drawing, tell) | (mapped.of_floor(fixed, masks.fit, tell) if floors else {})
        kept |= {r: maps[ours]} if ours in maps else {}
        for one in asked:
            own: dict[Name, Predictor] = {}
            if systems != "floors":
                asking: dict[str, Predictor] = {"all": model, "measured": model.measured, "numbers": model.numbers}
                own[ours] = asking[one.of]
            own |= fitted
            if one.of == "all":
                own |= dense
            chunk = at_once(fixed, probes.CHUNK)
            batches = tell(pipeline.read_in_order(one.reader, one.rows, chunk, fixed, one.wanted, VALIDATION))
            found = predict(own, batches, one.held_out, config.data, device=device, areas=maps, **about)
            parts[one.split].append(found)
            if floors:
                values = ceiling(dataset, one, floors.regressions)
                parts[one.split].append(predictions_of(CEILING, one.held_out, values, **about))
    return Answered({split: joined(tables) for split, tables in parts.items()}, kept)


@dataclass(frozen=True)
class Floors:
    """Systems beside the model that need no trained network, fitted on labelled training subjects at one R at a time.

    Attributes:
        rows: the labelled subjects, in the training split.
        known: their labels; NaN: unknown.
        phenotypes: theirs, as far as the dataset has them.
        regressions: from these to diseases.
    """

    model: TaskModel
    reader: Reader
    rows: Sequence[int]
    targets: tuple[str, ...]
    known: Float[np.ndarray, "subject target"]
    phenotypes: dict[str, Float[np.ndarray, " subject"]]
    regressions: Regressions

    @classmethod
    def of(cls, config: RunConfig, dataset: Dataset, model: TaskModel, reader: Reader, rows: Sequence[int]) -> Floors:
        """Read the labels of training subjects, and fit what no R changes."""
        targets = targets_of(model, dataset)
        known = subjects.labels_of(reader, rows, targets)
        phenotypes = phenotypes_of(dataset, reader, rows)
        diseases = {name: known[:, i] for i, name in enumerate(targets) if name in DISEASES}
        return cls(model, reader, rows, targets, known, phenotypes, from_phenotypes.fit(phenotypes, diseases))

    @property
    def readings(self) -> int:
        """Passes over the labelled subjects at each R."""
        return int(bool(self.targets)) + int("segmentation" in self.model.prepare.tasks)

    def numbers(self, fixed: RunConfig, tell: probes.Counter) -> dict[Name, Predictor]:
        """Predictors of phenotypes and diseases, fitted at the R of these settings; `tell` counts the subjects read."""
        if not self.targets:
            return {}
        device = torch.device(machine.device(fixed.train.device))
        more = {name: self.phenotypes[name] for name in self.regressions.phenotypes if name not in self.targets}
        read = tell(pipeline.read_in_order(self.reader, self.rows, probes.CHUNK, fixed, NOTHING, VALIDATION))
        found: dict[Name, Predictor] = {}
        found |= probes.fit(sources(self.model), read, self.known, self.targets, device, {RIDGE: more})
        if self.regressions.of:
            found[READ_OFF] = ReadOff(found[RIDGE], self.regressions)
        return found

    def dense(self, fixed: RunConfig, tell: probes.Counter) -> dict[Name, Predictor]:
        """Predictors of masks and images, fitted at the R of these settings; `tell` counts the subjects read."""
        found: dict[Name, Predictor] = {}
        tasks, matrix = self.model.prepare.tasks, fixed.data.matrix
        if "segmentation" in tasks:
            read = tell(pipeline.read_in_order(self.reader, self.rows, probes.CHUNK, fixed, masks.MASKS, VALIDATION))
            found |= masks.fit(fixed, self.reader, self.rows, read)
        if "reconstruction" in tasks:
            found |= {
                ZEROFILLED: baselines.zerofilled_image(matrix),
                SHARED: baselines.shared_image(matrix),
                LOWRANK: baselines.lowrank_image(matrix),
            }
        return found


def phenotypes_of(dataset: Dataset, reader: Reader, rows: Sequence[int]) -> dict[str, Float[np.ndarray, " subject"]]:
    """Phenotypes of these rows of a split, as far as the dataset has them; NaN: unknown."""
    names = [name for name in PHENOTYPES if dataset.labels.get(name)]
    return dict(zip(names, subjects.labels_of(reader, rows, names).T, strict=True))


def ceiling(dataset: Dataset, asked: Asked, regressions: Regressions) -> Float[np.ndarray, "subject target"]:
    """Probabilities of diseases by these subjects' true phenotypes; NaN for all other targets."""
    known = phenotypes_of(dataset, asked.reader, asked.rows)
    features = [known[name] for name in regressions.phenotypes]
    return regressions(
        np.stack(features, axis=1) if features else np.empty((len(asked.rows), 0)), asked.held_out.targets
    )


@dataclass(frozen=True)
class Asked:
    """Subjects of a split that systems are asked about, and the columns that this takes.

    Attributes:
        of: what they are asked for: numbers alone, also such as are measured on masks, or all, with the scores of masks
            and images.
    """

    split: str
    of: Literal["all", "measured", "numbers"]
    reader: Reader
    rows: list[int]
    held_out: HeldOut
    wanted: Wanted


def asked_of(
    config: RunConfig, dataset: Dataset, model: TaskModel, split: str, by_areas: Sequence[str] = ()
) -> list[Asked]:
    """Subjects of a split. Those of the test split are asked for all that the model says, those of another one for
    diseases, and for what there is by areas; from `evaluate.dense` on for numbers alone.
    """
    reader = dataset.reader(split, config.data)
    rows = subjects.held_out(config.seed, len(reader), config.evaluate.subjects)
    targets, whole = targets_of(model, dataset), slice(config.evaluate.dense or None)
    if split == "test":
        held_out = scored(probes.held_out_of(reader, rows, targets), model)
        found = [Asked(split, "all", reader, rows[whole], held_out[whole], Wanted(masks=model.prepare.wanted.masks))]
    else:
        asked = tuple(name for name in targets if name in DISEASES or name in by_areas)
        held_out, whole = probes.held_out_of(reader, rows, asked), whole if by_areas else slice(0)
        found = [Asked(split, "measured", reader, rows[whole], held_out[whole], Wanted(spacing=True))]
    rest = slice(len(found[0].rows), None if model.prepare.labels else 0)
    found.append(Asked(split, "numbers", reader, rows[rest], held_out[rest], NOTHING))
    return [one for one in found if one.rows]


def sources(model: TaskModel) -> dict[Name, Features]:
    """Features that ridges are fitted on: the low-resolution image, and what an untrained encoder says."""
    found: dict[Name, Features] = {RIDGE: baselines.low_resolution}
    if model.config.task.system == "kspace":
        found[UNTRAINED] = KSpaceEncoder(model.config, None, model.tables, model.device).features
    return found


def targets_of(model: TaskModel, dataset: Dataset) -> tuple[str, ...]:
    """Labels of the model's tasks, and those that can be measured on masks, as far as the dataset has them."""
    measured = masks_phenotypes({}) if "segmentation" in model.prepare.tasks else {}
    return tuple(name for name in dict.fromkeys([*model.prepare.labels, *measured]) if dataset.labels.get(name))


def mappable(model: TaskModel, dataset: Dataset) -> tuple[str, ...]:
    """Phenotypes that maps can make of the areas of its masks, and its diseases, as far as the dataset has them."""
    return targets_of(model, dataset) if "segmentation" in model.prepare.tasks else ()


def scored(held_out: HeldOut, model: TaskModel) -> HeldOut:
    """With the scores of masks and images as targets, which have no truth."""
    names = (*DICE, *DISTANCES) if "segmentation" in model.prepare.tasks else ()
    names += (*IMAGES, *IN_BOX) if "reconstruction" in model.prepare.tasks else ()
    empty = np.full((len(held_out.subjects), len(names)), np.nan)
    return HeldOut(held_out.subjects, (*held_out.targets, *names), np.concatenate([held_out.truth, empty], axis=1))


def trained(config: RunConfig) -> Name:
    """Name of the model in tables."""
    return model_name(config, config.task.encoder == start.NONE)
