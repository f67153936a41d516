"""Ratio of blocks of one run: a planted one is found, and drift that both kinds share is not taken for one."""

from __future__ import annotations

import numpy as np
import pytest

from kmtr.bench.blocks import over


def test_a_planted_ratio_is_found_in_spite_of_drift_and_of_single_slow_steps() -> None:
    rng = np.random.default_rng(3)
    drift = np.linspace(1.0, 2.0, 20)[:, None]
    steps = drift * rng.normal(0.1, 0.002, (20, 10))
    slower = steps * 1.1
    slower[:, 3] += 5.0  # a validation
    found = over(slower, steps)
    assert found["ratio"] == pytest.approx(1.1, abs=0.03)
    assert found["interval"] == pytest.approx([1.1, 1.1], abs=0.05)


def test_equal_blocks_have_ratio_one() -> None:
    steps = np.random.default_rng(4).normal(0.1, 0.002, (10, 9))
    assert over(steps, steps) == {"ratio": 1.0, "interval": [1.0, 1.0]}
