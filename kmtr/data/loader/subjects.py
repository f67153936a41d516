"""Choice of the subjects that a number is computed on: pure functions of seed and counts, and what is known of them.

The choice is random, so that it does not follow the order in which a dataset was written, and the same for all systems,
accelerations and numbers of workers. A smaller number of subjects is the beginning of a larger one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from kmtr.config import Data
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader.masks import read_masks
from kmtr.data.loader.order import permutation
from kmtr.data.loader.shapes import full_shape
from kmtr.types import UNLABELLED, InputError

MIN_KNOWN = 3
"""Training subjects with a label, below which it can't be learnt."""
MIN_CLASS = 2
"""Training subjects with a disease, and without it, in every budget of labels, where there are as many."""


def validated(seed: int, there: int, count: int) -> list[int]:
    """Up to `count` of the `there` rows of a split, for validation during training."""
    return _chosen(seed + 1, there, count)


def labelled(seed: int, there: int, count: int) -> list[int]:
    """Up to `count` of the `there` training rows, those whose labels a probe or a fine-tuning is fitted on."""
    return _chosen(seed + 2, there, count)


def budget(
    seed: int, labels: Float[np.ndarray, "subject target"], diseases: Bool[np.ndarray, " target"], count: int
) -> Int[np.ndarray, " chosen"]:
    """Rows of the training split, ascending: the `count` subjects on whose labels a run trains.

    They are the beginning of one order of all that have a label of the run, so the subjects of a smaller budget are
    among those of a larger one. It is the random order of `labelled`, before which comes what no budget may lack: the
    first MIN_CLASS in that order with and without each disease and the first MIN_KNOWN that have each label, all of
    them where there are fewer. Small budgets are therefore richer in a rare disease than the split.

    Args:
        labels: of all training subjects, in file order; NaN: unknown. Without targets all subjects are labelled, as
            where a task learns from masks or from the image.
        diseases: targets that are 0 or 1.

    Raises:
        InputError: more than there are, or fewer than no budget may lack.
    """
    order = permutation(seed + 2, 0, len(labels))
    known = np.isfinite(labels)
    if labels.shape[1]:
        order = order[known[order].any(1)]
    first = np.zeros(len(order), bool)
    for values, has, disease in zip(labels[order].T, known[order].T, diseases, strict=True):
        first[np.flatnonzero(has)[:MIN_KNOWN]] = True
        for one in (0, 1) if disease else ():
            first[np.flatnonzero(values == one)[:MIN_CLASS]] = True
    if count > len(order):
        raise InputError(
            f"task.labels: expected at most {len(order)}, the training subjects with a label of these tasks, or 0 for "
            f"all of them, got {count}"
        )
    if count < (least := max(int(first.sum()), 1)):
        raise InputError(
            f"task.labels: expected at least {least}, with which every label is known of {MIN_KNOWN} subjects and "
            f"every disease has {MIN_CLASS} with and {MIN_CLASS} without it, got {count}"
        )
    return np.sort(np.concatenate([order[first], order[~first]])[:count])


def held_out(seed: int, there: int, count: int) -> list[int]:
    """Up to `count` of the `there` rows of the test split, on which systems are compared."""
    return _chosen(seed + 2, there, count)


def contoured(data: Data, reader: Reader, rows: Iterable[int]) -> Iterator[int]:
    """Those of the rows with a labelled pixel in the slices and frames that are chosen, in their order."""
    for row in rows:
        samples = reader.samples([row])
        shapes = {view: samples.meta.column(f"shape_{view}")[0].as_py() for view in data.views}
        if any(shape and samples.fetch_masks(0, view, shape) is not None for view, shape in shapes.items()):
            masks = read_masks(reader.samples([row]), data, full_shape(data))["masks"]
            if bool((masks != UNLABELLED).any()):
                yield row


def complete(data: Data, reader: Reader, rows: Iterable[int]) -> Iterator[int]:
    """Those of the rows of which the scanner acquired every line of some view, in their order."""
    for row in rows:
        meta = reader.samples([row]).meta
        shaped, undersampled = (
            {view for view in data.views if meta.column(f"{kind}_{view}")[0].is_valid} for kind in ("shape", "acquired")
        )
        if shaped - undersampled:
            yield row


def _chosen(seed: int, there: int, count: int) -> list[int]:
    found: list[int] = permutation(seed, 0, there)[:count].tolist()
    return found


def labels_of(reader: Reader, rows: Sequence[int], targets: Sequence[str]) -> Float[np.ndarray, "subject target"]:
    """Labels of these rows in their units, float64; NaN: unknown."""
    if not targets:
        return np.empty((len(rows), 0))
    meta = reader.samples(rows).meta
    return np.stack([meta.column(name).to_numpy().astype(np.float64) for name in targets], axis=1)


def pseudonyms(reader: Reader, rows: Sequence[int]) -> list[str]:
    """Pseudonyms of these rows. Where several datasets have one under the same name, the later ones get its number.

    They belong into tables of predictions, never into a log or an error.
    """
    counted: dict[str, int] = {}
    found = []
    for name in reader.samples(rows).meta.column("subject_id").to_pylist():
        counted[name] = counted.get(name, 0) + 1
        found.append(name if counted[name] == 1 else f"{name}#{counted[name]}")
    return found
