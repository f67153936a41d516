"""Evaluation from its command: what it refuses, what it keeps, and that it needs no plan of a training."""

from __future__ import annotations

from pathlib import Path

import command
import numpy as np
import pytest
import torch
from cohort import simulated, write

from jobs import evaluate
from kmtr import tracking
from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import pipeline
from kmtr.data.loader.batch import Wanted
from kmtr.encoder import load_encoder
from kmtr.evaluate import predictions, probes, report
from kmtr.evaluate.scores import scores_of
from kmtr.evaluate.tables import metrics_of
from kmtr.exported import export_encoder
from kmtr.metrics import fit_ridges
from kmtr.model.encoder import line_encoder
from kmtr.report.html import text_table
from kmtr.tracking.store import client
from kmtr.train import driver
from kmtr.types import InputError


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_an_encoder_is_refused_in_one_line(small: RunConfig, tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "encoder"
    if there:
        folder.mkdir()
    config = override(small, {"evaluate.encoder": str(folder), "storage.root": str(tmp_path / "runs")})
    with pytest.raises(InputError, match=r"evaluate\.encoder: expected a folder with encoder\.safetensors") as error:
        report.run(config)
    assert str(error.value).endswith(f"got {folder}")
    assert "\n" not in str(error.value)


@pytest.fixture
def encoder(small: RunConfig, tables: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    torch.manual_seed(1)
    module = line_encoder(small.data, small.model)
    folder = tmp_path / "somewhere" / "encoder"
    export_encoder(folder, small, {name: p.detach().clone() for name, p in module.state_dict().items()}, tables)
    return folder


def evaluation(config: RunConfig) -> dict:
    return evaluate.run(command.words(config))


def test_tables_are_those_of_the_file_that_is_kept(
    small: RunConfig, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = override(small, {"evaluate.encoder": str(encoder), "storage.root": str(tmp_path / "runs")})
    said = evaluation(config)
    printed = capsys.readouterr().out
    file = Path(said["predictions"])
    assert file.parent == Path(said["report"]).parent
    reopened = scores_of(predictions.read(file))
    text = "\n\n".join(map(text_table, report.encoder_tables(reopened, config)))
    assert (file.parent / "tables.txt").read_text() == text
    assert text in printed
    assert metrics_of(reopened, config) == said["metrics"]
    assert {row["subject"] for row in predictions.read(file).to_pylist()} == pseudonyms(config)
    assert not any(name in printed + Path(said["report"]).read_text() for name in pseudonyms(config))

    monkeypatch.setattr(probes, "score", None)  # the second time nothing is computed
    assert evaluation(config) == said
    assert text in capsys.readouterr().out


def pseudonyms(config: RunConfig) -> set[str]:
    reader = Dataset.open(config.data).reader("test", config.data)
    return set(reader.samples(range(len(reader))).meta.column("subject_id").to_pylist())


def test_the_encoder_and_its_probe_say_what_the_file_holds(small: RunConfig, encoder: Path, tmp_path: Path) -> None:
    """One subject's prediction by hand: the embedding, and the ridge of the same labelled subjects."""
    config = override(small, {"evaluate.encoder": str(encoder), "storage.root": str(tmp_path / "runs")})
    said = predictions.read(Path(evaluation(config)["predictions"])).to_pylist()
    dataset, loaded = Dataset.open(config.data), load_encoder(encoder)
    at = override(config, {"sampling.accelerations": (4,)})
    parts = {}
    for split in ("train", "test"):
        reader = dataset.reader(split, config.data)
        read = pipeline.read_in_order(reader, range(len(reader)), 8, at, Wanted(("lvm_g",)))
        batches = [host.to(torch.device("cpu")) for host in read]
        x = np.concatenate([loaded.features(batch) for batch in batches])
        names = reader.samples(range(len(reader))).meta.column("subject_id").to_pylist()
        parts[split] = x, np.concatenate([batch.labels.numpy() for batch in batches]), names
    ridge = fit_ridges(parts["train"][0], parts["train"][1], ("lvm_g",))["lvm_g"]
    expected = dict(zip(parts["test"][2], ridge(parts["test"][0]), strict=True))
    found = {
        row["subject"]: row["value"]
        for row in said
        if (row["system"], row["acceleration"], row["target"]) == ("k-MTR encoder", 4, "lvm_g")
    }
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_dataset_of_fewer_subjects_than_a_batch_is_evaluated(small: RunConfig, encoder: Path, tmp_path: Path) -> None:
    """Ten training subjects; a batch takes 64."""
    subjects = {"train": [simulated(i, small) for i in range(10)], "test": [simulated(i, small) for i in range(20, 25)]}
    write(tmp_path / "few", subjects)
    changes = {"data.root": str(tmp_path / "few"), "data.global_batch": 64, "storage.root": str(tmp_path / "runs")}
    config = override(small, changes | {"evaluate.encoder": "none"})
    with pytest.raises(InputError, match="10"):
        driver.resolve(config)
    said = evaluation(config)
    assert set(said["r2"]) == {"ridge on central lines", "ridge on low-res image"}
    assert set(said["dice"]) == {"2", "4"}
    rows = predictions.read(Path(said["predictions"])).to_pylist()
    assert {row["labels"] for row in rows} == {10}
    assert len({row["subject"] for row in rows}) == 5
    other = evaluation(override(config, {"evaluate.encoder": str(encoder)}))
    assert Path(other["predictions"]).is_file()
    with pytest.raises(InputError, match="pretrain it first, or set evaluate"):
        evaluation(override(config, {"evaluate.encoder": ""}))


def test_a_target_that_too_few_subjects_have_is_refused(small: RunConfig, tmp_path: Path) -> None:
    subjects = {"train": [simulated(i, small) for i in range(4)], "test": [simulated(i, small) for i in range(20, 24)]}
    for study in subjects["test"][1:3]:
        study.labels["lvm_g"] = float("nan")
    write(tmp_path / "few", subjects)
    config = override(small, {"data.root": str(tmp_path / "few"), "storage.root": str(tmp_path / "runs")})
    with pytest.raises(InputError, match=r"evaluate\.targets: expected one that at least 3 .*got lvm_g$"):
        evaluation(override(config, {"evaluate.encoder": "none", "evaluate.targets": ("lvm_g",)}))


@pytest.mark.slow
def test_a_finished_run_is_found_by_its_settings_and_told_its_metrics(
    small: RunConfig, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own folder and MLflow run; predictions, which name subjects, stay out of MLflow."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, dataset = driver.resolve(override(small, {"storage.root": str(tmp_path / "runs")}))
    name, folder = driver.run_folder(config, dataset)
    run_id = tracking.open_run(config, name=name)
    driver.begin(folder, config, dataset)
    driver.finish(driver.Outcome(run_id, name, str(folder), str(encoder), {"step": 6.0}))
    said = evaluation(config)
    assert said["run_id"] == run_id
    assert Path(said["predictions"]) == folder / "report" / "predictions.parquet"
    store = client(config.tracking.uri)
    points = store.get_metric_history(run_id, "test/lvm_r2")
    assert [(point.step, point.value) for point in points] == [(6, said["metrics"]["lvm_r2"])]
    assert [file.path for file in store.list_artifacts(run_id, "report")] == ["report/report.html"]
