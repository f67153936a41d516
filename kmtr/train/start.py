"""Start of training on labels: the encoder that it begins from, and what is known of the labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kmtr.config import RunConfig, override, plain
from kmtr.data.dataset import storage
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader import subjects
from kmtr.exported import HEAD, WEIGHTS, Trained, read_head, read_weights, rebuilds
from kmtr.tasks import tasks_of
from kmtr.train.folder import finished, run_folder
from kmtr.types import InputError

NONE = "none"
"""Value of `task.encoder` for a system that starts from its initial weights."""
MIN_KNOWN = 3
"""Training subjects with a label, below which it can't be learnt."""


def resolve(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The configuration with `task.encoder` as an absolute path or `NONE`; of another stage as it is.

    Raises:
        InputError: the dataset lacks a label, or the encoder is missing or of another geometry.
    """
    if config.stage != "task":
        return config
    for name, task in tasks_of(config).items():
        if not task.labels:
            raise InputError(f"task.tasks: expected tasks on labels, got {name}; pretrain with stage=masked or align")
        for label in task.labels:
            if dataset.labels.get(label, 0) < MIN_KNOWN:
                key = "task.diseases" if name == "diseases" else "task.targets"
                raise InputError(
                    f"{key}: expected labels that at least {MIN_KNOWN} subjects have, got {label}; the dataset has "
                    f"{', '.join(dataset.labels) or 'none'}"
                )
    if config.task.encoder == NONE or config.task.system != "kspace":
        return override(config, {"task.encoder": NONE})
    folder = Path(storage.absolute(config.task.encoder)) if config.task.encoder else _pretrained(config, dataset)
    if not all((folder / name).is_file() for name in (WEIGHTS, HEAD)):
        raise InputError(f"task.encoder: expected a folder with {WEIGHTS} and {HEAD}, or none, got {folder}")
    _check_fits(config, folder)
    return override(config, {"task.encoder": str(folder)})


def _pretrained(config: RunConfig, dataset: Dataset) -> Path:
    """Encoder of the finished pretraining with the same settings."""
    before = override(config, {"stage": "both", "task.tasks": (), "run.name": "", "run.fresh": False})
    name, folder = run_folder(before, dataset)
    done = finished(folder)
    if done is None:
        raise InputError(
            f"task.encoder: run {name} is not finished; pretrain it first, or set task.encoder to a folder or none"
        )
    return Path(done.encoder)


def _check_fits(config: RunConfig, folder: Path) -> None:
    known, wanted = plain(read_head(folder / HEAD)), plain(config)
    for key, value in wanted.items():
        # Acceleration, family and seed may differ: the weights fit all the same.
        if rebuilds(key) and key != "seed" and not key.startswith("sampling.") and known[key] != value:
            raise InputError(f"{key}: the encoder in {folder} has {known[key]}, got {value}; take its settings")


def tables(config: RunConfig) -> dict[str, Tensor] | None:
    """Normalisation tables of the encoder that the run starts from; None: it starts from none."""
    if config.stage != "task" or config.task.encoder == NONE:
        return None
    return read_weights(Path(config.task.encoder) / WEIGHTS)[1]


def trained_on(config: RunConfig, dataset: Dataset) -> Trained:
    """Facts that an exported model carries: counts of its training subjects, their labels and shapes."""
    reader = dataset.reader("train", config.data)
    names = labels_of_tasks(config)
    counts = np.isfinite(subjects.labels_of(reader, range(len(reader)), names)).sum(0).tolist() if names else []
    shapes: dict[str, list[list[int]]] = {}
    for manifest in dataset.manifests:
        numbers = {number for shard in manifest.shards if shard.split == "train" for _, number in shard.shapes}
        for subject in (manifest.subject_shapes[number] for number in numbers):
            for view in set(config.data.views) & set(subject):
                least, most = shapes.get(view, [subject[view], subject[view]])
                shapes[view] = [list(map(min, least, subject[view])), list(map(max, most, subject[view]))]
    return Trained(
        subjects=len(reader),
        labels=dict(zip(names, counts, strict=True)),
        shapes={view: shapes[view] for view in config.data.views if view in shapes},
        dataset=dataset.digest,
        from_scratch=config.task.encoder == NONE,
        steps=config.task.steps,
    )


def labels_of_tasks(config: RunConfig) -> tuple[str, ...]:
    """Columns that the run's tasks learn from."""
    return tuple(dict.fromkeys(label for task in tasks_of(config).values() for label in task.labels))


def label_moments(config: RunConfig, reader: Reader) -> dict[str, Tensor]:
    """``label_mean`` and ``label_sd`` of the tasks' labels over the training subjects; empty without such."""
    names = labels_of_tasks(config)
    if not names:
        return {}
    known = subjects.labels_of(reader, range(len(reader)), names)
    sd = np.nanstd(known, axis=0)
    moments = {"label_mean": np.nanmean(known, axis=0), "label_sd": np.where(sd > 0, sd, 1.0)}
    return {name: torch.from_numpy(values.astype(np.float32)) for name, values in moments.items()}
