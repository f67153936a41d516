"""One process equals many, every ZeRO stage the others, and all of them the golden losses of `tiny`'s model.

The real engine on the real data path. ``golden.json`` holds what the first 5 steps of masked pretraining and 3 of
alignment log. A change of model, losses, order or sampling changes them; look at the difference, then write them anew:

    KMTR_GOLDEN=write python -m pytest tests/train/test_equivalence.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import legs
import numpy as np
import pytest
from legs import Leg, Steps

from kmtr.config import RunConfig, override, to_json
from kmtr.config.recipes import tiny
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import statistics

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).with_name("golden.json")
DATA = {
    "data.views": ("sax", "lax_4ch"),
    "data.sax_slices": 2,
    "data.frames": 4,
    "data.matrix": (32, 32),
    "data.global_batch": 8,
    "data.loader": "threads",
    "sampling.accelerations": (2, 4),
    "evaluate.accelerations": (2, 4),
}
"""Where the dataset of the tests is smaller than `tiny`'s; model and losses are the recipe's."""
STEPS = {
    "masked.steps": 5,
    "masked.warmup_steps": 2,
    "align.steps": 3,
    "align.warmup_steps": 1,
    "align.head_steps": 1,
    "model.projection": 8,  # of so few subjects rounding would decide which the last of many components are
}


def run(variants: dict[str, RunConfig], workers: int, folder: Path) -> dict[str, Steps]:
    """What each step of each variant logged, without what is counted in whole subjects (retrieval)."""
    folder.mkdir()
    config = next(iter(variants.values()))
    fitted = statistics.tables(config, Dataset.open(config.data).reader("train", config.data))
    legs.keep(fitted, folder)
    legs.run(folder, workers, [Leg(name, to_json(c), 0, c.total_steps, seed=c.seed) for name, c in variants.items()])
    return {name: losses(folder / f"{name}.json") for name in variants}


def losses(path: Path) -> Steps:
    left_out = {"applied", "gradient_norm"}
    return [{k: v for k, v in step.items() if k not in left_out} for step in json.loads(path.read_text())]


def assert_equal(steps: Steps, expected: Steps, what: str, rtol: float, atol: float) -> None:
    assert [sorted(step) for step in steps] == [sorted(step) for step in expected], what
    for number, (step, other) in enumerate(zip(steps, expected, strict=True), 1):
        for name, value in step.items():
            np.testing.assert_allclose(value, other[name], rtol, atol, err_msg=f"{what}: {name} of step {number}")


def test_zero_stages_workers_and_accumulation_agree(dataset: str, tmp_path: Path) -> None:
    base = override(tiny(), DATA | STEPS | {"data.root": dataset, "train.workers": 2})
    stages = {f"zero{stage}": override(base, {"train.zero_stage": stage}) for stage in range(4)}
    variants = stages | {f"accumulation{n}": override(base, {"train.accumulation": n}) for n in (2, 4)}
    saving = {"train.zero_stage": 3, "model.checkpointing": True, "align.train_image_encoder": False}
    variants["checkpointing"] = override(base, saving)
    two = run(variants, 2, tmp_path / "two")
    alone = {name: override(stages[name], {"train.workers": 1}) for name in ("zero0", "zero3")}
    one = run(alone, 1, tmp_path / "one")
    first = one["zero0"]
    curve = [step["kspace_loss"] for step in first]
    assert np.isfinite(curve).all()
    assert len(set(curve)) == len(curve), "the losses must move, else equality says nothing"
    for workers, found in ((1, one), (2, two)):
        for name, steps in found.items():
            assert_equal(steps, first, f"{name} on {workers} worker(s)", rtol=1e-4, atol=1e-5)
    if os.environ.get("KMTR_GOLDEN") == "write":
        rounded = [{name: float(f"{value:.7g}") for name, value in step.items()} for step in first]
        GOLDEN.write_text(json.dumps(rounded, indent=2) + "\n")
    golden = json.loads(GOLDEN.read_text())
    for workers, found in ((1, one), (2, two)):
        for name in stages.keys() & found:
            assert_equal(found[name], golden, f"golden, {name} on {workers} worker(s)", rtol=1e-3, atol=1e-4)
