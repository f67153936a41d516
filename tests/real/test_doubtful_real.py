"""Real hearts stored in other ways than they came: what is unusual reads alike, what is wrong is refused."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest

from kmtr.data.sources import anatomy, discover, read
from kmtr.physics.fourier import ifft2c
from kmtr.types import InputError, Study

SHARED = Path(os.environ.get("KMTR_SHARED", Path(__file__).parents[2].parent / "shared" / "data"))
SUNNYBROOK = SHARED / "sunnybrook" / "SC-HF-I-4"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="real samples (KMTR_SHARED or ../shared/data) are missing")


@pytest.fixture(scope="module")
def whole() -> Study:
    return read(SUNNYBROOK / "SC-HF-I-4_4d.nii.gz")


def check_same(study: Study, whole: Study) -> None:
    one, other = study.views["sax"], whole.views["sax"]
    np.testing.assert_allclose(np.abs(ifft2c(one.kspace)), np.abs(ifft2c(other.kspace)), atol=0.01)
    np.testing.assert_array_equal(one.segmentation, other.segmentation)
    assert one.spacing_mm == pytest.approx(other.spacing_mm, rel=1e-3)
    assert study.labels == pytest.approx(whole.labels, rel=1e-3)


def test_sunnybrook_closest_canonical(tmp_path: Path, whole: Study) -> None:
    for name in ("SC-HF-I-4_4d", "SC-HF-I-4_seg_4d"):
        image = nibabel.load(SUNNYBROOK / f"{name}.nii.gz")
        turned = nibabel.as_closest_canonical(image)
        assert turned.shape != image.shape
        nibabel.save(turned, tmp_path / f"{name}.nii")
    check_same(read(tmp_path / "SC-HF-I-4_4d.nii"), whole)


def test_sunnybrook_a_file_for_each_slice(tmp_path: Path, whole: Study) -> None:
    image, drawn = (nibabel.load(SUNNYBROOK / f"SC-HF-I-4{name}_4d.nii.gz") for name in ("", "_seg"))
    for z in range(image.shape[2]):
        for name, of in (("", image), ("_seg", drawn)):
            nibabel.save(of.slicer[:, :, z : z + 1], tmp_path / f"P4_sax_{z + 1}{name}.nii")
    (item,) = discover("nifti", str(tmp_path))
    check_same(read(item), whole)


def test_sunnybrook_in_the_values_of_mnms(tmp_path: Path, whole: Study) -> None:
    drawn = nibabel.load(SUNNYBROOK / "SC-HF-I-4_seg_4d.nii.gz")
    values = np.array([0, 3, 2, 1], np.uint8)[np.asarray(drawn.dataobj, np.uint8)]
    nibabel.save(nibabel.load(SUNNYBROOK / "SC-HF-I-4_4d.nii.gz"), tmp_path / "a_4d.nii")
    nibabel.save(nibabel.Nifti1Image(values, drawn.affine), tmp_path / "a_seg_4d.nii")
    study = read(tmp_path / "a_4d.nii")
    check_same(study, whole)
    assert "told by shape" in study.notes[0]


def frames() -> list[Path]:
    return sorted((SHARED / "acdc_h5").glob("*.h5"))


@pytest.mark.parametrize("path", frames(), ids=lambda path: path.stem)
def test_acdc_contours_are_what_they_say(path: Path) -> None:
    with h5py.File(path) as file:
        image, codes = np.asarray(file["image"])[:, None], np.asarray(file["label"])[:, None]
    layout = {0: 0, 1: anatomy.RV, 2: anatomy.LV_MYOCARDIUM, 3: anatomy.LV_CAVITY}
    assert anatomy.meaning(codes, layout, "it") == (layout, "")
    other = {0: 0, 1: anatomy.LV_CAVITY, 2: anatomy.LV_MYOCARDIUM, 3: anatomy.RV}
    told, note = anatomy.meaning(codes, other, "it")
    assert told == layout
    assert note
    classes = np.array([0, 3, 2, 1], np.uint8)[codes]
    anatomy.check_surrounded(classes, "it")
    anatomy.check_turned(image, classes, "it")
    with pytest.raises(InputError, match="only when turned over"):
        anatomy.check_turned(image, classes[..., ::-1], "it")
    apart = np.where(classes == 1, 1, np.where(np.roll(classes == 2, 30, -1), 2, 0))
    with pytest.raises(InputError, match="surrounds"):
        anatomy.check_surrounded(apart, "it")
