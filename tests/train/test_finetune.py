"""Training on labels from its settings to a model on its own, by the real worker, without Ray."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from cohort import simulated, write
from forked_workers import instead_of_ray_train

import kmtr
from kmtr.config import RunConfig, override
from kmtr.data.dataset import record
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import pipeline
from kmtr.data.loader.collate import collate
from kmtr.evaluate import answers, finetune
from kmtr.evaluate.predictions import by_areas, read, together
from kmtr.evaluate.task_predictions import by_split, mappable, trained
from kmtr.evaluate.task_tables import tables_of
from kmtr.exported import AREAS
from kmtr.exported import MODEL_HEAD as HEAD
from kmtr.exported import MODEL_WEIGHTS as WEIGHTS
from kmtr.inference import TaskModel
from kmtr.tasks import Model, Preparer, stages_of
from kmtr.tasks.phenotypes import over_known
from kmtr.tracking.store import client
from kmtr.train import driver, start
from kmtr.train.resolve import resolve
from kmtr.types import PHENOTYPES, InputError, Study

CPU = torch.device("cpu")
TARGETS = ("lvedv_ml", "lvef_pct")
DISEASES = ("dcm", "hcm")


@pytest.fixture(scope="module")
def config(small: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A pretraining of a few steps on 40 labelled hearts, on two workers; some labels are unknown."""
    folder = tmp_path_factory.mktemp("finetune")
    asked = {
        "data.root": str(folder / "data"),
        "storage.root": str(folder / "runs"),
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "data.loader": "threads",
        "data.global_batch": 8,
        "train.workers": 2,
        "masked.steps": 4,
        "align.steps": 0,
        "train.eval_every": 10,
        "train.log_every": 10,
        "evaluate.accelerations": (2, 4),
        "evaluate.bootstrap": 20,
    }
    made = override(small, {**asked, "stage": "masked"})

    def study(i: int) -> Study:
        one = simulated(i, made)
        labels = {**one.labels, "dcm": float(i % 2), "hcm": float(i % 3 == 0)}
        labels["lvef_pct"] = float("nan") if i % 4 == 0 else labels["lvef_pct"]
        del labels["lvm_g"]
        return replace(one, labels=labels)

    split = {"train": range(24), "val": range(24, 32), "test": range(32, 40)}
    write(folder / "data", {name: [study(i) for i in rows] for name, rows in split.items()}, "float32")
    return made


@pytest.fixture(scope="module")
def forked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        instead_of_ray_train(patch)
        patch.setattr(finetune, "start_ray", lambda: None)
        yield


def on_labels(config: RunConfig, **changes: object) -> RunConfig:
    """Settings of a run on labels."""
    keys = {f"task.{name}": value for name, value in changes.items()}
    asked = {"stage": "task", "task.tasks": "phenotypes,diseases", "task.targets": TARGETS, "task.diseases": DISEASES}
    return override(config, asked | {"task.steps": 6, "task.encoder": "none"} | keys)


@pytest.fixture(scope="module")
def tuned(forked: None, config: RunConfig) -> dict[str, object]:
    """What the command answers, of a run from the pretrained encoder."""
    encoder = driver.fit(config).encoder
    return finetune.run(override(on_labels(config, encoder=encoder), {"tracking.model": "heart"}))


def test_it_ends_with_tables_a_model_and_predictions(
    tuned: dict[str, object], config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    table = read(Path(str(tuned["predictions"])))
    systems = set(table.column("system").to_pylist())
    read_off = {"phenotypes then disease", "ceiling, disease"}
    assert systems == {"k-MTR fine-tuned", "untrained encoder", "ridge", "mean"} | read_off
    assert set(table.column("target").to_pylist()) == {*TARGETS, *DISEASES}
    assert set(table.column("acceleration").to_pylist()) == {2, 4}
    metrics = dict(tuned["metrics"])  # type: ignore[call-overload]
    assert {"lvedv_r2", "lvedv_r2_ridge", "mean_r2", "dcm_auroc", "dcm_f1", "hcm_f1"} <= metrics.keys()
    assert tuned["registered"] == "models:/heart/1"
    card = (Path(str(tuned["model"])) / "README.md").read_text()
    for said in ("24 subjects, 6 steps from a pretrained encoder", "`lvef_pct` of 18", "K-MTR Fine-Tuned", "| Mean |"):
        assert said.lower() in card.lower()
    for whole in ("Phenotypes on 8 held-out subjects, 95 % bootstrap intervals", "Diseases on 8 held-out subjects"):
        assert whole in card
    again = finetune.run(on_labels(config, encoder=str(Path(str(tuned["folder"])).parent / _encoder_of(config))))
    assert again["reused"]
    assert again["metrics"] == metrics
    assert "registered" not in again
    assert "is finished, reused" in capsys.readouterr().out


def test_thresholds_are_of_validation_subjects_in_a_file_of_their_own(tuned: dict[str, object]) -> None:
    tested, validated = (
        read(Path(str(tuned["folder"])) / name) for name in ("predictions.parquet", "validation.parquet")
    )
    who = [set(table.column("subject").to_pylist()) for table in (tested, validated)]
    assert [len(names) for names in who] == [8, 8]
    assert not who[0] & who[1]
    assert set(validated.column("target").to_pylist()) == set(DISEASES)
    asked = ("system", "acceleration", "target")
    said = [{tuple(row[key] for key in asked) for row in table.to_pylist()} for table in (tested, validated)]
    assert said[1] == {row for row in said[0] if row[2] in DISEASES}
    card = (Path(str(tuned["model"])) / "README.md").read_text()
    assert "diseased of validation subjects: dcm 4 of 8, hcm 3 of 8" in card


def _encoder_of(config: RunConfig) -> str:
    """Path of the pretrained encoder below the folder of all runs."""
    outcome = driver.fit(config)
    assert outcome.reused
    return str(Path(outcome.encoder).relative_to(Path(outcome.folder).parent))


def test_the_model_on_its_own_predicts_the_same(tuned: dict[str, object], config: RunConfig) -> None:
    model = kmtr.load_model(str(tuned["model"]))
    assert model.units == {"lvedv_ml": "mL", "lvef_pct": "%", "dcm": "probability", "hcm": "probability"}
    table = read(Path(str(tuned["predictions"]))).to_pylist()
    dataset = Dataset.open(config.data)
    reader = dataset.reader("test", config.data)
    at = override(config, {"sampling.accelerations": (4,)})
    rows = list(range(len(reader)))
    (host,) = pipeline.read_in_order(reader, rows, len(rows), at)
    found = model(host.to(CPU, model.readout))
    names = reader.samples(rows).meta.column("subject_id").to_pylist()
    for target in (*TARGETS, *DISEASES):
        said = {
            row["subject"]: row["value"]
            for row in table
            if (row["target"], row["acceleration"], row["system"]) == (target, 4, "k-MTR fine-tuned")
        }
        np.testing.assert_allclose(found[target].numpy(), [said[name] for name in names], rtol=1e-5)
    study = model.predict(simulated(33, config), acceleration=4)
    assert study.keys() == model.units.keys()
    assert 0 < study["dcm"] < 1
    assert 20 < study["lvedv_ml"] < 500


def test_all_tasks_end_with_a_report_that_names_nobody_and_is_made_anew_from_predictions(
    forked: None, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = "phenotypes,diseases,segmentation,reconstruction"
    asked = override(on_labels(config, tasks=tasks, frames=1, patch=(8, 8), channels=8), {"train.workers": 1})
    chosen = ("lvedv_ml", "dcm")  # 8 validation subjects, who would choose, choose nothing
    monkeypatch.setattr(answers.Choice, "by_areas", property(lambda one: one.label in chosen))
    monkeypatch.setattr(answers, "MIN_KNOWN", 2)
    said = finetune.run(asked)
    folder, report = Path(said["folder"]), Path(said["report"])
    assert report == folder / "report.html"
    page, data = report.read_text(), json.loads((folder / "report.json").read_text())
    tables = {one["name"]: one for one in data["tables"]}
    assert {"phenotypes", "phenotypes_gain", "diseases", "diseases_gain", "dice", "dice_gain", "images"} <= set(tables)
    assert {path.stem for path in (folder / "tables").iterdir()} == set(tables)
    assert all(html.escape(one["caption"]) in page for one in tables.values())
    assert page.count("<figure>") == len(data["figures"])
    for shown in (
        "Bland-Altman",
        "receiver operating",
        "contours",
        "zero-filled, temporally shared, low-rank + sparse and predicted",
    ):
        assert any(shown in caption for caption in data["figures"]), shown
    files = [page, json.dumps(data), *(path.read_text() for path in (folder / "tables").iterdir())]
    rows = read(Path(said["predictions"]))
    names = set(rows.column("subject").to_pylist())
    assert len(names) == 8
    assert not any(name in text for name in names for text in files)
    store = client(config.tracking.uri)
    assert [file.path for file in store.list_artifacts(said["run_id"], "report")] == ["report/report.html"]

    model, dataset = kmtr.load_model(said["model"]), Dataset.open(config.data)
    assert model.areas is not None
    assert (model.areas.labels, list(model.areas.maps)) == (chosen, [2, 4])
    _answers_as_chosen(model, asked, rows)
    sent = {file.path for file in store.list_artifacts(said["run_id"], "model")}
    assert {f"model/{name}" for name in (AREAS, HEAD, WEIGHTS)} <= sent
    few = by_split(override(asked, {"evaluate.dense": 3}), dataset, model, by_areas=mappable(model, dataset)).tables
    first, numbers = rows.column("subject").to_pylist()[:3], {*PHENOTYPES, *DISEASES}
    every = {_key(row): row for row in rows.to_pylist() if row["system"] != together(trained(asked)).system}
    whole = {key: row["value"] for key, row in every.items() if row["subject"] in first or row["target"] in numbers}
    assert len(every) == len(rows) - 2 * 8, "areas and head together say one phenotype of 8 subjects at two R"
    mine = {_key(row): row["value"] for row in few["test"].to_pylist()}
    measured = {key for key in whole if " masks" in str(key[1]) and key[0] not in first}
    assert measured
    assert mine.keys() == whole.keys() - measured
    for key, value in mine.items():
        assert value == pytest.approx(whole[key], rel=1e-4, abs=1e-6), key
    shown, metrics = finetune.summary(few["test"], asked)
    assert {"mean_dice", "mean_r2", "mean_r2_areas", "dcm_auroc"} <= metrics.keys()
    dice = next(one for one in tables_of(few["test"], {trained(asked)}, 20) if one.name == "dice")
    assert "3 held-out" in dice.caption

    monkeypatch.setattr(finetune, "by_split", None)  # from here on nothing is predicted for a table
    made = report.stat().st_mtime_ns
    assert finetune.run(asked)["report"] == str(report)
    assert report.stat().st_mtime_ns == made
    report.unlink()
    assert finetune.run(asked)["report"] == str(report)
    again = json.loads((folder / "report.json").read_text())
    assert (again["tables"], again["figures"]) == (data["tables"], data["figures"])


def _answers_as_chosen(model: TaskModel, asked: RunConfig, rows: pa.Table) -> None:
    """By areas of its masks the labels that validation subjects chose, by its heads all others."""
    assert model.areas is not None
    reader = Dataset.open(asked.data).reader("test", asked.data)
    study = record.to_study(reader.read([3]))
    table = {_key(row): row["value"] for row in rows.to_pylist()}
    ours = trained(asked)
    for r in (2, 4):
        said = model.predict(study, acceleration=r)
        for label in model.units:
            blended = together(ours) if label in model.areas.blends[r] else by_areas(ours)
            who = blended if label in model.areas.labels else ours
            wanted = table[study.subject_id, who.system, who.input, r, label]
            assert said[label] == pytest.approx(wanted, rel=1e-4, abs=1e-6), (r, label)


def _key(row: dict[str, object]) -> tuple[object, ...]:
    return tuple(row[name] for name in ("subject", "system", "input", "acceleration", "target"))


def test_it_starts_from_the_encoder_or_from_its_initial_weights(tuned: dict[str, object], config: RunConfig) -> None:
    model = kmtr.load_model(str(tuned["model"]))
    encoder = kmtr.load_encoder(driver.fit(config).encoder)
    frozen = finetune.run(on_labels(config, encoder=str(Path(driver.fit(config).encoder)), frozen=True))
    weights = kmtr.load_model(str(frozen["model"])).module.systems["kspace"].state_dict()
    for name, weight in encoder.module.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=0)
    moved = model.module.systems["kspace"].state_dict()
    assert any(not torch.equal(moved[name], weights[name]) for name in weights)


def test_heads_are_made_to_answer_the_mean_and_the_prevalence(
    config: RunConfig, small: RunConfig, tables: dict[str, torch.Tensor]
) -> None:
    asked = on_labels(config)
    dataset = Dataset.open(asked.data)
    reader = dataset.reader("train", asked.data)
    moments = start.label_moments(asked, reader)
    prepare, (stage,) = Preparer(asked, tables | moments, CPU), stages_of(asked)
    batch = collate(reader.samples(range(4)), asked, wanted=prepare.wanted).to(CPU)
    said = Model(asked)(prepare(batch, stage), predict=True)
    both = said["phenotypes"] | said["diseases"]
    for column, label in enumerate(prepare.labels):
        torch.testing.assert_close(both[label], moments["label_mean"][column].expand(4), rtol=1e-5, atol=1e-6)


def test_an_unknown_label_leaves_all_other_gradients_as_they_are(
    config: RunConfig, tables: dict[str, torch.Tensor]
) -> None:
    """A label of diseases that is not known: the gradient of the phenotypes' head is the same bit for bit."""
    asked = on_labels(config)
    reader = Dataset.open(asked.data).reader("train", asked.data)
    prepare, (stage,) = Preparer(asked, tables | start.label_moments(asked, reader), CPU), stages_of(asked)
    batch = collate(reader.samples(range(4)), asked, wanted=prepare.wanted).to(CPU)
    fewer = batch.labels.clone()
    fewer[1, prepare.labels.index("dcm")] = torch.nan
    found = []
    for labels in (batch.labels, fewer):
        torch.manual_seed(0)
        model = Model(asked)
        out = model(prepare(replace(batch, labels=labels), stage))
        out["phenotypes"]["loss"].sum().backward(retain_graph=True)
        first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        out["diseases"]["loss"].sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        found.append((first, out["phenotypes"]["loss"], out["diseases"]["loss"]))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][2], found[1][2])


def test_a_subject_without_labels_adds_nothing() -> None:
    error = torch.tensor([[1.0, 3.0], [5.0, torch.nan], [torch.nan, torch.nan]], requires_grad=True)
    loss = over_known(error, error.detach())
    assert loss.tolist() == [2.0, 5.0, 0.0]
    loss.sum().backward()
    assert error.grad is not None
    assert error.grad.tolist() == [[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]


def test_what_does_not_fit_is_refused_in_one_line(
    forked: None, config: RunConfig, tuned: dict[str, object], tmp_path: Path
) -> None:
    encoder = driver.fit(config).encoder
    wide = {"model.width": 2 * config.model.width, "task.encoder": encoder}
    for asked, said in (
        (on_labels(config, targets=("lvm_g",)), r"task\.targets: expected labels .* got lvm_g"),
        (on_labels(config, encoder=str(tmp_path)), r"task\.encoder: expected a folder with encoder\.safetensors"),
        (on_labels(config, encoder=""), r"task\.encoder: run .* is not finished; pretrain it first"),
        (on_labels(config, tasks="masked"), r"task\.tasks: expected tasks on labels, got masked"),
        (
            override(on_labels(config), wide),
            r"model\.width: expected 32, as the encoder in .* has it, got 64; take its",
        ),
    ):
        with pytest.raises(InputError, match=said) as error:
            resolve(asked)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"tracking\.model: expected a task that predicts numbers"):
        finetune.run(override(on_labels(config, tasks="segmentation"), {"tracking.model": "heart"}))
    model = Path(str(tuned["model"]))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / HEAD).write_bytes((model / HEAD).read_bytes())
    with pytest.raises(InputError, match=rf"model: expected a folder with .* without {WEIGHTS}"):
        kmtr.load_model(tmp_path / "half")


def test_diseases_see_the_phenotypes_that_are_predicted(config: RunConfig, tables: dict[str, torch.Tensor]) -> None:
    """Whatever the order of the tasks; the phenotypes' head has no gradient from it."""
    for tasks in ("phenotypes,diseases", "diseases,phenotypes"):
        asked = on_labels(config, tasks=tasks)
        reader = Dataset.open(asked.data).reader("train", asked.data)
        prepare, (stage,) = Preparer(asked, tables | start.label_moments(asked, reader), CPU), stages_of(asked)
        batch = collate(reader.samples(range(4)), asked, wanted=prepare.wanted).to(CPU)
        model = Model(asked)
        head, seen = model.heads["phenotypes"][1], model.heads["diseases"][2]
        torch.nn.init.ones_(head.bias)
        before = model(prepare(batch, stage), predict=True)["diseases"]["dcm"]
        torch.nn.init.ones_(seen.weight)
        out = model(prepare(batch, stage), predict=True)["diseases"]["dcm"]
        torch.testing.assert_close(
            out.logit() - before.logit(), torch.full_like(out, len(TARGETS)), rtol=1e-4, atol=1e-4
        )
        model(prepare(batch, stage))["diseases"]["loss"].sum().backward()
        assert head.weight.grad is None
        assert seen.weight.grad is not None
        assert seen.weight.grad.any()


def test_the_prevalence_has_a_loss_of_one(config: RunConfig, tables: dict[str, torch.Tensor]) -> None:
    asked = on_labels(config)
    reader = Dataset.open(asked.data).reader("train", asked.data)
    prepare, (stage,) = Preparer(asked, tables | start.label_moments(asked, reader), CPU), stages_of(asked)
    batch = collate(reader.samples(range(len(reader))), asked, wanted=prepare.wanted).to(CPU)
    out = Model(asked)(prepare(batch, stage))
    assert float(out["diseases"]["loss"].mean()) == pytest.approx(1, rel=1e-4)
