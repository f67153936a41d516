"""Ridge probes of sources of features, fitted on labelled subjects and asked for held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.device import HostBatch
from kmtr.evaluate.predictions import MEAN, HeldOut, Name, joined
from kmtr.evaluate.predictors import Constant, Features, Predictor, Probed, predict
from kmtr.metrics import fit_ridges
from kmtr.types import InputError

CHUNK = 32
"""Subjects in memory at once."""
MIN_SUBJECTS = 3
"""Subjects of a split, and those of them that have a target, below which nothing is fitted or scored."""


def score(
    config: RunConfig,
    dataset: Dataset,
    sources: Mapping[Name, Features],
    progress: Callable[[int, int], None],
    device: torch.device,
) -> pa.Table:
    """Predictions of a probe of each source, and of the mean, for the test split at each `evaluate.accelerations`.

    Every source of features sees the same subjects and the same patterns.

    Raises:
        InputError: too few subjects, or none of the targets is labelled.
    """
    targets = targets_of(config.evaluate.targets, dataset, "evaluate.targets")
    readers = readers_of(dataset, config, "evaluate")
    labelled = subjects.labelled(config.seed, len(readers["train"]), config.evaluate.labels)
    asked = subjects.held_out(config.seed, len(readers["test"]), config.evaluate.subjects)
    known = subjects.labels_of(readers["train"], labelled, targets)
    held_out = held_out_of(readers["test"], asked, targets)
    both = [np.isfinite(values).sum(0) >= MIN_SUBJECTS for values in (known, held_out.truth)]
    if not np.logical_and(*both).any():
        raise InputError(
            f"evaluate.targets: expected one that at least {MIN_SUBJECTS} labelled training subjects and "
            f"{MIN_SUBJECTS} test subjects have, got {', '.join(targets)}"
        )
    tell = Counter(progress, len(config.evaluate.accelerations) * (len(labelled) + len(asked)))
    parts = []
    for r in config.evaluate.accelerations:
        fixed = override(config, {"sampling.accelerations": (r,)})
        train = tell(pipeline.read_in_order(readers["train"], labelled, CHUNK, fixed))
        test = tell(pipeline.read_in_order(readers["test"], asked, CHUNK, fixed))
        fitted = fit(sources, train, known, targets, device)
        parts.append(
            predict(
                fitted,
                test,
                held_out,
                config.data,
                acceleration=r,
                seed=config.seed,
                labels=len(labelled),
                device=device,
            )
        )
    return joined(parts)


def fit(
    sources: Mapping[Name, Features],
    batches: Iterable[HostBatch],
    labels: Float[np.ndarray, "subject target"],
    targets: Sequence[str],
    device: torch.device,
    more: Mapping[Name, Mapping[str, Float[np.ndarray, " subject"]]] = MappingProxyType({}),
) -> dict[Name, Predictor]:
    """A probe of each source of features, and the mean of the labels.

    Args:
        batches: the labelled subjects, in the order of `labels`.
        more: labels by name that only one source's probe is fitted to as well.
    """
    features: dict[Name, list[np.ndarray]] = {name: [] for name in sources}
    for host in batches:
        batch = host.to(device)
        for name, make in sources.items():
            features[name].append(make(batch))
    found: dict[Name, Predictor] = {}
    means: dict[str, float] = {}
    for name, make in sources.items():
        seen, others = np.concatenate(features[name]), more.get(name, {})
        ridges = fit_ridges(seen, labels, targets)
        means = {target: ridge.bias for target, ridge in ridges.items()}
        ridges |= fit_ridges(seen, np.stack([*others.values()], axis=1), tuple(others)) if others else {}
        found[name] = Probed(make, ridges)
    return found | {MEAN: Constant(means)}


class Counter:
    """Counts the subjects of batches that pass, for a bar."""

    def __init__(self, progress: Callable[[int, int], None], total: int):
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, batches: Iterable[HostBatch]) -> Iterator[HostBatch]:
        for host in batches:
            self.done += len(host)
            yield host
            self.progress(self.done, self.total)


def targets_of(wanted: tuple[str, ...], dataset: Dataset, key: str) -> tuple[str, ...]:
    """Those of the wanted targets that the dataset has.

    Raises:
        InputError: none of them; names the key.
    """
    targets = tuple(name for name in wanted if dataset.labels.get(name))
    if not targets:
        raise InputError(
            f"{key}: expected at least one that the dataset has, got {', '.join(wanted)}; it has "
            f"{', '.join(dataset.labels) or 'no labels'}"
        )
    return targets


def readers_of(dataset: Dataset, config: RunConfig, command: str) -> dict[str, Reader]:
    """Readers of the training and the test split.

    Raises:
        InputError: one of them has fewer than 3 subjects.
    """
    readers = {split: dataset.reader(split, config.data) for split in ("train", "test")}
    for split, reader in readers.items():
        if len(reader) < MIN_SUBJECTS:
            raise InputError(
                f"{command}: expected at least {MIN_SUBJECTS} subjects in split {split}, got {len(reader)}"
            )
    return readers


def held_out_of(reader: Reader, rows: list[int], targets: tuple[str, ...]) -> HeldOut:
    """The held-out subjects in these rows of a split."""
    names = subjects.pseudonyms(reader, rows)
    return HeldOut(tuple(names), targets, subjects.labels_of(reader, rows, targets))
