"""Export to nnU-Net's raw layout: images and masks of all cases, and nnU-Net's own check."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cohort import simulated, write

from jobs import export
from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import pipeline
from kmtr.data.loader.batch import Wanted
from kmtr.inputs import standardised
from kmtr.metrics.dense import PHASES
from kmtr.metrics.segmentation import extreme_frames
from kmtr.physics.sampling import VALIDATION
from kmtr.types import SEGMENTATION_CLASSES, UNLABELLED, InputError

nibabel = pytest.importorskip("nibabel", reason="needs nibabel (the extra readers)")

NEEDS = (
    *("nnunetv2", "batchgenerators", "batchgeneratorsv2", "dynamic-network-architectures", "acvl-utils", "SimpleITK"),
    *("tifffile", "scikit-image", "imageio", "lazy-loader", "connected-components-3d", "blosc2", "numexpr", "ndindex"),
    "httpx",
)
"""nnU-Net and what it imports; without their dependencies, of which one would replace torch."""


@pytest.fixture(scope="module")
def hearts(small: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Five training subjects, one of whom has no mask, two of validation and two of the test split."""
    folder = tmp_path_factory.mktemp("nnunet")
    split = {"train": range(5), "val": range(5, 7), "test": range(7, 9)}
    subjects = {name: [simulated(i, small) for i in rows] for name, rows in split.items()}
    for view in subjects["train"][1].views.values():
        view.segmentation[:] = UNLABELLED
    view = next(iter(subjects["train"][2].views.values()))
    view.segmentation[..., 0, 0] = UNLABELLED
    write(folder / "data", subjects, "float32")
    return override(small, {"data.root": str(folder / "data")})


def asked_for(config: RunConfig, *words: str) -> dict[str, Any]:
    shape = [f"data.{name}={value}" for name, value in (("root", config.data.root), ("frames", config.data.frames))]
    shape += [f"data.views={','.join(config.data.views)}", f"data.sax_slices={config.data.sax_slices}"]
    shape += [f"data.matrix={config.data.matrix[0]},{config.data.matrix[1]}", f"data.coils={config.data.coils}"]
    shape += [f"data.global_batch={config.data.global_batch}", "train.workers=1", "evaluate.accelerations=4"]
    shape += ["sampling.accelerations=4", f"sampling.acs_lines={config.sampling.acs_lines}"]
    return export.run(["nnunet", *shape, *words])


@pytest.mark.parametrize(("name", "r"), [("full", 0), ("shared", 4)])
def test_cases_are_the_images_and_masks_of_the_extremes(
    name: str, r: int, hearts: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"export.out={tmp_path}", f"export.input={name}", f"export.acceleration={r}")
    said = asked_for(hearts, *words)
    views = len(hearts.data.views)
    assert said["cases"] == {"train": 4 * views * 2, "val": 2 * views * 2, "test": 2 * views * 2}
    assert f"{views} views left out" in capsys.readouterr().out
    folder = Path(said["dataset"])
    described = json.loads((folder / "dataset.json").read_text())
    assert described["labels"] == {n: i for i, n in enumerate(SEGMENTATION_CLASSES)} | {"ignore": 6}
    assert (
        described["numTraining"] == len([*(folder / "imagesTr").iterdir()]) == len([*(folder / "labelsTr").iterdir()])
    )
    (fold,) = json.loads((folder / "splits_final.json").read_text())
    assert {one.split("_")[0] for one in fold["train"]} == {"train00001", "train00003", "train00004", "train00005"}
    assert {one.split("_")[0] for one in fold["val"]} == {"val00001", "val00002"}

    fixed = override(hearts, {"sampling.accelerations": (r or 4,)})
    reader = Dataset.open(fixed.data).reader("test", fixed.data)
    (host,) = pipeline.read_in_order(reader, [1], 1, fixed, Wanted(masks=True), VALIDATION)
    batch = host.to(torch.device("cpu"))
    assert batch.masks is not None
    assert batch.spacing_mm is not None
    image, mask = standardised(name, batch, fixed.data.matrix)[0].numpy(), batch.masks[0].numpy()
    first = slice(0, fixed.data.sax_slices)
    frames = extreme_frames(mask[first])
    assert frames is not None
    for phase, t in zip(PHASES, frames, strict=True):
        found = nibabel.load(folder / "imagesTs" / f"test00002_sax_{phase}_0000.nii.gz")
        np.testing.assert_allclose(found.get_fdata(), image[first, t].transpose(2, 1, 0), rtol=1e-5, atol=1e-5)
        between, height, width = batch.spacing_mm[0, 0].tolist()
        np.testing.assert_allclose(found.header.get_zooms(), (width, height, between), rtol=1e-5)
        truth = nibabel.load(folder / "labelsTs" / f"test00002_sax_{phase}.nii.gz").get_fdata()
        np.testing.assert_array_equal(truth, mask[first, t].transpose(2, 1, 0))

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    asked_for(hearts, *words)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    ids = Dataset.open(hearts.data).reader("train", hearts.data).samples(range(5)).meta.column("subject_id").to_pylist()
    assert not [one for one in ids if any(one in str(path) or one.encode() in text for path, text in before.items())]
    with pytest.raises(InputError, match=r"^export.out: expected no other dataset in .*Dataset001_kmtr, which exists"):
        asked_for(hearts, f"export.out={tmp_path}", "export.input=zerofilled", "export.acceleration=4")


def test_bad_settings_have_one_line(hearts: RunConfig, tmp_path: Path) -> None:
    for words, line in (
        ((), "export.out: expected a local folder, got"),
        (("export.out=s3://bucket/x",), "export.out: expected a local folder"),
        (
            (f"export.out={tmp_path}", "export.input=shared"),
            "export.acceleration: expected an R for export.input=shared",
        ),
    ):
        with pytest.raises(InputError, match="^" + line):
            asked_for(hearts, *words)
    with pytest.raises(InputError, match=r"^export: expected what to write, nnunet, got 'nnet'"):
        export.run(["nnet"])


@pytest.mark.full
@pytest.mark.slow
def test_nnu_nets_own_check_accepts_it(hearts: RunConfig, tmp_path: Path) -> None:
    """In an environment of its own, which sees this one's torch."""
    said = asked_for(hearts, f"export.out={tmp_path}")
    home = tmp_path / "env"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (site,) = home.glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(ours + "\n")
    got = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", *NEEDS], capture_output=True, text=True
    )
    if got.returncode:
        pytest.skip(f"nnU-Net could not be installed: {got.stderr.strip().splitlines()[-1]}")
    check = (
        "from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity as check; "
        f"check({said['dataset']!r}, 1)"
    )
    done = subprocess.run([python, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No errors" in done.stdout or "verify_dataset_integrity Done" in done.stdout, done.stdout
