"""Readers on files that the test writes itself: every layout, order of axes and promise of an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from kmtr.data.sources import Item, Options, discover, read, unused
from kmtr.data.sources.cine import orientation, volumes
from kmtr.data.sources.pseudonyms import pseudonym
from kmtr.physics.fourier import crop_or_pad, ifft2c
from kmtr.types import UNLABELLED, InputError

# Sunnybrook's: columns i (to inferior), j (to right-anterior), k (base to apex), in mm.
OBLIQUE = np.array(
    [[0.14, 1.0, -6.7, -162.0], [-0.47, 0.9, 6.7, -35.0], [-1.27, -0.22, -3.2, 144.0], [0, 0, 0, 1]], float
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def save_nifti(path: Path, array: np.ndarray, affine=None, zooms=None, units=("mm", "sec")) -> Path:
    image = nibabel.Nifti1Image(array, np.diag([2.0, 1.5, 8.0, 1.0]) if affine is None else affine)
    if zooms is not None:
        image.header.set_zooms(zooms)
    image.header.set_xyzt_units(*units)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def heart(frames: int = 5, slices: int = 3) -> np.ndarray:
    """Contours (x, y, z, t) as Sunnybrook's: frames 1 and 3 only, end-diastole with myocardium, end-systole without."""
    codes = np.zeros((20, 24, slices, frames), np.uint8)
    codes[6:14, 6:14, :, 3] = 2
    codes[8:12, 8:12, :, 3] = 3
    codes[9:11, 9:11, :, 1] = 3
    return codes


# Pseudonyms and the registry


def test_pseudonym_is_keyed_blake2b() -> None:
    one = pseudonym("patient001", b"secret")
    assert one == pseudonym("patient001", b"secret")
    assert len(one) == 18
    assert one.startswith("p-")
    assert int(one[2:], 16) >= 0
    assert len({one, pseudonym("patient002", b"secret"), pseudonym("patient001", b"other")}) == 3
    for subject, key in (("", b"k"), ("a", b""), ("a", b"x" * 65)):
        with pytest.raises(InputError):
            pseudonym(subject, key)


def test_items_hide_the_subject() -> None:
    item = Item("nifti", "Jane Doe", (Path("jane_doe_4d.nii.gz"),))
    assert "ane" not in repr(item)


def test_registry_refuses_in_one_line(tmp_path: Path) -> None:
    for call in (
        lambda: discover("tiff", str(tmp_path)),
        lambda: discover("nifti", str(tmp_path / "absent")),
        lambda: discover("nifti", str(tmp_path)),
        lambda: discover("cmrxrecon", str(tmp_path)),
        lambda: read(tmp_path),
        lambda: read(tmp_path, Options(matrix=(0, 8))),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_missing_reader_package_names_the_extra(tmp_path: Path) -> None:
    """In a fresh interpreter that cannot import the optional packages; importing the registry needs none of them."""
    path = save_nifti(tmp_path / "a_4d.nii.gz", np.ones((8, 8, 1, 2), np.int16))
    code = (
        "import sys; sys.modules.update(nibabel=None, h5py=None)\n"
        "from kmtr.data.sources import read\nfrom kmtr.types import InputError\n"
        f"try: read({str(path)!r})\n"
        "except InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "this source needs nibabel, which is not installed: pip install kmtr[readers]\n"


def test_files_of_nobody_are_numbered_as_find_and_sort_count_them(tmp_path: Path) -> None:
    (tmp_path / "P1").mkdir()
    for name in ("P1/cine_sax.mat", "P1/cine_lax.mat", "P1/cine_sax_info.csv", "notes.txt", "P1/tagging.MAT"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b").symlink_to(tmp_path / "P1")
    (tmp_path / "c.mat").symlink_to(tmp_path / "gone.mat")
    items = discover("cmrxrecon", str(tmp_path))
    assert [file.name for item in items for file in item.files] == ["cine_sax.mat"]
    listed = subprocess.run(
        ["find", tmp_path, "-mindepth", "1"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = [Path(path).name for path in sorted(listed, key=str.encode)]
    found = [{names[n - 1] for n in files.files} for files in unused("cmrxrecon", str(tmp_path), items)]
    assert sorted(found, key=sorted) == [{"b", "c.mat"}, {"cine_lax.mat"}, {"tagging.MAT"}]
    assert unused("cmrxrecon", str(tmp_path / "P1" / "cine_sax.mat"), items) == []


# NIfTI


def test_cine_round_trip(tmp_path: Path, rng: np.random.Generator) -> None:
    """|inverse FFT of the k-space| is the magnitude, as ``slice t y x``; spacing (z, y, x) and frame time follow."""
    image = rng.integers(0, 900, (20, 24, 3, 5)).astype(np.int16)
    path = save_nifti(tmp_path / "case_4d.nii.gz", image, zooms=(2.0, 1.5, 8.0, 0.04))
    study = read(path)
    view = study.views["sax"]
    assert view.kspace.shape == (3, 1, 5, 24, 20)
    np.testing.assert_allclose(np.abs(ifft2c(view.kspace))[:, 0], image.transpose(2, 3, 1, 0), atol=1e-2)
    assert view.spacing_mm == pytest.approx((8.0, 1.5, 2.0))
    assert view.frame_time_s == pytest.approx(0.04)
    assert view.sampled is None
    assert view.segmentation is None
    assert study.labels == {}
    assert study.subject_id == pseudonym("case", b"kmtr")


def test_phase_is_shared_by_frames_and_a_pure_function(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "case_4d.nii.gz", np.full((16, 16, 2, 3), 100, np.int16))
    image = ifft2c(read(path).views["sax"].kspace)
    np.testing.assert_array_equal(read(path).views["sax"].kspace, read(path, Options(seed=0)).views["sax"].kspace)
    np.testing.assert_allclose(image[:, :, 0], image[:, :, 2], rtol=1e-5)
    assert np.abs(np.angle(image[0] / image[1])).max() > 0.1  # slices differ
    assert np.ptp(np.angle(image[0, 0, 0])) > 0.1  # and no phase is flat
    for other in (read(path, Options(seed=1)), read(path, subject_key=b"other")):
        assert not np.allclose(other.views["sax"].kspace, read(path).views["sax"].kspace)


@pytest.mark.parametrize("matrix", [(16, 12), (32, 32), (25, 11)])
def test_matrix_crops_the_image_and_its_contours(tmp_path: Path, rng, matrix: tuple[int, int]) -> None:
    image = rng.integers(0, 900, (20, 24, 3, 5)).astype(np.int16)
    path = save_nifti(tmp_path / "case_4d.nii.gz", image)
    save_nifti(tmp_path / "case_seg_4d.nii.gz", heart())
    study = read(path, Options(matrix=matrix))
    view = study.views["sax"]
    expected = crop_or_pad(image.transpose(2, 3, 1, 0), matrix, (-2, -1))
    np.testing.assert_allclose(np.abs(ifft2c(view.kspace))[:, 0], expected, atol=1e-2)
    assert view.segmentation is not None
    assert (view.segmentation[:, (0, 2, 4)] == UNLABELLED).all()
    assert study.labels == read(path).labels  # measured before the crop


def test_contours_become_classes_and_volumes(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "case_4d.nii.gz", np.ones((20, 24, 3, 5), np.int16))
    save_nifti(tmp_path / "case_seg_4d.nii.gz", heart())
    study = read(path)
    segmentation = study.views["sax"].segmentation
    assert segmentation is not None
    assert (segmentation[:, (0, 2, 4)] == UNLABELLED).all()
    np.testing.assert_array_equal(np.unique(segmentation[:, 3]), [0, 1, 2])
    # End-systole has an inner contour only: around it may be myocardium, so it is not called background.
    np.testing.assert_array_equal(np.unique(segmentation[:, 1]), [1, UNLABELLED])
    voxel_ml = 2.0 * 1.5 * 8.0 / 1000
    edv, esv, mass = 48 * voxel_ml, 12 * voxel_ml, 144 * voxel_ml * 1.05
    expected = {"lvedv_ml": edv, "lvesv_ml": esv, "lvsv_ml": edv - esv, "lvef_pct": 75.0, "lvm_g": mass}
    assert study.labels == pytest.approx(expected)


def test_volumes_need_spacing_and_two_frames() -> None:
    classes = np.zeros((1, 3, 4, 4), np.uint8)
    classes[0, 0, :2], classes[0, 2, :1] = 1, 1
    assert volumes(classes, None) == {}
    assert volumes(classes[:, :2], (10.0, 10.0, 10.0)) == {}
    assert volumes(classes, (10.0, 10.0, 10.0)) == pytest.approx(
        {"lvedv_ml": 8.0, "lvesv_ml": 4.0, "lvsv_ml": 4.0, "lvef_pct": 50.0}
    )
    classes[0, 0, 3], classes[0, 2, 3, 0] = 3, 3
    assert volumes(classes, (10.0, 10.0, 10.0))["rvef_pct"] == pytest.approx(75.0)


def test_oblique_affine_turns_every_storage_to_one_orientation(tmp_path: Path, rng) -> None:
    """The same slab stored with any flips and either order in plane reads as the same study."""
    image = rng.integers(1, 900, (18, 20, 3, 2)).astype(np.int16)
    reference = read(save_nifti(tmp_path / "a" / "x_4d.nii.gz", image, OBLIQUE)).views["sax"]
    # OBLIQUE: i is inferior (y), j is right-anterior (x, flipped), k is base to apex.
    expected = image.transpose(2, 3, 0, 1)[..., ::-1]
    np.testing.assert_allclose(np.abs(ifft2c(reference.kspace))[:, 0], expected, atol=1e-2)
    for n, (flips, order) in enumerate([((0,), (0, 1, 2)), ((2,), (1, 0, 2)), ((0, 1, 2), (0, 1, 2))]):
        turned, affine = image, OBLIQUE.copy()
        for axis in flips:
            affine[:3, 3] += affine[:3, axis] * (image.shape[axis] - 1)
            affine[:3, axis] *= -1
            turned = np.flip(turned, axis)
        turned, affine[:3, :3] = turned.transpose(*order, 3), affine[:3, order]
        view = read(save_nifti(tmp_path / str(n) / "x_4d.nii.gz", turned, affine)).views["sax"]
        np.testing.assert_array_equal(view.kspace, reference.kspace)
        assert view.spacing_mm == pytest.approx(reference.spacing_mm)


def test_axis_aligned_affine_is_taken_as_stored() -> None:
    for signs in ((1, 1, 1), (-1, -1, 1), (1, -1, -1)):
        assert orientation(np.diag([*signs, 1])) == ((2, 1, 0), (False, False, False))


def test_identity_affine_has_no_spacing(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "case_4d.nii.gz", np.ones((20, 24, 3, 5), np.int16), np.eye(4))
    save_nifti(tmp_path / "case_seg_4d.nii.gz", heart(), np.eye(4))
    study = read(path)
    assert study.views["sax"].spacing_mm is None
    assert study.labels == {}


@pytest.mark.parametrize(
    ("stored", "unit", "seconds"),
    [(0.04, "sec", 0.04), (40.0, "msec", 0.04), (40.0, "unknown", 0.04), (0.04, "unknown", 0.04), (1.0, "sec", None)],
)
def test_frame_time_by_its_unit_where_plausible(tmp_path: Path, stored, unit, seconds) -> None:
    array = np.ones((8, 8, 1, 2), np.int16)
    path = save_nifti(tmp_path / "a_4d.nii", array, zooms=(2.0, 1.5, 8.0, stored), units=("mm", unit))
    time = read(path).views["sax"].frame_time_s
    assert time == (None if seconds is None else pytest.approx(seconds))


def acdc(folder: Path, group: str, rng: np.random.Generator, *, whole: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """An ACDC patient with frames 4 and 11; returns the cine (x, y, z, t) and the codes of the two frames."""
    name = folder.name
    cine = rng.integers(0, 900, (12, 14, 2, 13)).astype(np.int16)
    codes = np.zeros((12, 14, 2, 2), np.uint8)
    codes[2:4, :3], codes[4:9, 4:9], codes[5:8, 5:8, :, 0], codes[6, 6, :, 1] = 1, 2, 3, 3
    for n, number in enumerate((4, 11)):
        save_nifti(folder / f"{name}_frame{number:02d}.nii.gz", cine[..., number - 1])
        save_nifti(folder / f"{name}_frame{number:02d}_gt.nii.gz", codes[..., n])
    if whole:
        save_nifti(folder / f"{name}_4d.nii.gz", cine)
    (folder / "Info.cfg").write_text(f"ED: 4\nES: 11\nGroup: {group}\nHeight: 184.0\nNbFrame: 13\nWeight: 95.0 \n")
    return cine, codes


@pytest.mark.parametrize("group", ["DCM", "HCM", "MINF", "RV", "NOR"])
def test_acdc_two_frames(tmp_path: Path, rng, group: str) -> None:
    cine, _ = acdc(tmp_path / "patient007", group, rng)
    study = read(tmp_path / "patient007")
    view = study.views["sax"]
    expected = cine[..., [3, 10]].transpose(2, 3, 1, 0)
    np.testing.assert_allclose(np.abs(ifft2c(view.kspace))[:, 0], expected, atol=1e-2)
    assert view.segmentation is not None
    # ACDC's 1 = RV, 2 = myocardium, 3 = cavity become 3, 2, 1.
    assert [(view.segmentation[:, 0] == c).sum() for c in (1, 2, 3)] == [18, 32, 12]
    diseases = {name: study.labels[name] for name in ("dcm", "hcm", "infarct", "rv_disease")}
    mapping = {"DCM": "dcm", "HCM": "hcm", "MINF": "infarct", "RV": "rv_disease"}
    assert diseases == {name: float(name == mapping.get(group)) for name in diseases}
    assert study.labels["lvef_pct"] == pytest.approx(100 * (18 - 2) / 18)
    assert study.labels["rvef_pct"] == 0
    assert study.subject_id == pseudonym("patient007", b"kmtr")


def test_acdc_whole_cine_labels_only_the_contoured_frames(tmp_path: Path, rng) -> None:
    acdc(tmp_path / "patient007", "NOR", rng, whole=True)
    whole = read(tmp_path / "patient007")
    view = whole.views["sax"]
    assert view.kspace.shape[2] == 13
    assert view.segmentation is not None
    contoured = (view.segmentation != UNLABELLED).any((0, 2, 3))
    np.testing.assert_array_equal(np.flatnonzero(contoured), [3, 10])
    for path in (tmp_path / "patient007").glob("*_4d*"):
        path.unlink()
    pair = read(tmp_path / "patient007").views["sax"].segmentation
    np.testing.assert_array_equal(view.segmentation[:, [3, 10]], pair)
    assert whole.labels == read(tmp_path / "patient007").labels


def test_nifti_discovery_is_sorted_and_complete(tmp_path: Path, rng) -> None:
    for name in ("patient002", "patient001"):
        acdc(tmp_path / "acdc" / name, "NOR", rng, whole=name == "patient002")
    save_nifti(tmp_path / "b" / "case_4d.nii.gz", np.ones((8, 8, 1, 2), np.int16))
    save_nifti(tmp_path / "b" / "case_seg_4d.nii.gz", np.zeros((8, 8, 1, 2), np.uint8))
    save_nifti(tmp_path / "b" / "another.nii", np.ones((8, 8, 1, 2), np.int16))
    save_nifti(tmp_path / "b" / "scout.nii", np.ones((8, 8, 1), np.int16))
    items = discover("nifti", str(tmp_path))
    assert [(item.subject, len(item.files)) for item in items] == [
        ("another", 1), ("case", 2), ("patient001", 5), ("patient002", 6)
    ]  # fmt: skip
    assert items == discover("nifti", str(tmp_path))
    assert read(items[1]).views["sax"].kspace.shape == (1, 1, 2, 8, 8)


def test_files_named_alike_are_told_by_their_folder(tmp_path: Path) -> None:
    """And what is beside them, long axes and contours of another convention, is not taken for a short axis."""
    for subject in ("1002", "1001"):
        for name in ("sax", "seg_sax", "lax_2ch", "lax_4ch"):
            save_nifti(tmp_path / subject / f"{name}.nii.gz", np.ones((8, 8, 1, 2), np.int16))
    items = discover("nifti", str(tmp_path))
    assert [(item.subject, len(item.files)) for item in items] == [("1001", 1), ("1002", 1)]
    assert read(items[0]).subject_id == read(tmp_path / "1001" / "sax.nii.gz").subject_id
    with pytest.raises(InputError, match="not contours, long axis"):
        read(tmp_path / "1001" / "lax_4ch.nii.gz")


def test_nifti_refuses_in_one_line_without_the_subject(tmp_path: Path) -> None:
    flat = save_nifti(tmp_path / "flat.nii.gz", np.ones((8, 8, 2), np.int16))
    nan = save_nifti(tmp_path / "nan_4d.nii.gz", np.full((8, 8, 1, 2), np.nan, np.float32))
    save_nifti(tmp_path / "odd" / "jane_4d.nii.gz", np.ones((8, 8, 1, 2), np.int16))
    odd_contours = save_nifti(tmp_path / "odd" / "jane_seg_4d.nii.gz", np.full((8, 8, 1, 2), 7, np.uint8))
    save_nifti(tmp_path / "other" / "jane_4d.nii.gz", np.ones((8, 8, 1, 2), np.int16))
    save_nifti(tmp_path / "other" / "jane_seg_4d.nii.gz", np.zeros((8, 9, 1, 2), np.uint8))
    cut = tmp_path / "cut" / "jane_4d.nii.gz"
    cut.parent.mkdir()
    cut.write_bytes(nan.read_bytes()[:-20])
    junk = tmp_path / "junk" / "jane_4d.nii.gz"
    junk.parent.mkdir()
    junk.write_bytes(b"not a NIfTI file")
    frame = save_nifti(tmp_path / "frames" / "jane_frame01.nii.gz", np.ones((8, 8, 2), np.int16))
    for source, said in (
        (flat, "4D"),
        (frame, "name their folder"),
        (nan, "finite"),
        (tmp_path / "odd", "values 0, 1, 2, 3"),
        (odd_contours, "not contours"),
        (tmp_path / "other", "shape"),
        (tmp_path / "cut", "cannot be read|cut short"),
        (tmp_path / "junk", "cannot be read"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            read(source, format="nifti")
        message = str(caught.value)
        assert "\n" not in message
        assert "jane" not in message or "jane" in str(source)
    with pytest.raises(InputError, match=pseudonym("jane", b"kmtr")):
        read(discover("nifti", str(tmp_path / "odd"))[0])
