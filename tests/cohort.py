"""Simulated subjects and datasets of them, for tests that want their own."""

from __future__ import annotations

from pathlib import Path

from kmtr.config import RunConfig
from kmtr.data.dataset import shards
from kmtr.data.dataset.manifest import Manifest, write_manifest
from kmtr.simulation import phantom
from kmtr.types import Study


def simulated(index: int, config: RunConfig) -> Study:
    """Subject `index` of the cohort that `config` describes."""
    data = config.data
    return phantom.simulate(
        index,
        seed=config.simulate.seed,
        views=data.views,
        sax_slices=data.sax_slices,
        frames=data.frames,
        matrix=data.matrix,
        snr_db=config.simulate.snr_db,
        difficulty=config.simulate.difficulty,
        coils=config.simulate.coils,
        oversampling=config.simulate.oversampling,
    )


def write(root: Path, subjects: dict[str, list[Study]], dtype: str = "float16", rows: int = 16) -> Manifest:
    """A dataset of given studies per split."""
    parts = [
        shards.write_shard(str(root), f"{split}-{start // rows:05d}", split, studies[start : start + rows], dtype)
        for split, studies in subjects.items()
        for start in range(0, len(studies), rows)
    ]
    return write_manifest(str(root), parts, dtype, "test")
