"""A new task and a new system are one file each: those of the rooms' pages, trained and evaluated as any other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from kmtr import systems
from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader import pipeline, planning
from kmtr.data.loader.collate import collate
from kmtr.tasks import TASKS, Model, Preparer, stages_of
from kmtr.train.engine import ShardedEngine
from kmtr.train.step import TrainingStep
from kmtr.types import InputError

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
STEPS = 150


def example(page: str) -> dict[str, Any]:
    """Names that the one example in Python of a page defines."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, page, "exec"), names)
    return names


@pytest.fixture
def toy(small: RunConfig, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run of the task on the system; both are registered."""
    thumbnail = example("kmtr/systems/README.md")["Thumbnail"]()
    monkeypatch.setitem(systems.SYSTEMS, "thumbnail", thumbnail)
    monkeypatch.setitem(TASKS, "motion", example("kmtr/tasks/README.md")["Motion"])
    changes = {"stage": "task", "task.tasks": "motion", "task.steps": STEPS, "task.learning_rate": 1e-2}
    return override(small, changes | {"task.system": "thumbnail", "train.workers": 1, "data.global_batch": 8})


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process."""
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_task_and_a_system_of_one_file_each_are_trained_and_predict(
    alone: None, toy: RunConfig, reader: Reader, tables: dict[str, torch.Tensor]
) -> None:
    """By the real engine, sharded, through the one training step; then asked for predictions."""
    config = override(toy, {"data.loader": "threads", "train.zero_stage": 2})
    dataset = Dataset.open(config.data)
    plan = planning.plan_of(config, dataset)
    torch.manual_seed(0)
    engine, prepare = ShardedEngine(Model(config), config, 1, CPU), Preparer(config, tables, CPU)
    (stage,) = stages_of(config)
    whole = collate(reader.samples(range(len(reader))), config).to(CPU)
    truth = prepare(whole, stage).tasks["motion"]["truth"]

    def error() -> float:
        with torch.no_grad():
            found = engine(prepare(whole, stage), predict=True)["motion"]["motion"]
        return float((found - truth).square().mean())

    before, step = error(), TrainingStep(config, engine, prepare, CPU, 1)
    batches = pipeline.batches(config, reader, plan, range(STEPS), 0, 1)
    reports = [step(number, host) for number, host in enumerate(batches)]
    assert {report.stage for report in reports} == {"task"}
    assert set(reports[0].means) == {"motion_loss", "loss"}
    assert set(reports[0].rates) == {"thumbnail", "heads.motion"}
    assert error() < 0.2 * before
    assert error() < 0.5 * float(truth.var()), "better than the mean, which needs no input"
    engine.wrapped.destroy()


def test_a_frozen_system_stays_and_its_head_learns(
    toy: RunConfig, reader: Reader, tables: dict[str, torch.Tensor]
) -> None:
    config = override(toy, {"task.frozen": True})
    model, prepare = Model(config), Preparer(config, tables, CPU)
    batch = collate(reader.samples(range(4)), config).to(CPU)
    (stage,) = stages_of(config)
    model(prepare(batch, stage))["motion"]["loss"].sum().backward()
    learnt = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learnt == {"heads"}


def test_the_same_task_stands_on_another_system(
    toy: RunConfig, reader: Reader, tables: dict[str, torch.Tensor]
) -> None:
    config = override(toy, {"task.system": "kspace"})
    model, prepare = Model(config), Preparer(config, tables, CPU)
    batch = collate(reader.samples(range(4)), config).to(CPU)
    (stage,) = stages_of(config)
    found = model(prepare(batch, stage), predict=True)["motion"]["motion"]
    assert found.shape == (4,)
    spoilt = batch.kspace + torch.where(batch.sampled[:, :, None, :, :, None], 0, 1e3)
    other = model(prepare(type(batch)(**{**vars(batch), "kspace": spoilt}), stage), predict=True)["motion"]["motion"]
    np.testing.assert_array_equal(other.detach(), found.detach())  # what was not acquired is not seen


def test_what_is_not_there_is_refused_in_one_line(toy: RunConfig) -> None:
    with pytest.raises(InputError, match=r"task\.tasks: expected some of masked, .*motion, got 'motoin'"):
        Model(override(toy, {"task.tasks": "motoin"}))
    with pytest.raises(InputError, match=r"task\.system: expected one of kspace, .*thumbnail, got 'u'"):
        Model(override(toy, {"task.system": "u"}))
    with pytest.raises(InputError, match=r"task\.tasks: expected one or more tasks"):
        override(toy, {"task.tasks": ()})
