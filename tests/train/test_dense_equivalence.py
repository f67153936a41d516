"""Four tasks in one model, masks and images among them: one worker equals two and two micro-batches, every ZeRO stage
the others, and a killed run ends as one that nothing happens to.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import forked_workers
import legs
import pytest
from forked_workers import Dying, instead_of_ray_train, last_checkpoint
from legs import Leg, Steps, spread
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException

from kmtr.config import RunConfig, override, to_json
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import statistics
from kmtr.exported import MODEL_WEIGHTS
from kmtr.train import checkpoint, driver, start

pytestmark = pytest.mark.slow

STEPS = 5
LOGGED = {"loss", "phenotypes_loss", "diseases_loss", "segmentation_loss", "reconstruction_loss"}
Layout = tuple[int, int, int]
"""Workers, micro-batches of each, ZeRO stage."""


@pytest.fixture(scope="module")
def config(small: RunConfig) -> RunConfig:
    asked = {
        "stage": "task",
        "task.tasks": "phenotypes,diseases,segmentation,reconstruction",
        "task.encoder": "none",
        "task.steps": STEPS,
        "task.warmup_steps": 1,
        "task.frames": 1,
        "task.patch": (8, 8),
        "task.channels": 8,
        "task.data_consistency": True,
    }
    return override(small, asked)


def trained(config: RunConfig, layouts: list[Layout], folder: Path) -> dict[Layout, Steps]:
    """What each step logged, by layout."""
    dataset = Dataset.open(config.data)
    reader = dataset.reader("train", config.data)
    tables = statistics.tables(config, reader)
    legs.keep(tables | start.task_tables(config, reader, tables), folder)
    found: dict[Layout, Steps] = {}
    for world in sorted({workers for workers, *_ in layouts}):
        mine = {layout: "-".join(map(str, layout)) for layout in layouts if layout[0] == world}
        asked = {
            name: to_json(
                override(config, {"train.workers": world, "train.accumulation": micro, "train.zero_stage": zero})
            )
            for (_, micro, zero), name in mine.items()
        }
        said = legs.run(folder, world, [Leg(name, text, 0, config.task.steps) for name, text in asked.items()])
        found |= {layout: said[name] for layout, name in mine.items()}
    return found


def assert_moves(steps: Steps) -> None:
    """Else equality says nothing: every loss is there, finite, another one in every step, and so is the gradient."""
    for name in LOGGED | {"gradient_norm"}:
        assert len({step[name] for step in steps}) == STEPS, name
    assert all(step["applied"] for step in steps)


def test_workers_micro_batches_and_zero_stages_agree(config: RunConfig, tmp_path: Path) -> None:
    one, *others = trained(config, [(1, 1, 0), (1, 2, 2), (2, 1, 3), (2, 2, 1)], tmp_path).values()
    assert_moves(one)
    for other in others:
        assert spread(other, one) < 1e-4


@pytest.mark.full
@pytest.mark.parametrize(("bf16", "workers", "losses"), [(False, 1e-4, 1e-5), (True, 0.05, 5e-3)], ids=["fp32", "bf16"])
def test_the_whole_table(config: RunConfig, bf16: bool, workers: float, losses: float, tmp_path: Path) -> None:
    """KMTR_TABLE=FILE adds the differences of `kmtr/train/RESULTS.md` to a JSON file.

    Args:
        workers: largest difference of any logged value, gradient norm included.
        losses: of the losses.
    """
    layouts = [(world, micro, zero) for zero in range(4) for world in (1, 2) for micro in (1, 2)]
    found = trained(override(config, {"train.bf16": bf16}), layouts, tmp_path)
    table: dict[str, dict[str, float]] = {}
    for zero in range(4):
        one = found[1, 1, zero]
        assert_moves(one)
        of_stage = {f"{world} x {micro}": found[world, micro, zero] for world, micro in ((1, 2), (2, 1), (2, 2))}
        of_stage["against ZeRO 0"] = found[1, 1, 0]
        for name, other in of_stage.items():
            whole, alone = spread(other, one), spread(other, one, sorted(LOGGED))
            table.setdefault(f"ZeRO {zero}{', bf16' * bf16}", {}).update({name: whole, f"{name}, losses": alone})
            assert (whole < workers, alone < losses) == (True, True), (zero, name, whole, alone)
    if kept := os.environ.get("KMTR_TABLE"):
        before = json.loads(Path(kept).read_text()) if Path(kept).exists() else {}
        Path(kept).write_text(json.dumps(before | table, indent=1))


def test_a_killed_run_ends_with_the_same_numbers(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command again, on two workers with two micro-batches each, to the last bit of the model."""
    instead_of_ray_train(monkeypatch)

    def asked(place: str) -> RunConfig:
        changes: dict[str, Any] = {
            "train.workers": 2,
            "train.accumulation": 2,
            "storage.root": str(tmp_path / place),
            "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db",
        }
        return override(config, changes)

    whole = driver.fit(asked("whole"), quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(forked_workers, "WORK", Dying(1))
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            driver.fit(asked("killed"), quiet=True)
    resumed = driver.fit(asked("killed"), quiet=True)
    kept = checkpoint.read_head(Path(last_checkpoint(Path(resumed.folder)).path))["progress"]
    assert (kept["step"], kept["layouts"][0][0]) == (STEPS, 0)
    assert resumed.metrics == whole.metrics
    assert {f"val/{name}" for name in ("segmentation_score", "reconstruction_score")} <= resumed.metrics.keys()
    one, other = (load_file(Path(outcome.encoder) / MODEL_WEIGHTS) for outcome in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
