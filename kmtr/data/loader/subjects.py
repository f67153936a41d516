"""Choice of the subjects that a number is computed on: pure functions of seed and counts, and what is known of them.

The choice is random, so that it does not follow the order in which a dataset was written, and the same for all systems,
accelerations and numbers of workers. A smaller number of subjects is the beginning of a larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from jaxtyping import Bool, Float, Int

from kmtr.config import Data
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader.masks import read_masks
from kmtr.data.loader.order import permutation
from kmtr.data.loader.shapes import full_shape
from kmtr.types import UNLABELLED, InputError

MIN_KNOWN = 3
"""Training subjects with a label, or with masks, below which it can't be learnt."""
MIN_CLASS = 2
"""Training subjects with a disease, and without it, in every budget of labels, where there are as many."""


def validated(seed: int, there: int, count: int) -> list[int]:
    """Up to `count` of the `there` rows of a split, for validation during training."""
    return _chosen(seed + 1, there, count)


def labelled(seed: int, there: int, count: int) -> list[int]:
    """Up to `count` of the `there` training rows, those whose labels a probe or a fine-tuning is fitted on."""
    return _chosen(seed + 2, there, count)


def budget(
    seed: int,
    labels: Float[np.ndarray, "subject target"],
    diseases: Bool[np.ndarray, " target"],
    count: int,
    tasks: Sequence[Sequence[int]] = (),
    needs: Sequence[Callable[[int], bool]] = (),
) -> Int[np.ndarray, " chosen"]:
    """Rows of the training split, ascending: the `count` subjects on whose labels a run trains.

    They are the beginning of one order of all that have something which the run learns from, so the subjects of a
    smaller budget are among those of a larger one. First comes what no budget may lack: MIN_CLASS subjects with and
    without each disease, MIN_KNOWN that have each label, and MIN_KNOWN that meet each need; all of them where there are
    fewer. Small budgets are therefore richer in a rare disease than the split. Then come the subjects that every task
    can learn from, and last those that lack something for one. Within all of these the order is random, that of
    `labelled`; among the first, too, those that every task can learn from are preferred.

    Args:
        labels: of all training subjects, in file order; NaN: unknown. Without targets and needs every subject will do.
        diseases: targets that are 0 or 1.
        tasks: targets of each task on labels, which learns from a subject of whom one of them is known; empty: all of
            them are one task's.
        needs: of each task on masks or images, whether it can learn from the subject in a row. To know it may take
            reading, so it is asked of as few as will do.

    Raises:
        InputError: more than there are, or fewer than no budget may lack.
    """
    order: list[int] = permutation(seed + 2, 0, len(labels)).tolist()
    known = np.isfinite(labels)
    own = tasks or ([range(labels.shape[1])] if labels.shape[1] else [])
    each = [known[:, list(columns)].any(1) for columns in own]
    every = np.logical_and.reduce(each) if each else np.ones(len(labels), bool)
    some = np.logical_or.reduce(each) if each else np.full(len(labels), not needs)

    def whole(row: int) -> bool:
        return bool(every[row]) and all(need(row) for need in needs)

    def useful(row: int) -> bool:
        return bool(some[row]) or any(need(row) for need in needs)

    wanted = [(known[:, column], MIN_KNOWN) for column in range(labels.shape[1])]
    wanted += [(labels[:, column] == one, MIN_CLASS) for column in np.flatnonzero(diseases) for one in (0, 1)]
    chosen = {row for has, least in wanted for row in _first((r for r in order if has[r]), whole, least)}
    chosen |= {row for need in needs for row in _first(filter(need, order), whole, MIN_KNOWN)}
    least = max(len(chosen), 1)
    if count >= least:
        incomplete: list[int] = []
        for row in order:
            if len(chosen) == count:
                break
            if row not in chosen:
                (chosen.add if whole(row) else incomplete.append)(row)
        chosen |= set(islice(filter(useful, incomplete), count - len(chosen)))
    if len(chosen) != count:
        there, dense = sum(map(useful, order)), ", mask or image" if needs else ""
        if count > there:
            raise InputError(
                f"task.labels: expected at most {there}, the training subjects with a label of these tasks, or 0 for "
                f"all of them, got {count}"
            )
        raise InputError(
            f"task.labels: expected at least {least}, with which every label{dense} is known of {MIN_KNOWN} subjects "
            f"and every disease has {MIN_CLASS} with and {MIN_CLASS} without it, got {count}"
        )
    return np.array(sorted(chosen), np.int64)


def _first(rows: Iterable[int], whole: Callable[[int], bool], count: int) -> list[int]:
    """The first `count` of the rows that are whole, and where there are fewer, of the others."""
    found: list[int] = []
    others: list[int] = []
    for row in rows:
        (found if whole(row) else others).append(row)
        if len(found) == count:
            break
    return [*found, *others][:count]


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
