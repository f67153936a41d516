"""Four tasks in one model, masks and images among them: one worker equals two and two micro-batches, every ZeRO stage
the others, and a killed run ends as one that nothing happens to.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
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

STEPS = 4
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


@pytest.fixture(scope="module")
def folder(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where legs run: with their statistics."""
    folder = tmp_path_factory.mktemp("legs")
    reader = Dataset.open(config.data).reader("train", config.data)
    tables = statistics.tables(config, reader)
    legs.keep(tables | start.task_tables(config, reader, tables), folder)
    return folder


def leg(config: RunConfig, layout: Layout, name: str = "", **changes: Any) -> Leg:
    """All steps of a run."""
    asked = dict(zip(("train.workers", "train.accumulation", "train.zero_stage"), layout, strict=True))
    text = to_json(override(config, asked))
    return replace(Leg(name or "-".join(map(str, layout)), text, 0, STEPS), **changes)


def assert_moves(steps: Steps) -> None:
    """Else equality says nothing: every loss is there, finite, another one in every step, and so is the gradient."""
    for name in LOGGED | {"gradient_norm"}:
        assert len({step[name] for step in steps}) == STEPS, name
    assert all(step["applied"] for step in steps)


def test_workers_micro_batches_zero_stages_and_restarts_agree(config: RunConfig, folder: Path) -> None:
    """A restart is a fresh engine with other weights, on the checkpoint of half of the steps: equal bit for bit."""
    (one,) = legs.run(folder, 1, [leg(config, (1, 1, 0))]).values()
    there = str(folder / "checkpoint")
    halves = {
        "first": {"stop": STEPS // 2, "target": there},
        "second": {"start": STEPS // 2, "source": there, "seed": 1},
    }
    restarted = [leg(config, (2, 2, 3), name, **changes) for name, changes in halves.items()]
    two, first, second = legs.run(folder, 2, [leg(config, (2, 2, 3)), *restarted]).values()
    assert_moves(one)
    assert spread(two, one) < 1e-4
    assert first + second == two


@pytest.mark.full
@pytest.mark.parametrize(("bf16", "workers", "losses"), [(False, 1e-4, 1e-5), (True, 0.05, 5e-3)], ids=["fp32", "bf16"])
def test_the_whole_table(config: RunConfig, bf16: bool, workers: float, losses: float, folder: Path) -> None:
    """KMTR_TABLE=FILE adds the differences of `kmtr/train/RESULTS.md` to a JSON file.

    Args:
        workers: largest difference of any logged value, gradient norm included.
        losses: of the losses.
    """
    asked = override(config, {"train.bf16": bf16})
    layouts = [(world, micro, zero) for world in (1, 2) for zero in range(4) for micro in (1, 2)]
    said = [legs.run(folder, world, [leg(asked, one) for one in layouts if one[0] == world]) for world in (1, 2)]
    found = dict(zip(layouts, (steps for of_world in said for steps in of_world.values()), strict=True))
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


@pytest.mark.full
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
