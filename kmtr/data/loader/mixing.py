"""How well an order mixes, against a full shuffle of the same rows: pure functions of the batches of an epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from kmtr.data.loader.order import Plan

BINS = 10
"""Parts of the file and of the epoch in the test for independence."""


@dataclass(frozen=True)
class Mixing:
    """How well one epoch is mixed. A full shuffle has 1.0 everywhere, but for chance.

    Attributes:
        distance: mean steps between rows that are neighbours in the file, over those in a full shuffle.
        near: share of such neighbours under a tenth of an epoch apart, over that in a full shuffle (0.19).
        pairs: pairs of one row group in the same batch, over those in a full shuffle; 1 where groups hold one row.
        chi_square: of tenths of the file against tenths of the epoch, per degree of freedom; under 1: more even than
            chance, over 1: parts of the file stay together.
    """

    distance: float
    near: float
    pairs: float
    chi_square: float


def measure(rows: Int[np.ndarray, "step batch"], group: Int[np.ndarray, " row"]) -> Mixing:
    """Mixing of batches, given the row group of every row in file order (rows that no batch has are left out)."""
    steps, batch = rows.shape
    if not steps:
        return Mixing(1.0, 1.0, 1.0, 1.0)
    step_of = np.full(len(group), -1, np.int64)
    step_of[rows] = np.arange(steps)[:, None]
    both = (step_of[1:] >= 0) & (step_of[:-1] >= 0)
    apart = np.abs(np.diff(step_of))[both]
    # Two different ones of n positions: n / (n - 1) times what independent ones would have.
    n = steps * batch
    correction = n / max(n - 1, 1)
    expected_apart = (steps**2 - 1) / (3 * steps) * correction
    tenth = np.arange(steps) < steps / 10
    independent = (steps + 2 * np.sum(steps - np.arange(1, steps)[tenth[1:]])) / steps**2
    expected_near = float((independent - 1 / n) * correction)
    return Mixing(
        distance=_over(float(apart.mean()), expected_apart) if len(apart) else 1.0,
        near=_over(float((apart < steps / 10).mean()), expected_near) if len(apart) else 1.0,
        pairs=_pairs(group[rows]),
        chi_square=_chi_square(rows, len(group)),
    )


def mixing(plan: Plan, epoch: int = 0) -> Mixing:
    """Mixing of the full batches of one epoch."""
    first, groups = 0, []
    for source in plan.sources:
        groups.append(source.group_of_row() + first)
        first += int(source.groups[:, 0].sum())
    slots = (plan.batch(plan.step_of(epoch, offset)) for offset in range(plan.steps_per_epoch))
    rows = [slot.row for slot in slots if slot.real == plan.global_batch]
    return measure(np.stack(rows) if rows else np.empty((0, plan.global_batch), np.int64), np.concatenate(groups))


def _pairs(group: Int[np.ndarray, "step batch"]) -> float:
    steps, batch = group.shape
    key = np.arange(steps)[:, None] * (int(group.max(initial=0)) + 1) + group
    together = np.unique(key, return_counts=True)[1]
    all_of = np.unique(group, return_counts=True)[1]
    expected = float((all_of * (all_of - 1) / 2).sum()) * (batch - 1) / max(group.size - 1, 1)
    return _over(float((together * (together - 1) / 2).sum()), expected)


def _chi_square(rows: Int[np.ndarray, "step batch"], total: int) -> float:
    """Pearson's, of a table with fixed margins."""
    steps, batch = rows.shape
    bins = min(BINS, steps, total)
    if bins < 2:
        return 1.0
    when = np.repeat(np.arange(steps) * bins // steps, batch)
    table = np.zeros((bins, bins))
    np.add.at(table, (rows.ravel() * bins // total, when), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    terms = np.divide((table - expected) ** 2, expected, out=np.zeros_like(table), where=expected > 0)
    return float(terms.sum()) / (bins - 1) ** 2


def _over(found: float, expected: float) -> float:
    return found / expected if expected > 0 else 1.0
