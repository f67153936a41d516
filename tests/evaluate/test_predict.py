"""A model over a whole dataset: the same numbers as by itself, the same bytes after any stop, and nobody is lost."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hearts
import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cohort import simulated, write
from exported import TARGETS, model_folder
from one_process import predicted_here
from torch import Tensor

import kmtr
from kmtr.config import RunConfig, override
from kmtr.data.dataset import record
from kmtr.data.dataset.reader import Dataset
from kmtr.evaluate.predict import command
from kmtr.evaluate.predictions import read
from kmtr.exported import MODEL_HEAD, MODEL_WEIGHTS
from kmtr.inference import TaskModel
from kmtr.types import UNLABELLED, InputError, KmtrError


@pytest.fixture(scope="module")
def model(small: RunConfig, tables: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), small, tables)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Parts are predicted by this process instead of Ray's; the numbers of those that were."""
    return predicted_here(monkeypatch)


def asked(model: Path, root: str | Path, out: Path, *more: str) -> list[str]:
    return [str(model), f"data.root={root}", f"predict.out={out}", "predict.rows=5", "predict.batch=3", *more]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_it_says_of_every_subject_what_the_model_says_by_itself(
    model: Path, small: RunConfig, tmp_path: Path, in_process: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    said = command.run(asked(model, small.data.root, tmp_path / "out", "predict.accelerations=2,4"))
    assert (said["subjects"], said["refused"], said["parts"]) == (48, 0, 5 + 3 + 3)
    table = read(Path(said["predictions"])).to_pylist()
    assert len(table) == 48 * 2 * len(TARGETS)
    loaded = kmtr.load_model(model)
    dataset = Dataset.open(small.data)
    for split, row in (("train", 7), ("test", 11)):
        study = record.to_study(dataset.reader(split, small.data).read([row]))
        for r in (2, 4):
            alone = loaded.predict(study, acceleration=r)
            for target in TARGETS:
                (found,) = (
                    one
                    for one in table
                    if (one["subject"], one["acceleration"], one["target"]) == (study.subject_id, r, target)
                )
                assert found["value"] == pytest.approx(alone[target], rel=1e-5)
                assert found["truth"] == pytest.approx(study.labels[target])
                assert found["true_acceleration"] == pytest.approx(r)
                assert (found["system"], found["labels"]) == ("k-MTR from scratch", 24)
    assert len({one["value"] for one in table}) == len(table)
    assert "subjects/s" in capsys.readouterr().out


def test_all_lines_are_the_default_and_vectors_a_table(
    model: Path, small: RunConfig, tmp_path: Path, in_process: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = asked(model, small.data.root, tmp_path / "out", "predict.split=test", "predict.embeddings=true")
    said = command.run(words)
    assert said["subjects"] == 12
    assert {one["acceleration"] for one in read(Path(said["predictions"])).to_pylist()} == {1}
    assert "12 subjects have an R that the model was not trained for" in capsys.readouterr().out
    vectors = pq.read_table(tmp_path / "out" / "embeddings").to_pylist()
    loaded = kmtr.load_model(model)
    study = record.to_study(Dataset.open(small.data).reader("test", small.data).read([3]))
    host = kmtr.encoder.batch_of(study, loaded.config)
    np.testing.assert_allclose(vectors[3]["vector"], loaded.embed(host.to(loaded.device))[0], rtol=1e-4, atol=1e-5)
    assert vectors[3]["subject"] == study.subject_id


def test_the_same_bytes_after_a_stop_and_finished_parts_are_kept(
    model: Path, small: RunConfig, tmp_path: Path, in_process: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    command.run(asked(model, small.data.root, whole))
    shutil.copytree(whole, half)
    (half / "refused.json").unlink()
    (half / "parts" / "00003.json").unlink()  # killed behind the tables of one part, and in those of another
    (half / "parts" / "00007.json").unlink()
    (half / "predictions" / "part-00007.parquet").unlink()
    (half / "predictions" / "part-00007.parquet.0.tmp").write_bytes(b"half of it")
    in_process.clear()
    capsys.readouterr()
    said = command.run(asked(model, small.data.root, half))
    assert in_process == [3, 7]
    assert said["computed"] == 2
    assert "9 of 11 parts (41 of 48 subjects) are finished, kept" in capsys.readouterr().out
    assert content(half) == content(whole)
    in_process.clear()
    command.run(asked(model, small.data.root, half))
    assert in_process == []


def test_a_begun_output_takes_no_other_settings_model_or_data(
    model: Path, small: RunConfig, tables: dict[str, Tensor], tmp_path: Path, in_process: list[int]
) -> None:
    out = tmp_path / "out"
    command.run(asked(model, small.data.root, out, "predict.split=val"))
    other_model = model_folder(tmp_path / "other", override(small, {"seed": 5}), tables)
    data = tmp_path / "data"
    write(data, {"val": [simulated(i, small) for i in range(3)]})
    for words, says in (
        (asked(model, small.data.root, out, "predict.split=test"), r"begun with predict\.split val, got test"),
        (asked(model, small.data.root, out, "predict.split=val", "predict.masks=true"), r"with predict\.masks false"),
        (asked(other_model, small.data.root, out, "predict.split=val"), "was begun with MODEL"),
        (asked(model, data, out, "predict.split=val"), r"was begun with data\.root"),
    ):
        with pytest.raises(InputError, match=says) as error:
            command.run(words)
        assert "\n" not in str(error.value)


def test_damaged_subjects_are_named_and_the_others_predicted(
    model: Path, small: RunConfig, tmp_path: Path, in_process: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    studies = [simulated(i, small) for i in range(12)]
    lone = replace(studies[4], views={"sax": studies[4].views["sax"]})
    write(data, {"train": [*studies[:4], lone], "test": studies[5:9], "val": studies[9:]}, "float32", rows=5)
    clean = command.run(asked(model, data, tmp_path / "clean", "predict.accelerations=4"))
    assert clean["refused"] == 1  # has one of the two views
    shard = data / "shards" / "test-00000.parquet"
    damaged = bytearray(shard.read_bytes())
    at = len(damaged) // 2
    damaged[at : at + 64] = bytes(64)
    shard.write_bytes(damaged)
    (data / "shards" / "val-00000.parquet").unlink()
    said = command.run(asked(model, data, tmp_path / "out", "predict.accelerations=4"))
    report = json.loads((tmp_path / "out" / "refused.json").read_text())
    names = [entry["subject"] for entry in report["refused"]]
    assert lone.subject_id in names
    assert sum(name.startswith("row ") for name in names) == 0  # their index is left: it says who they are
    assert {study.subject_id for study in studies[9:]} <= set(names)
    assert said["subjects"] + said["refused"] == report["subjects"] == 12
    assert 12 > said["refused"] > 4
    assert f"{said['refused']} of 12 subjects refused" in capsys.readouterr().out
    before, after = (
        {(row["subject"], row["target"]): row["value"] for row in read(Path(one["predictions"])).to_pylist()}
        for one in (clean, said)
    )
    assert after
    for key, value in after.items():
        assert value == pytest.approx(before[key], rel=1e-5)


def spoiled(model: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the model whose settings are changed."""
    shutil.copytree(model, folder)
    head = json.loads((folder / MODEL_HEAD).read_text())
    change(head)
    (folder / MODEL_HEAD).write_text(json.dumps(head))
    return folder


def test_what_does_not_fit_is_refused_in_one_line(
    model: Path, small: RunConfig, tmp_path: Path, in_process: list[int]
) -> None:
    study = simulated(0, small)
    one_view, wide, coils = tmp_path / "one_view", tmp_path / "wide", tmp_path / "coils"
    write(one_view, {"train": [replace(study, views={"sax": study.views["sax"]})]})
    write(wide, {"train": [simulated(0, override(small, {"data.matrix": (64, 64)}))]})
    write(coils, {"train": [simulated(0, override(small, {"simulate.coils": 2}))]})
    (tmp_path / "half").mkdir()
    shutil.copy(model / MODEL_HEAD, tmp_path / "half")
    short = spoiled(model, tmp_path / "short", lambda head: head.update(settings={"data.nothing": 1}))
    root, out = small.data.root, tmp_path / "out"
    for words, says in (
        ([], "expected MODEL first"),
        ([str(model), f"data.root={root}"], r"predict\.out: expected a folder"),
        (asked(model, root, out, "predict.splat=1"), "the nearest one is 'predict.split'"),
        (asked(model, tmp_path / "nothing", out), "expected a dataset"),
        (asked(tmp_path / "half", root, out), f"without {MODEL_WEIGHTS}"),
        (asked(short, root, out), "unknown key 'data.nothing'"),
        (asked(model, one_view, out), "expected the model's views sax,lax_4ch, the dataset has no lax_4ch"),
        (
            asked(model, wide, out),
            "no subject fits the model: expected sax with at most 1 coils and matrix",
        ),
        (asked(model, coils, out), "no subject fits the model: expected sax with at most 1 coils"),
        (asked(model, root, out, "predict.accelerations=16"), "R = 16"),
    ):
        with pytest.raises(InputError, match=says) as error:
            command.run(words)
        assert "\n" not in str(error.value)
    assert not out.exists()


def test_a_smaller_matrix_than_any_that_was_trained_on_is_refused(model: Path, small: RunConfig) -> None:
    loaded = kmtr.load_model(model)
    smaller = simulated(0, override(small, {"data.matrix": (24, 24)}))
    with pytest.raises(InputError, match="expected a matrix of 32 x 32, as the model was trained on, got 24 x 24"):
        loaded.predict(smaller, acceleration=2)


def test_another_r_than_in_training_is_a_warning(model: Path, small: RunConfig, recwarn: Any) -> None:
    loaded, study = kmtr.load_model(model), simulated(0, small)
    loaded.predict(study, acceleration=2)
    loaded.predict(study, acceleration=4)
    assert len(recwarn) == 0
    for r, got in ((None, r"1\.00"), (5, "5")):
        with pytest.warns(UserWarning, match=f"R = {got} is not among R = 2 to 4, which the model was trained for"):
            loaded.predict(study, acceleration=r)


def test_dense_outputs_are_tables_and_nifti_files(
    small: RunConfig, tables: dict[str, Tensor], tmp_path: Path, in_process: list[int]
) -> None:
    drawing = model_folder(tmp_path / "model", small, tables, ("phenotypes", "segmentation", "reconstruction"))
    studies = [simulated(i, small) for i in range(4)]
    flat = replace(studies[3], views={name: replace(view, spacing_mm=None) for name, view in studies[3].views.items()})
    write(tmp_path / "data", {"train": [*studies[:3], flat]}, "float32")
    out, words = tmp_path / "a", ("predict.accelerations=2,4", "predict.masks=true")
    said = command.run(asked(drawing, tmp_path / "data", out, *words))
    assert len(read(Path(said["predictions"]))) == 4 * 2 * len(TARGETS)
    assert json.loads((out / "parts" / "00000.json").read_text()) == {
        "subjects": 4,
        "refused": [],
        "outside": 0,
        "by_heads": 0,
        "dense": 4 * 2 * 2,
        "unplaced": 2 * 2 * 2,  # one subject without geometry: views, R, outputs
        "nowhere": 3 * 2 * 2 * 2,
        "resized": 0,
    }
    table = pq.read_table(out / "masks" / "part-00000.parquet")
    assert table.schema.metadata[b"kmtr.dtype"] == b"uint8"
    assert json.loads(table.schema.metadata[b"kmtr.slices"]) == {"sax": [0, 2], "lax_4ch": [2, 3]}
    rows = table.to_pylist()
    assert [(row["subject"], row["acceleration"]) for row in rows] == [
        (study.subject_id, r) for some in (studies[:3], studies[3:]) for r in (2, 4) for study in some
    ]
    alone = kmtr.load_model(drawing).predict(studies[0], acceleration=2)
    masks = np.frombuffer(rows[0]["values"], np.uint8).reshape(rows[0]["shape"])
    assert masks.shape == (3, 4, 32, 32)
    assert len(np.unique(masks)) > 1
    assert (masks[:2] == alone["masks"]["sax"]).mean() > 0.999
    sizes = alone["spacing_mm"]["lax_4ch"][1:], studies[0].views["lax_4ch"].spacing_mm[1:]  # type: ignore[index]
    assert sizes[0] == pytest.approx(sizes[1])
    floats = pq.read_table(out / "image").to_pylist()[0]
    image = np.frombuffer(floats["values"], np.float32).reshape(floats["shape"])
    np.testing.assert_allclose(image[2:], alone["image"]["lax_4ch"], rtol=1e-4, atol=1e-4 * np.nanmax(image))

    assert len(list((out / "nifti").iterdir())) == 3 * 2 * 2 * 2
    content_of = (out / "nifti" / f"{studies[0].subject_id}_R2_sax_masks.nii.gz").read_bytes()
    file = nibabel.Nifti1Image.from_bytes(gzip.decompress(content_of))
    assert (int(file.header["sform_code"]), int(file.header["qform_code"])) == (0, 0)  # simulated hearts lie nowhere
    np.testing.assert_array_equal(np.asarray(file.dataobj), masks[:2].transpose(3, 2, 0, 1))
    view = studies[0].views["sax"]
    assert view.spacing_mm is not None
    assert view.frame_time_s is not None
    z, y, x = view.spacing_mm
    np.testing.assert_allclose(file.header.get_zooms(), (x, y, z, view.frame_time_s), rtol=1e-5)
    command.run(asked(drawing, tmp_path / "data", tmp_path / "b", *words))
    assert content(out) == content(tmp_path / "b")


def test_nifti_files_lie_where_the_source_does(
    small: RunConfig, tables: dict[str, Tensor], tmp_path: Path, in_process: list[int]
) -> None:
    """On all of its slices, of which the model sees some at uneven distances, and on the pixels of its matrix."""
    drawing = model_folder(
        tmp_path / "model", override(small, {"data.crop": True}), tables, ("segmentation", "reconstruction")
    )
    affine, words = hearts.affine(), ["predict.accelerations=4", "predict.masks=true"]
    for ny, nx in ((24, 20), (40, 36)):
        wide = simulated(0, override(small, {"data.matrix": (ny, nx), "data.sax_slices": 5, "model.patch": (2, 4, 4)}))
        placed = {name: replace(view, affine=affine, spacing_mm=(8.0, 1.5, 1.4)) for name, view in wide.views.items()}
        data, out = tmp_path / f"data-{ny}", tmp_path / f"out-{ny}"
        write(data, {"train": [replace(wide, views=placed)]}, "float32")
        command.run([str(drawing), f"data.root={data}", f"predict.out={out}", *words])
        masks, image = (
            nibabel.load(out / "nifti" / f"{wide.subject_id}_R4_sax_{output}.nii.gz") for output in ("masks", "image")
        )
        table = pq.read_table(out / "masks").to_pylist()[0]
        drawn = np.frombuffer(table["values"], np.uint8).reshape(table["shape"])
        values = np.asarray(masks.dataobj)
        assert values.shape == (32, 32, 5, 4)
        np.testing.assert_array_equal(values[:, :, [1, 3]], drawn[:2].transpose(3, 2, 0, 1))
        assert (values[:, :, [0, 2, 4]] == UNLABELLED).all()
        assert not np.asarray(image.dataobj)[:, :, [0, 2, 4]].any()
        for file in (masks, image):
            assert (int(file.header["sform_code"]), int(file.header["qform_code"])) == (1, 1)
            np.testing.assert_allclose(file.get_qform(), file.affine, atol=1e-3)
            middle = affine @ (nx // 2, ny // 2, 3, 1)
            np.testing.assert_allclose(file.affine @ (16, 16, 3, 1), middle, atol=1e-4)
            np.testing.assert_allclose(file.affine[:3, :3], affine[:3, :3], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(file.header.get_zooms()[:3], (1.4, 1.5, 8.0), rtol=1e-5)


def test_masks_of_a_part_whose_last_subjects_are_refused_and_of_names_that_no_file_may_have(
    small: RunConfig, tables: dict[str, Tensor], tmp_path: Path, in_process: list[int]
) -> None:
    drawing = model_folder(tmp_path / "model", small, tables, ("segmentation",))
    named = [replace(simulated(i, small), subject_id=f"sub.{i}") for i in range(4)]
    coils = simulated(4, override(small, {"simulate.coils": 2}))
    write(tmp_path / "data", {"train": [*named, coils]}, "float32")
    words = [f"data.root={tmp_path / 'data'}", f"predict.out={tmp_path / 'out'}", "predict.accelerations=4"]
    said = command.run([str(drawing), *words, "predict.masks=true", "predict.batch=2"])
    assert (said["subjects"], said["refused"]) == (4, 1)
    files = sorted(path.name for path in (tmp_path / "out" / "nifti").iterdir())
    assert files == sorted(f"part-00000-{i}_R4_{view}_masks.nii.gz" for i in range(4) for view in ("sax", "lax_4ch"))


def test_what_differs_from_training_is_said(model: Path, small: RunConfig, recwarn: Any) -> None:
    """Pixels of twice the size, an R of the source's own, a cycle cut short, and a file of another model."""
    loaded, study = kmtr.load_model(model), simulated(0, small)
    assert loaded.trained.slice_order == Dataset.open(small.data).slice_order
    sax = study.views["sax"]
    assert sax.spacing_mm is not None
    wide = replace(sax, spacing_mm=(sax.spacing_mm[0], 2 * sax.spacing_mm[1], 2 * sax.spacing_mm[2]))
    with pytest.warns(UserWarning, match=r"sax: the model was trained on pixels of .* mm, these have"):
        loaded.predict(replace(study, views={**study.views, "sax": wide}), acceleration=4)
    few = np.zeros(sax.kspace.shape[:1] + sax.kspace.shape[2:4], bool)
    few[..., ::16] = True
    thinned = {
        name: replace(
            view, sampled=np.broadcast_to(few[:1, :, :], (len(view.kspace), *few.shape[1:])), segmentation=None
        )
        for name, view in study.views.items()
    }
    with pytest.warns(UserWarning, match=r"R = 16\.00 is not among R = 2 to 4"):
        loaded.predict(replace(study, views=thinned), acceleration=4)
    short = {name: replace(view, kspace=view.kspace[:, :, :1], segmentation=None) for name, view in study.views.items()}
    with pytest.raises(InputError, match="sax: expected at least 4 frames, as the model was trained on, got 1"):
        loaded.predict(replace(study, views=short), acceleration=4)


def test_a_damaged_file_of_weights_is_refused(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    content = bytearray((folder / MODEL_WEIGHTS).read_bytes())
    content[-100] ^= 1
    (folder / MODEL_WEIGHTS).write_bytes(content)
    with pytest.raises(InputError, match="got a damaged one or another model's"):
        kmtr.load_model(folder)
    spoiled(model, tmp_path / "facts", lambda head: head["trained"].update(shapes=5))
    with pytest.raises(InputError, match="expected facts on its training"):
        kmtr.load_model(tmp_path / "facts")


def test_nobody_left_is_a_failure(
    model: Path, small: RunConfig, tmp_path: Path, in_process: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nan(self: TaskModel, batch: Any) -> dict[str, Tensor]:
        return {"lvedv_ml": torch.full((len(batch),), torch.nan)}

    monkeypatch.setattr(TaskModel, "__call__", nan)
    with pytest.raises(KmtrError, match=r"none of 12 subjects could be predicted; .* expected finite"):
        command.run(asked(model, small.data.root, tmp_path / "out", "predict.split=val"))
    assert len(json.loads((tmp_path / "out" / "refused.json").read_text())["refused"]) == 12


def test_the_card_says_what_the_model_is_and_is_not(model: Path, small: RunConfig) -> None:
    text = (model / "README.md").read_text()
    for said in (
        "A research model, not a medical device",
        "`lvedv_ml` (mL), `lvef_pct` (%)",
        "| views | sax, lax_4ch (2 short-axis slices) |",
        "| R in training | 2, 4, family gaussian, 4 ACS lines |",
        "trained on | 24 subjects",
        "`lvedv_ml` of 24",
        "Not scored",
        "kmtr.load_model",
    ):
        assert said in text
    assert small.data.root not in text
