"""Training on the labels of some subjects: which are read, whose moments, what the floors get, what is refused."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_finetune import DISEASES, TARGETS, config, forked, on_labels  # noqa: F401  # config and forked are fixtures

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import pipeline, planning, subjects
from kmtr.data.loader.batch import Wanted
from kmtr.data.loader.proof import prove
from kmtr.evaluate import finetune
from kmtr.evaluate.predictions import read
from kmtr.train import driver, start
from kmtr.train.handed import handed, taken
from kmtr.train.resolve import resolve
from kmtr.types import InputError

BUDGET = 16


@pytest.fixture(scope="module")
def limited(config: RunConfig) -> tuple[RunConfig, Dataset, np.ndarray]:  # noqa: F811
    """A run on 16 of 24 labelled subjects, two batches an epoch, and its rows."""
    asked, dataset = resolve(on_labels(config, labels=BUDGET))
    rows = start.budget(asked, dataset)
    assert rows is not None
    return asked, dataset, rows


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_reads_each_labelled_subject_once_and_no_other(
    limited: tuple[RunConfig, Dataset, np.ndarray], world: int
) -> None:
    asked, dataset, rows = limited
    plan = taken(asked, dataset, handed(asked, dataset, rows))
    reader, wanted = dataset.reader("train", asked.data), Wanted(("dcm",))
    labels = subjects.labels_of(reader, rows.tolist(), ("dcm",))
    assert plan.steps_per_epoch == 2
    prove(partial(planning.plan_of, asked, dataset, rows=rows), (1, 2, 4), epochs=3)
    for epoch in (0, 1):
        steps = range(plan.step_of(epoch, 0), plan.step_of(epoch + 1, 0))
        hosts = [
            host for rank in range(world) for host in pipeline.batches(asked, reader, plan, steps, rank, world, wanted)
        ]
        seen = Counter(key for host in hosts for key in host.meta["key"].tolist())
        mine = next(iter(pipeline.read_in_order(reader, rows.tolist(), BUDGET, asked)))
        assert seen == Counter(mine.meta["key"].tolist())
        assert sum(float(host.meta["labels"].sum()) for host in hosts) == labels.sum()


def test_the_moments_are_of_those_labels_alone(limited: tuple[RunConfig, Dataset, np.ndarray], tmp_path: Path) -> None:
    asked, dataset, rows = limited
    reader, names = dataset.reader("train", asked.data), start.labels_of(asked)
    assert names == (*TARGETS, *DISEASES)
    known = subjects.labels_of(reader, rows.tolist(), names)
    tables = driver.fitted_tables(asked, dataset, tmp_path, rows)
    np.testing.assert_allclose(tables["label_mean"], np.nanmean(known, axis=0), rtol=1e-6)
    np.testing.assert_allclose(tables["label_sd"], np.nanstd(known, axis=0), rtol=1e-6)
    every = driver.fitted_tables(asked, dataset, _made(tmp_path / "every"))
    assert not np.allclose(every["label_mean"], tables["label_mean"], rtol=1e-3)
    np.testing.assert_array_equal(every["static_mean"], tables["static_mean"])  # k-space needs no label


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_the_command_trains_and_compares_on_the_same_labels(
    forked: None,  # noqa: F811
    limited: tuple[RunConfig, Dataset, np.ndarray],
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked, dataset, rows = limited
    done = finetune.run(override(asked, {"task.steps": 2}))
    assert f"on {BUDGET} of 24 subjects" in capsys.readouterr().out
    table = read(Path(done["predictions"]))
    assert set(table.column("labels").to_pylist()) == {BUDGET}
    known = subjects.labels_of(dataset.reader("train", asked.data), rows.tolist(), ("lvedv_ml",))
    means = {row["value"] for row in table.to_pylist() if (row["system"], row["target"]) == ("mean", "lvedv_ml")}
    assert list(means) == pytest.approx([known.mean()]), "the floor is the mean of the same subjects"


def test_another_number_of_labels_is_another_run(limited: tuple[RunConfig, Dataset, np.ndarray]) -> None:
    asked, dataset, _ = limited
    names = {driver.run_folder(override(asked, {"task.labels": n}), dataset)[0] for n in (0, 16, 17)}
    assert len(names) == 3
    started = override(asked, {"run.name": "mine"})
    driver.begin(driver.run_folder(started, dataset)[1], started, dataset)
    with pytest.raises(InputError, match=r"^task\.labels: run mine has 16, got 17; "):
        driver.run_folder(override(started, {"task.labels": 17}), dataset)


def test_budgets_that_can_not_be_had_are_refused(config: RunConfig) -> None:  # noqa: F811
    for count, said in (
        (25, r"task\.labels: expected at most 24, the training subjects with a label of these tasks, .* got 25"),
        (2, r"task\.labels: expected at least \d+, with which every label is known .* got 2"),
        (7, r"task\.labels: expected at least data\.global_batch=8 subjects, got 7; lower .* by plan\.tail=pad"),
    ):
        with pytest.raises(InputError, match=f"^{said}") as error:
            resolve(on_labels(config, labels=count))
        assert "\n" not in str(error.value)
    resolve(override(on_labels(config, labels=7), {"plan.tail": "pad"}))
