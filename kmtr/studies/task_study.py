"""Plan of the study of tasks: its rows in their order, what they are trained with, and who is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kmtr.config import Evaluate, RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import patterns, subjects
from kmtr.evaluate import baselines
from kmtr.evaluate.probes import readers_of
from kmtr.studies.contenders import CONTENDERS
from kmtr.studies.running import named
from kmtr.studies.task_measures import Truth
from kmtr.studies.task_rows import PRETRAINED, SCRATCH, Asked, Rows
from kmtr.train import start
from kmtr.train.resolve import resolve
from kmtr.types import DISEASES, PHENOTYPES, InputError

UNENDED = {"optimizer.schedule": "plateau", "optimizer.ema": 0.99}
"""Settings of a run that validation ends: under a cosine the score rises up to the last step whatever was learnt, and
one that ends early has not been annealed. An average of the weights is like annealing at every step.
"""
VERSION = 5
"""Version of the study; rows of another one are left out."""
TASKS = ("phenotypes", "diseases", "segmentation", "reconstruction")
"""Tasks of the study where `task.tasks` names none."""


@dataclass(frozen=True)
class Study:
    """Settings, data and truth that all rows share.

    Attributes:
        config: settings of pretraining, of `task.tasks`, and of evaluation; its seed draws the held-out subjects.
        truth: of the held-out subjects.
        run_id: its MLflow run.
        in_place: this process is the one worker of each run (`hands`), without Ray Train.
    """

    config: RunConfig
    dataset: Dataset
    truth: Truth
    rows: Rows
    run_id: str
    in_place: bool = False

    def settings(self, asked: Asked, encoder: str, steps: int = 0, **more: Any) -> RunConfig:
        """The run of a row.

        Args:
            encoder: folder that it starts from, or `start.NONE`.
            steps: of its training; 0: as the study's settings say.
            more: changes of other settings.
        """
        return settings(self.config, asked, encoder, steps, **more)

    def labelled(self, asked: Asked) -> list[int]:
        """Training subjects whose labels the row has."""
        return start.labelled(self.settings(asked, start.NONE), self.dataset)

    def means(self, seed: int, labels: int) -> dict[str, float]:
        """Means of the labels that the model of all tasks learns from, with which R2 compares."""
        names = [name for name in (*PHENOTYPES, *DISEASES) if self.dataset.labels.get(name)]
        mine = self.labelled(Asked(seed, SCRATCH, self.config.task.tasks, labels))
        known = subjects.labels_of(self.dataset.reader("train", self.config.data), mine, names)
        return {
            name: float(np.mean(v[np.isfinite(v)]))
            for name, v in zip(names, known.T, strict=True)
            if np.isfinite(v).any()
        }


@dataclass(frozen=True)
class Kind:
    """A kind of study of tasks. Studies of two kinds with the same settings share rows.

    Attributes:
        name: that the study's begins with.
        order: its rows.
        report: study, its name, its folder, its rows and seconds since the command began -> what the last line on
            stdout says.
    """

    name: str
    order: Callable[[RunConfig], list[Asked]]
    report: Callable[[Study, str, Path, Sequence[Asked], float], dict[str, Any]]


def order(config: RunConfig) -> list[Asked]:
    """All rows, seed by seed, those first that say most: the model of all tasks at the first of `study.single_labels`,
    then from all labels downwards, then each task alone.
    """
    tasks, single = config.task.tasks, config.study.single_labels
    downwards = sorted(config.study.task_labels, key=lambda labels: (labels > 0, -labels))
    first = single[:1] or downwards[-1:]
    budgets = [*first, *(labels for labels in downwards if labels not in first)]
    alone = [(task,) for task in tasks] if len(tasks) > 1 else []
    return [
        asked
        for seed in config.study.seeds
        for asked in (
            *(Asked(seed, begun, tasks, labels) for labels in budgets for begun in (PRETRAINED, SCRATCH)),
            *(Asked(seed, PRETRAINED, task, labels) for labels in single for task in alone),
        )
    ]


def settings(config: RunConfig, asked: Asked, encoder: str, steps: int = 0, **more: Any) -> RunConfig:
    """Settings of the run of a row.

    Args:
        steps: of its training; 0: as the study's settings say.
        more: changes of other settings.
    """
    changes: dict[str, Any] = {
        "seed": asked.seed,
        "stage": "task",
        "task.tasks": asked.tasks,
        "task.labels": asked.labels,
        **validated(config),
    }
    row = CONTENDERS[CONTENDERS[asked.start].then or asked.start]
    changes |= row.changes
    if row.bound:
        changes |= {"task.steps": config.study.bound_steps, "task.patience": config.study.bound_patience}
        changes |= {"task.keep": "best", **UNENDED}
    elif steps:
        changes |= {"task.steps": steps}
    return named(config, changes | {"task.encoder": encoder} | dict(more))


def pretraining(config: RunConfig, asked: Asked) -> RunConfig:
    """Settings of the pretraining that a row begins from: k-MTR's own where that has the image encoder too."""
    changes, masked = CONTENDERS[asked.start].changes, config.masked
    has = masked.steps and masked.image_weight and not config.align.train_image_encoder
    if changes.get("task.system") == "image" and has:
        changes = {}
    return named(config, {"seed": asked.seed, **validated(config), **changes})


def validated(config: RunConfig) -> dict[str, Any]:
    """Changed settings of the runs of a study whose rows are scored at other R than these are validated at."""
    return {"evaluate.accelerations": config.study.validated} if config.study.validated else {}


def bound_settings(config: RunConfig) -> dict[str, Any]:
    """Settings that decide when a bound stops, beside those in `digest`."""
    names = ("eval_every", "eval_subjects", "eval_seed")
    found = {f"train.{name}": getattr(config.train, name) for name in names}
    return found | UNENDED | {"steps": config.study.bound_steps, "patience": config.study.bound_patience}


def check_settings(config: RunConfig) -> None:
    """Refuse what the study decides by itself.

    Raises:
        InputError: names the key.
    """
    for key, value, default, expected in (
        ("task.encoder", config.task.encoder, "", "it empty, since every seed pretrains its own"),
        ("task.labels", config.task.labels, 0, "0, since study.task_labels says them"),
        ("task.system", config.task.system, "kspace", "kspace, since contenders have their own (study.py systems)"),
    ):
        if value != default:
            raise InputError(f"{key}: in a study of tasks expected {expected}, got {value}")
    if len(set(config.task.tasks)) < len(config.task.tasks):
        raise InputError(f"task.tasks: expected different tasks, got {','.join(config.task.tasks)}")
    if other := [task for task in config.task.tasks if task not in TASKS]:
        raise InputError(f"task.tasks: expected some of {', '.join(TASKS)} in a study of tasks, got {other[0]}")


def check_budgets(config: RunConfig, dataset: Dataset, rows: Sequence[Asked]) -> None:
    """Refuse before anything is trained what one of the rows would refuse.

    Raises:
        InputError: a budget above the training subjects, or that a run refuses (`start.budget`).
    """
    there = dataset.rows("train")
    if (most := max(asked.labels for asked in rows)) > there:
        raise InputError(f"study.task_labels: expected at most the {there} training subjects, or 0 for all, got {most}")
    for asked in rows:
        try:
            own = settings(config, asked, start.NONE)
            if asked.seed == config.study.seeds[0]:
                resolve(own)
                if CONTENDERS[asked.start].pretrained:
                    resolve(pretraining(config, asked))
            start.budget(own, dataset)
        except InputError as error:
            if CONTENDERS[asked.start].changes or CONTENDERS[asked.start].then:
                raise InputError(f"study.systems: {asked.start} cannot be trained: {error}") from None
            raise InputError(str(error).replace("task.labels", "study.task_labels", 1)) from None


def held_out(config: RunConfig, dataset: Dataset) -> tuple[Truth, tuple[int, ...]]:
    """The held-out subjects and their places in the test split, ascending.

    Raises:
        InputError: a split has fewer than 3 subjects.
    """
    reader = readers_of(dataset, config, "study")["test"]
    drawn = subjects.held_out(config.seed, len(reader), config.evaluate.subjects)
    ascending = np.argsort(drawn)
    names = subjects.pseudonyms(reader, drawn)  # in the order of predictions, which numbers names that are there twice
    labels = [name for name in (*PHENOTYPES, *DISEASES) if dataset.labels.get(name)]
    values = subjects.labels_of(reader, drawn, labels)[ascending]
    truth = Truth(tuple(names[i] for i in ascending), dict(zip(labels, values.T, strict=True)))
    return truth, tuple(sorted(drawn))


def digest(config: RunConfig, dataset: Dataset, truth: Truth) -> str:
    """Hash of all that decides a row but its key. The data count by how they were made, their numbers and the truth:
    made on another machine, the same cohort may differ in its last bits.
    """
    counts = [dataset.rows(split) for split in ("train", "val", "test")]
    labels = {name: np.round(values, 3).tolist() for name, values in truth.values.items()}
    data = f"{dataset.source} {counts} {labels} {patterns.digest(config.sampling)}"
    same: dict[str, Any] = {"seed": 0, "run.name": "", **validated(config)}
    task = same | {"stage": "task", "task.encoder": start.NONE, "task.labels": 0}
    runs = [override(config, changes).run_name(data) for changes in (same, task)]
    names, scoring = {"accelerations", "subjects", "dense"}, config.evaluate
    reading = scoring.model_dump_json(include=names | ({"mapped"} if scoring.mapped != Evaluate().mapped else set()))
    said = f"{VERSION} {baselines.VERSION} {runs} {reading} {config.seed}"
    return hashlib.sha256(said.encode()).hexdigest()[:8]
