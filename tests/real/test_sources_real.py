"""Readers against real acquisitions and the golden numbers that came with them; skipped where those are missing."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest

from kmtr.data.dataset import record, shards
from kmtr.data.dataset.manifest import write_manifest
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.sources import Options, cine, discover, read
from kmtr.data.sources.patterns import read_pattern
from kmtr.physics.fourier import ifft2c
from kmtr.types import UNLABELLED, Study, View

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
    write_manifest(str(root), parts, dtype, "test")
    return record.to_study(Reader(Dataset.of(str(root)), "train").read([0])).views["sax"]


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


@pytest.fixture(scope="module")
def sunnybrook_dicom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The DICOM files of SC-HF-I-4 (their patient id is SCD0000301), all contours, and the table that links the two."""
    pytest.importorskip("pydicom")
    folder, shared = tmp_path_factory.mktemp("sunnybrook"), SHARED / "sunnybrook"
    with tarfile.open(shared / "dicom" / "SCD0000301.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    shutil.copytree(shared / "contours", folder / "contours")
    shutil.copy(shared / "link.csv", folder)
    return folder


@pytest.fixture(scope="module")
def from_dicom(sunnybrook_dicom: Path) -> Study:
    return read(sunnybrook_dicom, format="dicom")


def test_sunnybrook_by_nifti_and_by_dicom_is_the_same(from_dicom: Study) -> None:
    """Stored values and contours, pixel by pixel, and where they lie; the phase belongs to the subject's name."""
    path = SHARED / "sunnybrook" / "SC-HF-I-4" / "SC-HF-I-4_4d.nii.gz"
    one, other = from_dicom.views["sax"], read(path).views["sax"]
    np.testing.assert_array_equal(one.segmentation, other.segmentation)
    assert one.contoured == other.contoured == (1, 2)
    stored = [np.abs(ifft2c(view.kspace)) for view in (one, other)]
    assert np.abs(stored[0] - stored[0].round()).max() < 0.01  # so the integers of the files are back, exactly
    np.testing.assert_array_equal(stored[0].round(), stored[1].round())
    assert one.spacing_mm == pytest.approx(other.spacing_mm, rel=1e-5)
    assert one.affine is not None
    np.testing.assert_allclose(one.affine, other.affine, atol=0.01)
    assert one.frame_time_s == pytest.approx(other.frame_time_s, rel=2e-3)  # trigger times are whole milliseconds
    assert from_dicom.vendor == "GE"
    assert from_dicom.field_strength_t == 1.5
    assert from_dicom.labels["heart_rate_bpm"] == 65


def test_sunnybrook_volumes_by_dicom_contours(from_dicom: Study) -> None:
    want, labels = golden("sunnybrook", "derived_meta.json")["SC-HF-I-4"], from_dicom.labels
    assert labels["lvedv_ml"] == pytest.approx(want["EDV_ml"], rel=0.02)
    assert labels["lvesv_ml"] == pytest.approx(want["ESV_ml"], rel=0.02)
    assert labels["lvef_pct"] == pytest.approx(100 * want["EF"], abs=1)


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


def acdc_patients() -> list[dict[str, str]]:
    summary = SHARED / "acdc_h5" / "summary.csv"
    return list(csv.DictReader(io.StringIO(summary.read_text()))) if summary.is_file() else []


@pytest.mark.parametrize("row", acdc_patients(), ids=lambda row: row["patient"])
def test_acdc_contours_equal_the_summary(row: dict[str, str], tmp_path: Path) -> None:
    """Ten patients, two of each group, in the challenge's layout; their HDF5 copies have lost the spacing."""
    name, group, frames = row["patient"], row["group"], {"ed": int(row["ed_frame"]), "es": int(row["es_frame"])}
    for number in frames.values():
        with h5py.File(SHARED / "acdc_h5" / f"{name}_frame{number:02d}.h5") as file:
            for key, ending in (("image", ""), ("label", "_gt")):
                path = tmp_path / name / f"{name}_frame{number:02d}{ending}.nii"
                path.parent.mkdir(exist_ok=True)
                nibabel.save(nibabel.Nifti1Image(np.asarray(file[key]).T, np.eye(4)), path)
    (tmp_path / name / "Info.cfg").write_text(f"ED: {frames['ed']}\nES: {frames['es']}\nGroup: {group}\n")
    study = read(tmp_path)
    view = study.views["sax"]
    assert view.kspace.shape == (int(row["nz"]), 1, 2, int(row["ny"]), int(row["nx"]))
    assert view.contoured == (1, 2, 3)
    assert view.segmentation is not None
    order = sorted(frames, key=lambda phase: frames[phase])
    for chamber, value in (("lv", 1), ("myo", 2), ("rv", 3)):
        counts = {phase: int((view.segmentation[:, t] == value).sum()) for t, phase in enumerate(order)}
        assert counts == {phase: int(row[f"{chamber}_{phase}"]) for phase in frames}
    labels = cine.volumes(view.segmentation, (1.0, 1.0, 1.0))  # any spacing: ratios only
    assert labels["lvef_pct"] == pytest.approx(100 * float(row["lvef_voxel"]), abs=0.01)
    assert labels["rvef_pct"] == pytest.approx(100 * float(row["rvef_voxel"]), abs=0.01)
    assert sum(study.labels.values()) == (group != "NOR")


def test_discovery_over_everything() -> None:
    assert [len(item.files) for item in discover("nifti", str(SHARED))] == [2, 2, 5]
    assert len(discover("cmrxrecon", str(SHARED))) == 1
