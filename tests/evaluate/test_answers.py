"""Labels that a model answers by areas of its masks: who chooses, what is said everywhere, files that do not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import safetensors.numpy
import torch
from cohort import simulated, write
from exported import TARGETS, maps_of, model_folder
from one_process import predicted_here
from torch import Tensor

import kmtr
from kmtr import area_maps, served
from kmtr.config import RunConfig
from kmtr.encoder import batch_of
from kmtr.evaluate import answers, predictions
from kmtr.evaluate.predict import command
from kmtr.evaluate.predictions import FINETUNED, HeldOut, Name, joined, read, rows
from kmtr.exported import AREAS, MODEL_HEAD
from kmtr.metrics.dense import Pair
from kmtr.tasks.views import slices_of, views_of
from kmtr.types import InputError, Study

CPU = torch.device("cpu")
OURS = Name("ours", "")


@pytest.fixture(scope="module")
def model(small: RunConfig, tables: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose maps at R = 2 and 4 answer the volume, its head the ejection fraction."""
    folder = tmp_path_factory.mktemp("answers") / "model"
    model_folder(folder, small, tables, ("phenotypes", "segmentation"))
    area_maps.export(folder, maps_of(small, ("lvedv_ml",)))
    return folder


def measured(model: Path, study: Study, r: int, at: int) -> float:
    """The volume of a study by the map of `at` from the masks at R = `r`, and by the head (`maps_of` weighs them)."""
    loaded = kmtr.load_model(model)
    assert loaded.areas is not None
    batch = batch_of(study, loaded.config, r, loaded.wanted).to(CPU)
    said = loaded(batch)
    (views,) = views_of(batch, loaded.config.data, said["masks"], said["masks"])
    area, head = loaded.areas.maps[at](views)["lvedv_ml"], float(said["lvedv_ml"])
    return 120 + 30 * (area - 90) / 40 + 5 * (head - 110) / 20


def test_each_path_answers_by_the_map_of_the_nearest_r(
    model: Path, small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies = [simulated(i, small) for i in range(3)]
    loaded, heads = kmtr.load_model(model), kmtr.load_model(model)
    heads.areas = None
    alone = loaded.predict(studies[0], acceleration=4)
    assert alone["lvedv_ml"] == pytest.approx(measured(model, studies[0], 4, 4), rel=1e-6)
    assert alone["lvedv_ml"] != pytest.approx(measured(model, studies[0], 4, 2), rel=1e-4), (
        "another map, another volume"
    )
    before = heads.predict(studies[0], acceleration=4)
    assert before["lvedv_ml"] != pytest.approx(alone["lvedv_ml"], rel=1e-4)
    assert before["lvef_pct"] == alone["lvef_pct"]
    with pytest.warns(UserWarning, match=r"R = 1\.00 is not among"):
        assert loaded.predict(studies[0])["lvedv_ml"] == pytest.approx(measured(model, studies[0], 1, 2), rel=1e-6), (
            "of all lines the nearest R is the lowest"
        )

    predicted_here(monkeypatch)
    write(tmp_path / "data", {"train": studies}, "float32")
    words = [str(model), f"data.root={tmp_path}/data", f"predict.out={tmp_path}/out", "predict.accelerations=2,4"]
    said = command.run(words)
    table = {
        (row["subject"], row["acceleration"], row["target"]): (row["value"], row["system"])
        for row in read(Path(said["predictions"])).to_pylist()
    }
    for study in studies:
        for r in (2, 4):
            one = loaded.predict(study, acceleration=r)
            for target in TARGETS:
                value, system = table[study.subject_id, r, target]
                assert value == pytest.approx(one[target], rel=1e-5)
                assert system == ("k-MTR from scratch" + (", areas and head" if target == "lvedv_ml" else ""))

    monkeypatch.setattr(served, "read", lambda path: studies[int(path)])
    asked = pd.DataFrame({"path": ["0", "2"], "acceleration": [4, 4]})
    answered = served._load_pyfunc(str(model)).predict(asked)
    assert answered["lvedv_ml"].tolist() == [loaded.predict(studies[i], acceleration=4)["lvedv_ml"] for i in (0, 2)]


def test_where_areas_are_unknown_the_heads_answer_and_it_is_said(
    model: Path, small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = simulated(0, small)
    flat = replace(study, views={name: replace(view, spacing_mm=None) for name, view in study.views.items()})
    loaded, heads = kmtr.load_model(model), kmtr.load_model(model)
    heads.areas = None
    with pytest.warns(UserWarning, match="size of a pixel is not: lvedv_ml by the model's heads"):
        assert loaded.predict(flat, acceleration=4)["lvedv_ml"] == heads.predict(flat, acceleration=4)["lvedv_ml"]
    predicted_here(monkeypatch)
    write(tmp_path / "data", {"train": [simulated(1, small), flat]}, "float32")
    command.run([str(model), f"data.root={tmp_path}/data", f"predict.out={tmp_path}/out", "predict.accelerations=2,4"])
    assert "of 1 subjects areas of masks are not known" in capsys.readouterr().out
    who = {
        row["subject"]: row["system"]
        for row in read(tmp_path / "out" / "predictions").to_pylist()
        if row["target"] == "lvedv_ml"
    }
    assert who[flat.subject_id] == "k-MTR from scratch"
    assert set(who.values()) == {"k-MTR from scratch", "k-MTR from scratch, areas and head"}


def test_a_model_on_reconstructions_has_other_masks_and_so_no_maps(model: Path) -> None:
    loaded = kmtr.load_model(model)
    assert loaded.after(lambda batch: batch.kspace.abs()[:, :, 0], "images").areas is None
    assert loaded.areas is not None


def test_maps_are_read_as_they_were_written_and_nothing_else_is(model: Path, small: RunConfig, tmp_path: Path) -> None:
    head = json.loads((model / MODEL_HEAD).read_text())
    found = area_maps.read(model, head, slices_of(small.data), TARGETS)
    assert found is not None
    assert (list(found.maps), found.labels) == ([2, 4], ("lvedv_ml",))
    mask = np.random.default_rng(0).integers(0, 5, (2, 4, 32, 32), dtype=np.uint8)
    views = {
        name: Pair(mask[:count], mask[:count], None, (8.0, 2.0, 2.0)) for name, count in slices_of(small.data).items()
    }
    again = tmp_path / "again"
    shutil.copytree(model, again)
    area_maps.export(again, found)
    other = area_maps.read(again, json.loads((again / MODEL_HEAD).read_text()), slices_of(small.data), TARGETS)
    assert other is not None
    for r in (2, 4):
        assert found.maps[r](views) == other.maps[r](views)
        assert {"lvedv_ml", "lvef_pct", "dcm"} == found.maps[r](views).keys()
        said = found(views, float(r), {"lvedv_ml": 150.0})
        assert said == other(views, float(r), {"lvedv_ml": 150.0})
        assert set(said) == {"lvedv_ml"}

    tensors = safetensors.numpy.load_file(again / AREAS)
    for spoil in (
        {"2.shown": tensors["2.shown"][1:]},
        {"4.lvedv_ml.weights": np.append(tensors["4.lvedv_ml.weights"], 0.0)},
        {"4.lvedv_ml.mean": tensors["4.lvedv_ml.mean"] * np.nan},
        {"2.both.lvedv_ml.scale": np.ones(3)},
    ):
        safetensors.numpy.save_file(tensors | spoil, again / AREAS)
        with pytest.raises(InputError, match="does not hold one") as error:
            kmtr.load_model(again)
        assert "\n" not in str(error.value)
    safetensors.numpy.save_file(tensors, again / AREAS)
    head["areas"]["answers"] = ["rvedv_ml"]
    (again / MODEL_HEAD).write_text(json.dumps(head))
    with pytest.raises(InputError, match="expected answers that model and maps have"):
        kmtr.load_model(again)
    (again / AREAS).unlink()
    with pytest.raises(InputError, match=f"without {AREAS}"):
        kmtr.load_model(again)


def validation(label: str, truth: np.ndarray, said: dict[Name, np.ndarray]) -> pa.Table:
    held_out = HeldOut(tuple(f"s{i}" for i in range(len(truth))), (label,), truth[:, None])
    parts = []
    for r in (2, 4):
        true = np.full(len(truth), r * 7 / 8)
        parts += [
            rows(name, held_out, v[:, None], acceleration=r, seed=0, labels=9, true_acceleration=true)
            for name, v in said.items()
        ]
    return joined(parts)


def test_validation_subjects_choose_label_by_label() -> None:
    noise = np.random.default_rng(3).standard_normal((2, 60))
    truth = np.linspace(-1, 1, 60)
    areas = truth + 0.1 * noise[0]
    areas[5] = np.nan  # no size of a pixel: left out of both
    said = {FINETUNED: truth + 0.5 * noise[1], predictions.by_areas(FINETUNED): areas}
    ill, rare = (truth > 0.3).astype(float), (np.arange(60) < 3).astype(float)
    table = joined(
        [
            validation("lvedv_ml", truth, said),
            validation("dcm", ill, {FINETUNED: truth, predictions.by_areas(FINETUNED): noise[0]}),
            validation("hcm", rare, {FINETUNED: noise[0], predictions.by_areas(FINETUNED): truth}),
            validation("lvm_g", truth, {FINETUNED: truth}),
        ]
    )
    by_label = {
        one.label: one for one in answers.choose(table, FINETUNED, ("lvedv_ml", "dcm", "hcm", "lvm_g", "lvef_pct"))
    }
    assert set(by_label) == {"lvedv_ml", "dcm", "hcm"}, "of other labels there are no areas"
    volume = by_label["lvedv_ml"]
    known = np.isfinite(areas)
    r2 = [
        1 - np.sum((one - truth)[known] ** 2) / np.sum((truth[known] - truth[known].mean()) ** 2)
        for one in (areas, said[FINETUNED])
    ]
    assert (volume.subjects, volume.by_areas) == (59, True)
    assert volume.head == pytest.approx(r2[1])
    assert volume.areas > max(r2), "together they are better than each"
    together = answers.rows(table, FINETUNED, [*by_label.values()]).to_pylist()
    assert {(row["system"], row["target"]) for row in together} == {(f"{FINETUNED.system}, areas and head", "lvedv_ml")}
    assert len(together) == 2 * 59
    error = sum((row["value"] - row["truth"]) ** 2 for row in together if row["acceleration"] == 4)
    assert 1 - error / np.sum((truth[known] - truth[known].mean()) ** 2) == pytest.approx(volume.areas)
    assert (by_label["dcm"].head, by_label["dcm"].by_areas) == (1.0, False)
    assert np.isnan(by_label["hcm"].areas), "three diseased subjects choose nothing"
    assert not by_label["hcm"].by_areas
    assert by_label["hcm"].compared == "60 subjects, too few to compare"


def test_what_was_chosen_is_said_and_a_model_that_is_not_better_by_areas_stays_as_it_is(
    model: Path, small: RunConfig, tmp_path: Path
) -> None:
    plain = tmp_path / "model"
    shutil.copytree(model, plain)
    area_maps.remove(plain)
    assert not (plain / AREAS).exists()
    assert kmtr.load_model(plain).areas is None
    maps = maps_of(small, ()).maps
    truth, noise = np.linspace(-1, 1, 60), np.random.default_rng(0).standard_normal(60)
    said = {FINETUNED: truth, predictions.by_areas(FINETUNED): noise}
    worse = validation("dcm", (truth > 0).astype(float), said)
    assert answers.keep(plain, maps, worse, []) == ""
    text = answers.keep(plain, maps, worse, answers.choose(worse, FINETUNED, (*TARGETS, "dcm")))
    assert text.startswith("its heads alone answer dcm (0.")
    assert ", 1.00 of 60) (R2 or AUROC of validation subjects" in text
    assert not (plain / AREAS).exists()
    both = joined([worse, validation("lvedv_ml", truth, dict(zip(said, [noise, truth], strict=True)))])
    text = answers.keep(plain, maps, both, answers.choose(both, FINETUNED, (*TARGETS, "dcm")))
    assert text.startswith("areas of its masks help to answer lvedv_ml (1.00, -")
    assert "; its heads alone answer dcm (0." in text
    kept = kmtr.load_model(plain).areas
    assert kept is not None
    assert kept.labels == ("lvedv_ml",)
    assert kept.true == pytest.approx({2: 1.75, 4: 3.5})


def test_a_map_that_says_the_same_of_everybody_answers_nothing() -> None:
    truth = np.linspace(-1, 1, 60)
    said = {FINETUNED: -truth, predictions.by_areas(FINETUNED): np.full(60, 0.1)}
    (volume,) = answers.choose(validation("lvedv_ml", truth, said), FINETUNED, TARGETS)
    (ill,) = answers.choose(validation("dcm", (truth > 0).astype(float), said), FINETUNED, ("dcm",))
    assert volume.head < 0 < volume.areas, "the head is wrong alone, and right turned round"
    assert volume.by_areas
    assert (ill.head, ill.areas) == (0.0, 0.5)
    assert not ill.by_areas


def test_the_nearest_map_is_that_of_the_nearest_true_r(small: RunConfig) -> None:
    maps = replace(maps_of(small, (), (2, 4, 8)), true={2: 1.6, 4: 2.5, 8: 3.6})
    for r, nearest in ((1.0, 2), (1.9, 2), (2.1, 4), (3.1, 8), (16.0, 8), (float("inf"), 8)):
        assert maps.nearest(r) == nearest, r
