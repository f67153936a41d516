"""Tasks that not all subjects teach: each loss is the mean over those who do, at any number of processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import one_worker
import pytest
import torch
from cohort import simulated, write
from one_worker import CPU, PlainEngine
from safetensors.torch import load_file
from test_dense_input import changed, every_other_line, without_contours
from torch import Tensor

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import statistics
from kmtr.data.loader.collate import collate
from kmtr.tasks import Model, Preparer, stages_of
from kmtr.tasks.base import LOSS
from kmtr.train import start
from kmtr.types import Study

TASKS = ("phenotypes", "diseases", "segmentation", "reconstruction")
TEACHERS = {"phenotypes": 7, "diseases": 4, "segmentation": 3, "reconstruction": 6}
"""Task -> subjects among 8 who have what it learns from."""
CASES = [("task", micro, {}) for micro in (1, 2, 4)]


def cohort(config: RunConfig) -> list[Study]:
    """The last is known by its disease alone; two were undersampled; three are contoured."""
    studies = [simulated(i, config) for i in range(8)]
    for i, study in enumerate(studies):
        ill = float(i % 2) if i in (1, 4, 6, 7) else np.nan
        labels = {"lvedv_ml": np.nan if i == 7 else study.labels["lvedv_ml"], "dcm": ill}
        one = study if i in (0, 1, 4) else changed(study, without_contours)
        studies[i] = replace(changed(one, every_other_line) if i in (3, 7) else one, labels=labels)
    return studies


@pytest.fixture(scope="module")
def config(small: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("partly")
    asked = {"stage": "task", "task.tasks": TASKS, "task.targets": ("lvedv_ml",), "task.diseases": ("dcm",)}
    asked |= {"task.encoder": "none", "task.steps": 4, "task.patch": (8, 8), "task.channels": 8}
    made = override(small, asked | {"data.root": str(root / "data"), "train.workers": 1})
    write(root / "data", {"train": cohort(made)}, "float32")
    return made


@pytest.fixture(scope="module")
def folder(config: RunConfig) -> Path:
    """Gradients and logs of every case, by one process and by two."""
    path = Path(config.data.root).parent
    reader = Dataset.open(config.data).reader("train", config.data)
    tables = statistics.fit(config, reader).tensors()
    tables |= start.task_tables(config, reader, tables)
    one_worker.one_and_two(config, tables, path, CASES)
    return path


def test_the_gradient_is_that_of_the_mean_over_those_who_teach(config: RunConfig, folder: Path) -> None:
    """Against autograd on the plainest formula, over one batch of all subjects."""
    tables = load_file(folder / "tables.safetensors")
    tables["static_mean"] = torch.view_as_complex(tables["static_mean"])
    torch.manual_seed(0)
    model, prepare, (stage,) = Model(config), Preparer(config, tables, CPU), stages_of(config)
    reader = Dataset.open(config.data).reader("train", config.data)
    batch = collate(reader.samples(range(8)), config, wanted=prepare.wanted).to(CPU)
    out = model(prepare(batch, stage))
    means: dict[str, Tensor] = {}
    for name in TASKS:
        teaches = prepare.tasks[name].teaches(batch, prepare.given())
        assert teaches is not None
        assert int(teaches.sum()) == TEACHERS[name]
        assert not out[name][LOSS][~teaches].any()
        means[name] = out[name][LOSS][teaches].mean()
    torch.stack(list(means.values())).sum().backward()
    expected = PlainEngine(model, 1).average(1)
    found = load_file(folder / "1-0.safetensors")
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    for name, mean in means.items():
        torch.testing.assert_close(found[f"logged.{name}_loss"], mean.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["logged.loss"], sum(means.values()).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_workers_and_micro_batches_change_nothing(folder: Path, world: int, number: int) -> None:
    whole, divided = (load_file(folder / f"{name}.safetensors") for name in ("1-0", f"{world}-{number}"))
    assert divided.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(divided[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_run_says_who_has_what(config: RunConfig) -> None:
    dataset = Dataset.open(config.data)
    said = "7 of 8 have phenotypes; 4 of 8 have diseases (dcm 2 of 4); 3 of 8 have contours for segmentation; "
    assert start.said_of_labels(config, dataset) == said + "6 of 8 have all lines for reconstruction"
    asked = override(config, {"task.tasks": ("phenotypes", "segmentation"), "task.labels": 3, "data.global_batch": 3})
    assert start.said_of_labels(asked, dataset) == "3 of 3 have phenotypes; 3 of 3 have contours for segmentation"
    rows = start.budget(asked, dataset)
    assert rows is not None
    assert rows.tolist() == [0, 1, 4]
