"""A run on two Ray workers over the small dataset."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmtr.config import RunConfig, override

TRAINED = {
    "data.loader": "ray",
    "train.workers": 2,
    "masked.steps": 6,
    "masked.warmup_steps": 2,
    "align.steps": 4,
    "train.checkpoint_every": 3,
    "train.eval_every": 5,
}


@pytest.fixture
def config(small: RunConfig, tmp_path: Path) -> RunConfig:
    """A run of 6 + 4 steps, with storage and tracking of its own."""
    return override(small, TRAINED | {"storage.root": str(tmp_path / "runs")})
