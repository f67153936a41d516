"""Proof of a plan: each subject once an epoch, the same batches for any number of workers and from any cursor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from kmtr.data.loader.order import Plan, Slot
from kmtr.progress import Bar
from kmtr.types import KmtrError

STEPS_PER_CURSOR = 32
"""Steps compared behind each cursor; from the first one, all."""


def prove(make: Callable[[], Plan], workers: Sequence[int], epochs: int, bar: Bar | None = None) -> list[int]:
    """Check all that a plan promises over the first epochs.

    Args:
        make: returns the plan, anew for each cursor.

    Returns:
        The cursors (steps) from which it went on identically.

    Raises:
        KmtrError: a promise is broken: which, and at which step.
        InputError: a number of workers does not divide the global batch.
    """
    plan = make()
    steps = epochs * plan.steps_per_epoch
    digests, drawn = [], []
    for step in range(steps):
        whole = plan.batch(step)
        digests.append(_digest([whole]))
        drawn.append(np.stack([whole.row, whole.epoch])[:, ~whole.repeated])
        for world in workers:
            _same(plan, step, world, digests[step])
        if (step + 1) % plan.steps_per_epoch == 0:
            _once(plan, np.concatenate(drawn[-plan.steps_per_epoch :], axis=1), step)
        if bar:
            bar(step + 1, steps)
    _never_twice(plan, np.concatenate(drawn, axis=1))
    border = plan.steps_per_epoch
    cursors = sorted(c for c in {0, border // 2, border - 1, border, steps // 2} if c < steps)
    for cursor in cursors:
        again = make()
        for step in range(cursor, min(cursor + STEPS_PER_CURSOR, steps)):
            for world in workers:
                _same(again, step, world, digests[step], f" after a restart at step {cursor}")
    return cursors


def _same(plan: Plan, step: int, world: int, expected: str, when: str = "") -> None:
    parts = [plan.share(step, rank, world) for rank in range(world)]
    if {len(part) for part in parts} != {plan.global_batch // world}:
        raise KmtrError(f"plan: step {step}: {world} workers do not have shares of one size{when}")
    if _digest(parts) != expected:
        raise KmtrError(f"plan: step {step}: {world} workers read another global batch{when}")


def _once(plan: Plan, drawn: np.ndarray, step: int) -> None:
    """One epoch: without weights all rows but a dropped tail; with weights whole batches."""
    lost = sum(plan.draws) - drawn.shape[1]
    if not 0 <= lost < plan.global_batch or (lost and plan.tail == "pad"):
        raise KmtrError(f"plan: the epoch that ends at step {step} lacks {lost} of {sum(plan.draws)} draws")
    there = np.arange(plan.subjects) if plan.rows is None else plan.rows
    if not np.isin(drawn[0], there).all():
        raise KmtrError(f"plan: the epoch that ends at step {step} has rows outside of the dataset")


def _never_twice(plan: Plan, drawn: np.ndarray) -> None:
    """No row twice in one pass over its source."""
    key = np.sort(drawn[1] * (drawn[0].max() + 1) + drawn[0])
    if (key[1:] == key[:-1]).any():
        raise KmtrError("plan: a subject comes twice in one pass over its dataset")


def _digest(parts: Sequence[Slot]) -> str:
    said = [np.concatenate([getattr(part, name) for part in parts]) for name in ("row", "epoch", "repeated")]
    ends = repr(sorted({(part.bucket, part.real) for part in parts}))
    return hashlib.blake2b(b"".join(array.tobytes() for array in said) + ends.encode(), digest_size=16).hexdigest()
