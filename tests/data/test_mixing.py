"""The measures of mixing are 1 for a full shuffle, and tell an order that is none."""

from __future__ import annotations

import numpy as np
import pytest

from kmtr.data.loader.mixing import Mixing, measure, mixing
from kmtr.data.loader.order import Plan, Source

ROWS, BATCH, GROUP = 6400, 32, 16
GROUPS = np.arange(ROWS) // GROUP


def plan(per_group: int, **options: int) -> Plan:
    return Plan([Source(ROWS, np.array([[ROWS // per_group, per_group]]), np.array([[ROWS, 0]]))], BATCH, **options)


def test_a_full_shuffle_is_one() -> None:
    every = [measure(np.random.default_rng(seed).permutation(ROWS).reshape(-1, BATCH), GROUPS) for seed in range(20)]
    for name in ("distance", "near", "pairs", "chi_square"):
        assert np.mean([getattr(m, name) for m in every]) == pytest.approx(1, abs=0.05), name


def test_the_order_of_the_file_is_none() -> None:
    found = measure(np.arange(ROWS).reshape(-1, BATCH), GROUPS)
    assert found.distance < 0.01
    assert found.near == pytest.approx(1 / 0.19, rel=0.05)
    assert found.pairs > 50
    assert found.chi_square > 100


def test_blocks_that_stay_together_are_seen() -> None:
    order = np.random.default_rng(0).permutation(ROWS // GROUP)
    found = measure((order[:, None] * GROUP + np.arange(GROUP)).reshape(-1, BATCH), GROUPS)
    assert found.pairs > 50
    assert found.near > 3


def test_single_row_groups_are_a_full_shuffle_and_windows_come_close() -> None:
    every = [mixing(plan(1), epoch) for epoch in range(10)]
    assert np.mean([m.distance for m in every]) == pytest.approx(1, abs=0.05)
    assert np.mean([m.chi_square for m in every]) == pytest.approx(1, abs=0.2)
    assert every[0].pairs == 1
    wide, narrow = ([mixing(plan(GROUP, window=w), e) for e in range(10)] for w in (8, 1))
    assert np.mean([m.distance for m in wide]) > np.mean([m.distance for m in narrow])
    assert max(m.pairs for m in narrow + wide) < 1.5  # lanes keep rows of one group apart


def test_few_steps_are_no_error() -> None:
    assert measure(np.arange(8)[None], np.arange(8)) == Mixing(1.0, 1.0, 1.0, 1.0)
    assert mixing(Plan([Source(3, np.array([[1, 3]]), np.array([[3, 0]]))], 4, tail="pad")).distance == 1.0
