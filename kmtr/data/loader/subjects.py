"""Choice of the subjects that a number is computed on: pure functions of seed and counts, and what is known of them.

The choice is random, so that it does not follow the order in which a dataset was written, and the same for all systems,
accelerations and numbers of workers. A smaller number of subjects is the beginning of a larger one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from kmtr.data.dataset.reader import Reader
from kmtr.data.loader.order import permutation


def validated(seed: int, there: int, count: int) -> list[int]:
    """Up to `count` of the `there` rows of a split, for validation during training."""
    return _chosen(seed + 1, there, count)


def labelled(seed: int, there: int, count: int) -> list[int]:
    """Up to `count` of the `there` training rows, those whose labels a probe or a fine-tuning is fitted on."""
    return _chosen(seed + 2, there, count)


def held_out(seed: int, there: int, count: int) -> list[int]:
    """Up to `count` of the `there` rows of the test split, on which systems are compared."""
    return _chosen(seed + 2, there, count)


def _chosen(seed: int, there: int, count: int) -> list[int]:
    found: list[int] = permutation(seed, 0, there)[:count].tolist()
    return found


def labels_of(reader: Reader, rows: Sequence[int], targets: Sequence[str]) -> Float[np.ndarray, "subject target"]:
    """Labels of these rows in their units, float64; NaN: unknown."""
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
