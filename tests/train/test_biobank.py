"""From folders of NIfTI files and a table of labels to a model that draws, and what it draws lies as the files do."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import biobank
import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from cohort import write
from forked_workers import instead_of_ray_train
from one_process import predicted_here

import kmtr
from kmtr.config import RunConfig, override
from kmtr.data.dataset.ingest import ingested, table_of
from kmtr.data.dataset.record import Loaded, schema, to_row
from kmtr.data.loader.batch import Wanted
from kmtr.data.loader.collate import collate
from kmtr.data.sources import discover
from kmtr.evaluate import finetune, predictions
from kmtr.evaluate.predict import command
from kmtr.inference import by_view
from kmtr.types import PHENOTYPES, Study

COUNT = 20
VIEWS = ("sax", "lax_2ch", "lax_4ch")


@pytest.fixture(scope="module")
def config(small: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("biobank")
    keys = {
        "data.root": str(folder / "data"),
        "storage.root": str(folder / "runs"),
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "ingest.labels": str(folder / "source" / "labels.csv"),
        "ingest.columns": "subject=eid lvedv_ml=edv dcm=dilated",
        "data.views": VIEWS,
        "data.sax_slices": 5,
        "data.matrix": (64, 64),
        "model.patch": (2, 16, 16),
        "stage": "task",
        "task.tasks": "phenotypes,diseases,segmentation,reconstruction",
        "task.encoder": "none",
        "task.targets": ("lvedv_ml", "lvef_pct"),
        "task.diseases": ("dcm",),
        "task.steps": 3,
        "task.frames": 1,
        "task.patch": (16, 16),
        "task.channels": 8,
        "task.data_consistency": True,
        "train.workers": 1,
        "train.eval_every": 3,
        "train.log_every": 3,
    }
    return override(small, keys)


@pytest.fixture(scope="module")
def before(config: RunConfig) -> list[Study]:
    """The hearts that the files were made of."""
    return biobank.write_folder(Path(config.ingest.labels).parent, config, COUNT)


@pytest.fixture(scope="module")
def studies(config: RunConfig, before: list[Study]) -> list[Study]:
    """The same as the files tell them, and their dataset."""
    items = discover("nifti", str(Path(config.ingest.labels).parent))
    labels = table_of(config, items)
    found = [ingested(i, items, labels, config, b"kmtr") for i in range(len(items))]
    write(Path(config.data.root), {"train": found[:8], "val": found[8:14], "test": found[14:]}, "float32")
    return found


@pytest.fixture(scope="module")
def tuned(config: RunConfig, studies: list[Study]) -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        instead_of_ray_train(patch)
        patch.setattr(finetune, "start_ray", lambda: None)
        yield finetune.run(config)


def test_files_tell_the_hearts_that_they_were_made_of(before: list[Study], studies: list[Study]) -> None:
    assert len(studies) == COUNT
    for drawn, read in zip(before, studies, strict=True):
        assert tuple(read.views) == VIEWS
        assert read.labels["lvef_pct"] == pytest.approx(drawn.labels["lvef_pct"], abs=0.06)
        assert read.labels["dcm"] in (0, 1)
        for name, view in read.views.items():
            image, truth = biobank.magnitude(view), biobank.magnitude(drawn.views[name])
            np.testing.assert_allclose(image / image.max(), truth / truth.max(), atol=2e-3)
            assert view.spacing_mm == pytest.approx(drawn.views[name].spacing_mm, rel=1e-4)
            contours = biobank.contours(name, drawn.views[name])
            assert (view.segmentation is None) is (contours is None)
            if contours is not None:
                np.testing.assert_array_equal(view.segmentation, contours)


def test_masks_of_a_batch_are_those_of_the_study(config: RunConfig, studies: list[Study]) -> None:
    """Slices, frames and pixels come back where the study has them."""
    study = studies[3]
    rows = Loaded(pa.Table.from_pylist([to_row(study, "float32")], schema=schema("float32")))
    batch = collate(rows, config, wanted=Wanted(masks=True)).to(torch.device("cpu"))
    assert batch.masks is not None
    found = by_view(config.data, batch, batch.masks.numpy(), 0)
    assert tuple(found) == VIEWS
    for name in biobank.CONTOURS:
        np.testing.assert_array_equal(found[name], study.views[name].segmentation)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:R = 1.00 is not among")
def test_a_model_draws_where_the_study_has_it(config: RunConfig, studies: list[Study], tuned: dict[str, Any]) -> None:
    """With all lines put back the image is the study's own, whatever was learnt: so its grid is that of the masks."""
    assert {"mean_r2", "dcm_auroc", "mean_dice"} <= tuned["metrics"].keys()
    model = kmtr.load_model(tuned["model"])
    for study in studies[15:17]:
        said = model.predict(study)
        assert set(said) == {"lvedv_ml", "lvef_pct", "dcm", "masks", "image"}
        assert tuple(said["masks"]) == tuple(said["image"]) == VIEWS
        for name, view in study.views.items():
            truth = biobank.magnitude(view)
            assert said["masks"][name].shape == truth.shape
            assert said["masks"][name].dtype == np.uint8
            np.testing.assert_allclose(said["image"][name], truth, atol=2e-3 * truth.max())


@pytest.mark.full
def test_files_of_masks_have_the_size_and_the_order_of_the_source(
    config: RunConfig, studies: list[Study], tuned: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as a dataset keeps it: size of a voxel and time of a frame; slices from base to apex, x and y turned as
    every study is.
    """
    predicted_here(monkeypatch)
    words = [f"data.root={config.data.root}", f"predict.out={tmp_path / 'out'}", "predict.masks=true"]
    said = command.run([str(tuned["model"]), *words, "predict.split=test"])
    assert (said["subjects"], said["refused"]) == (6, 0)
    source = Path(config.ingest.labels).parent
    for number in (14, 19):
        study = studies[number]
        for name, stem in biobank.STEMS.items():
            if name not in VIEWS:
                continue
            there = nibabel.load(source / str(biobank.FIRST + number) / f"{stem}.nii.gz")
            files = {}
            for output in ("masks", "image"):
                content = (tmp_path / "out" / "nifti" / f"{study.subject_id}_R1_{name}_{output}.nii.gz").read_bytes()
                files[output] = nibabel.Nifti1Image.from_bytes(gzip.decompress(content))
                np.testing.assert_allclose(files[output].header.get_zooms(), there.header.get_zooms(), rtol=1e-4)
                assert files[output].shape == there.shape
            image, truth = np.asarray(files["image"].dataobj), np.asarray(there.dataobj)[::-1]  # stored right to left
            np.testing.assert_allclose(image, truth, atol=2e-3 * truth.max())
            assert set(np.unique(np.asarray(files["masks"].dataobj))) <= set(range(6))


@pytest.mark.full
def test_tables_leave_empty_what_a_system_does_not_say(config: RunConfig, tuned: dict[str, Any]) -> None:
    """Volumes measured on masks stand beside those that a head predicts; a model of masks alone has no others."""
    table = predictions.read(Path(tuned["predictions"]))
    shown, metrics = finetune.summary(table, config)
    r2 = next(one for one in shown if one.caption.startswith("R2 on"))
    own = next(row for row in r2.rows if row[2] == predictions.FROM_SCRATCH.title)
    said = dict(zip(r2.columns[3:], own[3:], strict=True))
    assert said["LVESV"] == "–"
    assert said["LVEDV"] != "–"
    assert metrics["mean_r2_ridge"] == pytest.approx((metrics["lvedv_r2_ridge"] + metrics["lvef_r2_ridge"]) / 2)
    ours = pc.equal(table.column("system"), predictions.FROM_SCRATCH.title)
    numbers = pc.is_in(table.column("target"), pa.array(list(PHENOTYPES)))
    _, fewer = finetune.summary(table.filter(pc.invert(pc.and_(ours, numbers))), config)
    assert "mean_r2" not in fewer
    assert fewer["mean_dice"] == pytest.approx(metrics["mean_dice"], nan_ok=True)
