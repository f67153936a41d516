"""A run is resolved once, before any worker starts: paths absolute, all that can be refused refused, and what workers
need of it found, so that none searches or reads it again.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kmtr import tracking
from kmtr.config import MIN_ALIGNED_SUBJECTS, RunConfig, override
from kmtr.data.dataset import storage
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import patterns, planning
from kmtr.data.loader.buckets import Buckets
from kmtr.data.loader.order import Plan
from kmtr.types import InputError


def open_data(config: RunConfig) -> tuple[RunConfig, Dataset]:
    """The configuration with absolute paths, and its dataset: all that a command needs that does not train.

    Raises:
        InputError: the dataset is missing or damaged.
    """
    config = override(
        config,
        {
            "data.root": storage.absolute(config.data.root),
            "data.more": tuple(map(storage.absolute, config.data.more)),
            "sampling.file": config.sampling.file and storage.absolute(config.sampling.file),
            "storage.root": storage.absolute(config.storage.root),
            "tracking.uri": tracking.tracking_uri(config),
        },
    )
    return config, Dataset.open(config.data)


def resolve(config: RunConfig) -> tuple[RunConfig, Dataset]:
    """Everything that can be refused before a worker starts is refused here; paths become absolute.

    Raises:
        InputError: one line that names the key or the file.
    """
    config, dataset = open_data(config)
    planning.plan_of(config, dataset)
    subjects = dataset.rows("train")
    if config.align_steps and subjects < MIN_ALIGNED_SUBJECTS:
        raise InputError(
            f"stage: alignment needs at least {MIN_ALIGNED_SUBJECTS} distinct training subjects, the dataset has "
            f"{subjects}; use stage=masked"
        )
    if set(config.data.views) & dataset.undersampled and (config.align_steps or config.masked.image_weight):
        raise InputError(
            "stage: some sources were undersampled by the scanner, so no fully sampled image is known; "
            "use stage=masked masked.image_weight=0"
        )
    dataset.preflight()
    return config, dataset


def handed(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """What workers get of a resolved run (`taken`): ``buckets``, plain, and ``pattern``, numpy ``frame line`` or None.

    Raises:
        InputError: the dataset can't feed this configuration.
    """
    chosen = planning.plan_of(config, dataset).buckets
    assert chosen is not None
    return {"buckets": asdict(chosen), "pattern": patterns.carried(config.sampling)}


def taken(config: RunConfig, dataset: Dataset, given: dict[str, Any]) -> Plan:
    """The plan of a run in a worker, out of what it was `handed`: nothing is searched, and no pattern file is read.

    Raises:
        KmtrError: the dataset isn't the one that the run was resolved with.
    """
    patterns.hold(config.sampling, given["pattern"])
    found = given["buckets"]
    chosen = Buckets(tuple(map(tuple, found["shapes"])), tuple(found["of_class"]), found["overflow"])
    return planning.plan_of(config, dataset, chosen)
