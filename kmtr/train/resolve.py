"""A run is resolved once, before any worker starts: paths absolute, all that can be refused refused, and what workers
need of it found, so that none searches or reads it again.
"""

from __future__ import annotations

import logging
from pathlib import Path

from kmtr import tracking
from kmtr.config import MIN_ALIGNED_SUBJECTS, RunConfig, override
from kmtr.data.dataset import storage
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import planning
from kmtr.tracking.registry import SCHEME
from kmtr.train import start
from kmtr.types import InputError

log = logging.getLogger(__name__)


def open_data(config: RunConfig) -> tuple[RunConfig, Dataset]:
    """The configuration with absolute paths, and its dataset: all that a command needs that does not train. An encoder
    of MLflow's registry is downloaded.

    Raises:
        InputError: the dataset is missing or damaged, or there is no such encoder.
    """
    config = override(
        config,
        {
            "data.root": storage.absolute(config.data.root),
            "data.more": tuple(map(storage.absolute, config.data.more)),
            "sampling.file": config.sampling.file and storage.absolute(config.sampling.file),
            "storage.root": storage.absolute(config.storage.root),
            "run.begin": config.run.begin and storage.absolute(config.run.begin),
            "tracking.uri": tracking.tracking_uri(config),
        },
    )
    for key, named in (("task.encoder", config.task.encoder), ("evaluate.encoder", config.evaluate.encoder)):
        if named.startswith(SCHEME):
            folder = tracking.kept(config.tracking.uri, named, Path(config.storage.root))
            config = override(config, {key: str(folder)})
    return config, Dataset.open(config.data)


def resolve(config: RunConfig) -> tuple[RunConfig, Dataset]:
    """Everything that can be refused before a worker starts is refused here; paths become absolute.

    Raises:
        InputError: one line that names the key or the file.
    """
    config, dataset = open_data(config)
    config = start.resolve(config, dataset)
    planning.plan_of(config, dataset, rows=start.budget(config, dataset))
    subjects = dataset.rows("train")
    if config.align_steps and subjects < MIN_ALIGNED_SUBJECTS:
        raise InputError(
            f"stage: alignment needs at least {MIN_ALIGNED_SUBJECTS} distinct training subjects, the dataset has "
            f"{subjects}; use stage=masked"
        )
    imaged = config.align_steps or (config.masked_steps and config.masked.image_weight)
    if set(config.data.views) & dataset.undersampled and imaged:
        raise InputError(
            "stage: some sources were undersampled by the scanner, so no fully sampled image is known; "
            "use stage=masked masked.image_weight=0"
        )
    if "sax" in config.data.views and len({manifest.simulated for manifest in dataset.manifests}) > 1:
        log.warning("data.more: slices of the short axis are not all in one order: %s", dataset.slice_order)
    dataset.preflight()
    return config, dataset
