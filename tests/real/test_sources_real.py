"""Readers against real acquisitions and the golden numbers that came with them; skipped where those are missing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from kmtr.data import shards
from kmtr.data.patterns import read_pattern
from kmtr.data.reader import Dataset, Reader
from kmtr.data.sources import Options, discover, read
from kmtr.physics.fourier import ifft2c
from kmtr.types import UNLABELLED, View

SHARED = Path(os.environ.get("KMTR_SHARED", Path(__file__).parents[2].parent / "shared" / "data"))

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="real samples (KMTR_SHARED or ../shared/data) are missing")


def golden(folder: str, file: str = "reference_values.json") -> dict:
    return json.loads((SHARED / folder / file).read_text())


def stored(path: Path, dtype: str, root: Path) -> View:
    """The short axis of a source as it comes back from a shard; ``study``: as the reader gives it."""
    study = read(path)
    if dtype == "study":
        return study.views["sax"]
    parts = [shards.write_shard(str(root), "train-00000", "train", [study], dtype)]
    shards.write_manifest(str(root), parts, dtype, "test")
    return shards.to_study(Reader(Dataset.of(str(root)), "train").read([0])).views["sax"]


@pytest.mark.parametrize("file", ["cmrxrecon2024/cine_sax.mat", "cmrxrecon2025/underkslice_ktGaussian8.mat"])
def test_float16_shards_keep_every_line(file: str, tmp_path: Path) -> None:
    exact, kept = (stored(SHARED / file, dtype, tmp_path).kspace for dtype in ("study", "float16"))
    energy = (np.abs(exact) ** 2).sum(-1, dtype=np.float64)
    error = (np.abs(exact - kept) ** 2).sum(-1, dtype=np.float64)
    assert (error[energy == 0] == 0).all()
    assert (error[energy > 0] / energy[energy > 0]).max() < 1e-6


@pytest.mark.parametrize("dtype", ["study", "float32"])
def test_cmrxrecon2024_full_slice(dtype: str, tmp_path: Path) -> None:
    """Reference in MATLAB's order (readout 512, 246 lines): our axes are its transpose."""
    want = golden("cmrxrecon2024")
    view = stored(SHARED / "cmrxrecon2024" / "cine_sax.mat", dtype, tmp_path)
    assert view.sampled is None
    assert view.kspace.shape == (1, 1, 1, *want["shape"][::-1])
    k = view.kspace[0, 0, 0].astype(complex)
    image = ifft2c(k)
    assert np.linalg.norm(k) == pytest.approx(want["l2"], rel=1e-5)
    assert np.linalg.norm(image) == pytest.approx(want["l2_img"], rel=1e-5)
    for array, peak, where in ((k, want["max_k"], want["argmax_k"]), (image, want["max_img"], want["argmax_img"])):
        assert np.abs(array).max() == pytest.approx(peak, rel=1e-5)
        assert list(np.unravel_index(np.abs(array).argmax(), array.shape)) == where[::-1]
    assert k[0, 0] == pytest.approx(complex(*want["k00"]), rel=1e-5)


@pytest.mark.parametrize("dtype", ["study", "float32"])
def test_cmrxrecon2024_uniform8_pattern(dtype: str, tmp_path: Path) -> None:
    want = golden("cmrxrecon2024")
    sampled = read_pattern(SHARED / "cmrxrecon2024" / "cine_sax_mask_Uniform8.mat")
    assert sampled.shape == (246,)
    assert sampled.sum() == want["mask_lines"]
    assert sampled.size / sampled.sum() == pytest.approx(want["mask_R"], rel=1e-12)
    assert sampled[115:131].all()
    k = stored(SHARED / "cmrxrecon2024" / "cine_sax.mat", dtype, tmp_path).kspace.astype(complex)
    full, zero_filled = ifft2c(k), ifft2c(k * sampled[:, None])
    nmse = np.linalg.norm(zero_filled - full) ** 2 / np.linalg.norm(full) ** 2
    assert nmse == pytest.approx(want["nmse_zero_filled"], rel=1e-5)


@pytest.mark.parametrize("dtype", ["study", "float32"])
def test_cmrxrecon2025_undersampled_multi_coil(dtype: str, tmp_path: Path) -> None:
    want = golden("cmrxrecon2025")["ktGaussian8"]
    path = SHARED / "cmrxrecon2025" / "underkslice_ktGaussian8.mat"
    view = stored(path, dtype, tmp_path)
    coil, ny, nx = want["logical_shape_coil_ny_nx"]
    assert view.kspace.shape == (1, coil, 1, ny, nx)
    k = view.kspace[0, :, 0].astype(complex)
    assert np.linalg.norm(k) == pytest.approx(want["l2"], rel=1e-5)
    assert list(np.unravel_index(np.abs(k).argmax(), k.shape)) == want["argmax_k"]
    image = np.sqrt((np.abs(ifft2c(k)) ** 2).sum(0))
    assert image.max() == pytest.approx(want["rss_max"], rel=1e-5)
    assert list(np.unravel_index(image.argmax(), image.shape)) == want["rss_argmax"]
    assert view.sampled is not None
    assert view.sampled.mean() == pytest.approx(want["mask_fraction"], rel=1e-12)
    pattern = np.load(path.with_name("mask_from_zeros_ktGaussian8.npy"))
    np.testing.assert_array_equal(np.broadcast_to(view.sampled[0, 0][:, None], pattern.shape), pattern)
    np.testing.assert_array_equal(read_pattern(path.with_name("mask_from_zeros_ktGaussian8.npy")), view.sampled[0, 0])
    assert view.sampled[0, 0, 71:91].all()
    # The readout is complete, so taking off its oversampling leaves the lines and their pattern alone.
    cropped = read(path, Options(matrix=(ny, nx // 2))).views["sax"]
    np.testing.assert_array_equal(cropped.sampled, view.sampled)


@pytest.mark.parametrize(("file", "lines"), [("vista_18_192_192_acc_8.mat", 24), ("vista_18_192_192_acc_12.mat", 16)])
def test_vista_patterns(file: str, lines: int) -> None:
    sampled = read_pattern(SHARED / "vista_masks" / file)
    assert sampled.shape == (18, 192)
    assert (sampled.sum(-1) == lines).all()


@pytest.mark.parametrize("name", ["SC-HF-I-1", "SC-HF-I-4"])
def test_sunnybrook_volumes(name: str) -> None:
    """Voxel counts against volumes from the contours, which were measured independently of the reader."""
    want = golden("sunnybrook", "derived_meta.json")[name]
    path = SHARED / "sunnybrook" / name / f"{name}_4d.nii.gz"
    study = read(path, Options(matrix=(128, 128)))
    view, labels = study.views["sax"], study.labels
    assert view.kspace.shape == (want["slices"], 1, want["frames"], 128, 128)
    assert labels["lvedv_ml"] == pytest.approx(want["EDV_ml"], rel=1e-3)
    assert labels["lvesv_ml"] == pytest.approx(want["ESV_ml"], rel=1e-3)
    assert labels["lvef_pct"] == pytest.approx(100 * want["EF"], abs=0.1)
    assert view.spacing_mm == pytest.approx(want["spacing"][::-1], rel=1e-4)
    assert view.frame_time_s is not None
    assert view.segmentation is not None
    contoured = np.flatnonzero((view.segmentation != UNLABELLED).any((0, 2, 3)))
    np.testing.assert_array_equal(contoured, sorted((want["ED_frame_0based"], want["ES_frame_0based"])))
    # From base to apex: at end-diastole the cavity is larger in the first half of its slices than in the second.
    cavity = (view.segmentation[:, want["ED_frame_0based"]] == 1).sum((1, 2))
    areas = cavity[cavity > 0]
    assert areas[: len(areas) // 2].sum() > areas[-(len(areas) // 2) :].sum()
    # Myocardium lies at end-diastole only; around the end-systolic cavity nothing is called background.
    assert not (view.segmentation[:, want["ES_frame_0based"]] == 0).any()


def test_acdc_layout_without_geometry() -> None:
    study = read(SHARED / "acdc_nifti" / "patient001")
    view = study.views["sax"]
    assert view.kspace.shape == (10, 1, 2, 256, 216)
    assert view.spacing_mm is None
    assert view.frame_time_s is None
    assert study.labels == {"dcm": 1.0, "hcm": 0.0, "infarct": 0.0, "rv_disease": 0.0}
    # Counted in the two files: RV, myocardium, cavity = 1, 2, 3 there, and 3, 2, 1 here.
    assert view.segmentation is not None
    counts = [[int((view.segmentation[:, t] == c).sum()) for c in (3, 2, 1)] for t in (0, 1)]
    assert counts == [[5723, 6728, 12104], [2439, 7990, 9241]]


def test_discovery_over_everything() -> None:
    assert [len(item.files) for item in discover("nifti", str(SHARED))] == [2, 2, 5]
    assert len(discover("cmrxrecon", str(SHARED))) == 1
