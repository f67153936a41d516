"""NIfTI files that say one thing and hold another, each kind with what is unusual and right."""

from __future__ import annotations

import json
from pathlib import Path

import hearts
import nibabel
import numpy as np
import pytest
from hearts import classes, coded, magnitude, save, volume_ml

from kmtr.data.sources import Options, discover, geometry, read, unused
from kmtr.physics.fourier import ifft2c
from kmtr.types import InputError, Study

CHALLENGE, VENTRICLES = (3, 2, 1), (1, 2, 3)  # values of LV cavity, myocardium, right ventricle


def images(study: Study) -> np.ndarray:
    """``slice t y x``."""
    return np.abs(ifft2c(study.views["sax"].kspace))[:, 0]


def stored() -> np.ndarray:
    return magnitude().transpose(2, 3, 1, 0)


# ------------------------------------------------------------------------------------------- one person, many files


def slices(folder: Path, name: str = "P01_CINE_SAX_b{b}_{s}", skip: tuple[int, ...] = (), matrix=None) -> Path:
    """A file for each slice, as dcm2niix writes them."""
    matrix = hearts.affine() if matrix is None else matrix
    for z in range(hearts.SHAPE[2]):
        if z not in skip:
            own = matrix.copy()
            own[:3, 3] += own[:3, 2] * z
            save(folder / f"{name.format(b=z + 1, s=2 * z + 5)}.nii.gz", magnitude()[:, :, z : z + 1], own)
    return folder


@pytest.mark.parametrize("matrix", [hearts.affine(), np.diag([-1.4, 1.5, 8, 1])], ids=["oblique", "axial"])
@pytest.mark.parametrize("name", ["P01_CINE_SAX_b{b}_{s}", "CINE_SAX_b{b}_{s}"])
def test_slices_of_one_scan_are_one_subject(tmp_path: Path, matrix: np.ndarray, name: str) -> None:
    slices(tmp_path / "P01", name, matrix=matrix)
    (item,) = discover("nifti", str(tmp_path))
    assert (item.subject, len(item.files)) == ("P01", 8)
    view = read(item).views["sax"]
    whole = read(save(tmp_path / "w" / "P01_4d.nii.gz", magnitude(), matrix)).views["sax"]
    np.testing.assert_allclose(np.abs(ifft2c(view.kspace)), np.abs(ifft2c(whole.kspace)), atol=1e-2)
    assert view.spacing_mm == pytest.approx(whole.spacing_mm)
    assert view.frame_time_s == pytest.approx(0.04)


def test_a_slice_of_another_name_joins_its_stack(tmp_path: Path) -> None:
    slices(tmp_path / "P01")
    (tmp_path / "P01" / "P01_CINE_SAX_b3_9.nii.gz").rename(tmp_path / "P01" / "again.nii.gz")
    (item,) = discover("nifti", str(tmp_path))
    np.testing.assert_allclose(images(read(item)), stored(), atol=1e-2)


def test_slices_of_several_people_in_one_folder(tmp_path: Path) -> None:
    slices(tmp_path, "P01_sax_{b}")
    slices(tmp_path, "P02_sax_{b}", matrix=hearts.affine(corner=(70.0, 20.0, 30.0)))
    with_contours = tmp_path / "P02_sax_3_seg.nii.gz"
    save(with_contours, coded(classes(), *CHALLENGE)[:, :, 2:3], nibabel.load(tmp_path / "P02_sax_3.nii.gz").affine)
    items = discover("nifti", str(tmp_path))
    assert [(item.subject, len(item.files)) for item in items] == [("P01_sax", 8), ("P02_sax", 9)]
    items = [item for item in items if not item.problem]  # both hold the same drawn heart, which is noticed
    assert len(items) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "irregular distances"),
        ("twice", "two or more of one slice"),
        ("matrix", "do not fit each other"),
        ("pixels", "do not fit each other"),
        ("frames", "do not fit each other"),
    ],
)
def test_slices_that_make_no_stack_are_refused_together(tmp_path: Path, change: str, said: str) -> None:
    slices(tmp_path, skip=(3,) if change == "missing" else ())
    path = tmp_path / "P01_CINE_SAX_b4_11.nii.gz"
    own = hearts.affine()
    own[:3, 3] += own[:3, 2] * 3
    if change == "twice":
        save(tmp_path / "P01_CINE_SAX_b4_21.nii.gz", magnitude()[:, :, 3:4], own)
    elif change == "matrix":
        own[:3, 3] += own[:3, 1] * 5
        save(path, magnitude()[:, 5:-5, 3:4], own)
    elif change == "pixels":
        centre = own @ (47.5, 39.5, 0, 1)
        own[:3, :2] *= 1.1
        own[:3, 3] += (centre - own @ (47.5, 39.5, 0, 1))[:3]
        save(path, magnitude()[:, :, 3:4], own)
    elif change == "frames":
        save(path, magnitude()[:, :, 3:4, :-1], own)
    (item,) = discover("nifti", str(tmp_path))
    with pytest.raises(InputError, match=said):
        read(item)


def test_a_scan_repeated_is_no_second_person(tmp_path: Path) -> None:
    save(tmp_path / "a" / "P01_SAX_5.nii.gz", magnitude())
    save(tmp_path / "a" / "P01_SAX_9.nii.gz", magnitude(seed=1))
    (item,) = discover("nifti", str(tmp_path))
    with pytest.raises(InputError, match="one person scanned again"):
        read(item)
    # People whose files lost their place, or whose names differ in their own number, are people.
    for n in range(3):
        save(tmp_path / "b" / f"site1_p{n}.nii.gz", magnitude(seed=10 + n), np.diag([-1.4, -1.5, 8, 1]))
        save(tmp_path / "b" / f"patient{n}_4d.nii.gz", magnitude(seed=20 + n))
    assert not any(item.problem for item in discover("nifti", str(tmp_path / "b")))
    assert len(discover("nifti", str(tmp_path / "b"))) == 6


def test_the_same_images_or_contours_under_two_names(tmp_path: Path) -> None:
    for n, name in enumerate(("a", "b", "c", "d", "e")):
        save(tmp_path / f"{name}_4d.nii.gz", magnitude(seed=0 if name in "bd" else n))
    turned = nibabel.Nifti1Image(magnitude(seed=0)[::-1].astype(np.float32), np.diag([1.4, 1.5, 8, 1]))
    nibabel.save(turned, tmp_path / "f.nii")
    save(tmp_path / "c_seg_4d.nii.gz", coded(classes(), *CHALLENGE))
    save(tmp_path / "e_seg_4d.nii.gz", coded(classes(), *CHALLENGE))
    items = discover("nifti", str(tmp_path))
    assert [bool(item.problem) for item in items] == [False, True, True, True, True, True]
    said = {item.subject: item.problem for item in items}
    assert said["b"].startswith("the same images as subject 1 of 6")
    assert said["d"] == said["f"] == said["b"]
    assert said["c"].startswith("subjects 3, 5 of 6 in the order of names have the same contours")
    with pytest.raises(InputError, match="whose are they"):
        read(items[4])


# ------------------------------------------------------------------------------------------------ nothing that vanishes


def test_dimensions_of_one_are_no_dimensions(tmp_path: Path) -> None:
    image = magnitude()
    for name, array in (("a", image), ("b", image[:, :, :, None]), ("c", image[..., None])):
        save(tmp_path / name / f"{name}.nii.gz", array)
        save(tmp_path / name / f"{name}_seg.nii.gz", coded(classes(), *CHALLENGE).reshape(array.shape))
    found = [read(tmp_path / name) for name in "abc"]
    for study in found:
        np.testing.assert_allclose(images(study), stored(), atol=1e-2)
        assert study.labels == found[0].labels


def test_endings_in_upper_case_are_endings(tmp_path: Path) -> None:
    save(tmp_path / "p_4d.nii.gz", magnitude()).rename(tmp_path / "p_4d.NII.GZ")
    save(tmp_path / "q_4d.nii", magnitude(seed=1)).rename(tmp_path / "q_4d.NII")
    assert [images(read(item)).shape for item in discover("nifti", str(tmp_path))] == [stored().shape] * 2


def test_vectors_and_more_dimensions_are_refused_and_not_lost(tmp_path: Path) -> None:
    vectors = nibabel.Nifti1Image(np.ones((8, 8, 3, 1, 3), np.float32), hearts.affine())
    vectors.header["intent_code"] = 1007
    nibabel.save(vectors, tmp_path / "field.nii.gz")
    save(tmp_path / "five.nii.gz", np.ones((8, 8, 3, 2, 3), np.int16))
    items = discover("nifti", str(tmp_path))
    assert [item.subject for item in items] == ["field", "five"]
    for item in items:
        with pytest.raises(InputError, match="expected a 4D image"):
            read(item)


def test_every_file_that_is_not_used_is_counted_with_its_reason(tmp_path: Path) -> None:
    save(tmp_path / "p" / "p_4d.nii.gz", magnitude())
    for name in ("scout", "p_lax_2ch", "seg_other", "p_ph", "p_real", "q_gt"):
        save(tmp_path / "p" / f"{name}.nii.gz", magnitude()[..., 0] if name == "scout" else magnitude(seed=3))
    save(tmp_path / "p" / "s2.nii.gz", magnitude(seed=4))
    (tmp_path / "p" / "s2.json").write_text(json.dumps({"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}))
    (tmp_path / "p" / "._p_4d.nii.gz").write_bytes(b"macOS")
    (tmp_path / "p" / "x.hdr").write_bytes(b"Analyze")
    (tmp_path / "p" / "gone.nii.gz").symlink_to(tmp_path / "nowhere")
    items = discover("nifti", str(tmp_path))
    assert [item.subject for item in items] == ["p"]
    names = [path.name for path in sorted(tmp_path.rglob("*"), key=str)]
    assert {left.reason: {names[n - 1] for n in left.files} for left in unused("nifti", str(tmp_path), items)} == {
        "phase, real or imaginary images": {"p_ph.nii.gz", "p_real.nii.gz", "s2.nii.gz"},
        "contours without an image that they are called after": {"q_gt.nii.gz", "seg_other.nii.gz"},
        "long axes": {"p_lax_2ch.nii.gz"},
        "images of one frame": {"scout.nii.gz"},
        "files of another ending than .nii and .nii.gz": {"x.hdr"},
        "hidden files": {"._p_4d.nii.gz"},
        "links to folders or to files that are not there": {"gone.nii.gz"},
    }


@pytest.mark.parametrize(
    "change",
    [lambda a: a.astype(np.int16) - 4096, lambda a: (a - a.mean()) / a.std(), lambda a: np.angle(np.exp(1j * a))],
    ids=["phase", "zero mean", "radians"],
)
def test_a_magnitude_has_no_negative_half(tmp_path: Path, change) -> None:
    values = np.random.default_rng(0).integers(0, 8192, (16, 16, 2, 4)).astype(np.float32)
    with pytest.raises(InputError, match="of the energy in negative voxels"):
        read(save(tmp_path / "p_4d.nii.gz", change(values).astype(np.float32)))
    ringing = values.copy()
    ringing[0] = -50.0  # what interpolation leaves
    assert read(save(tmp_path / "p_4d.nii.gz", ringing)).views


# --------------------------------------------------------------------------------------------- which dimension is which


def permuted(order: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    matrix = hearts.affine()
    matrix[:, :3] = matrix[:, list(order)]
    return magnitude().transpose(*order, 3), matrix


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (2, 1, 0), (1, 2, 0)])
def test_slices_are_told_by_spacing_wherever_they_are(tmp_path: Path, order: tuple[int, int, int]) -> None:
    study = read(save(tmp_path / "p_4d.nii.gz", *permuted(order)))
    np.testing.assert_allclose(images(study), stored(), atol=1e-2)
    assert study.views["sax"].spacing_mm == pytest.approx((8.0, 1.5, 1.4), rel=1e-4)
    assert [note for note in study.notes if "slices lie along" in note] == (
        [] if order[2] == 2 else [f"sax: slices lie along dimension {order.index(2) + 1} of the file"]
    )


def test_closest_canonical_short_axis_with_its_contours(tmp_path: Path) -> None:
    oblique = np.eye(4)
    oblique[:3, :3] = np.array([[-0.92, 0.40, -5.05], [-0.90, -0.35, 5.29], [-0.04, -1.18, -3.25]])
    for name, array in (("p_4d", magnitude()), ("p_seg_4d", coded(classes(), *CHALLENGE))):
        for folder, turn in (("a", lambda image: image), ("b", nibabel.as_closest_canonical)):
            (tmp_path / folder).mkdir(exist_ok=True)
            nibabel.save(turn(nibabel.Nifti1Image(array, oblique)), tmp_path / folder / f"{name}.nii.gz")
    one, other = (read(tmp_path / folder) for folder in "ab")
    assert nibabel.load(tmp_path / "b" / "p_4d.nii.gz").shape[2] > 8  # slices are elsewhere
    np.testing.assert_allclose(images(one), images(other), atol=1e-2)
    np.testing.assert_array_equal(one.views["sax"].segmentation, other.views["sax"].segmentation)
    assert one.labels == pytest.approx(other.labels, rel=1e-5)


def test_doubtful_dimensions_are_refused_and_given_by_the_key(tmp_path: Path) -> None:
    first, time = (2, 1, 0, 3), (0, 1, 3, 2)
    array = magnitude() + np.random.default_rng(1).integers(0, 500, (*hearts.SHAPE[:3], 1)).astype(np.int16)
    nowhere, as_if = np.eye(4), np.diag([1.4, 1.5, 8.0, 1.0])
    for order, matrix, said, axes in (
        (first, nowhere, "cannot tell which dimension", "slice y x t"),
        (first, as_if, "cannot tell which dimension", "slice y x t"),  # sizes of x, y, slice on slice, y, x
        (time, as_if, "are they exchanged", "x y t slice"),
        ((3, 2, 1, 0), nowhere, "cannot tell which dimension", "t slice y x"),
    ):
        path = save(tmp_path / "p_4d.nii.gz", array.transpose(order), matrix)
        with pytest.raises(InputError, match=f"{said}.*ingest.axes="):
            read(path)
        study = read(path, Options(axes=axes))
        np.testing.assert_allclose(images(study), array.transpose(2, 3, 1, 0), atol=1e-2)
    for axes in ("x y slice", "x y z t", "t slice coil ky kx", "x x slice t"):
        with pytest.raises(InputError, match=r"ingest\.axes: expected the names x y slice t"):
            read(path, Options(axes=axes))


def test_unusual_dimensions_that_are_right(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for shape, spacing in (
        ((64, 60, 48, 4), (1.5, 1.5, 1.5)),  # isotropic
        ((64, 60, 30, 2), (1.4, 1.4, 4.0)),
        ((64, 60, 1, 8), (1.4, 1.4, 8.0)),
        ((64, 60, 12, 1), (1.4, 1.4, 10.0)),
        ((30, 64, 20, 3), (2.5, 1.4, 5.0)),  # a crop, with pixels that are not square
        ((8, 8, 8, 30), (1.4, 1.4, 8.0)),
    ):
        array = rng.integers(1, 900, shape).astype(np.int16)
        view = read(save(tmp_path / "p_4d.nii.gz", array, hearts.affine(spacing))).views["sax"]
        assert view.kspace.shape == (shape[2], 1, shape[3], shape[1], shape[0])
        assert view.spacing_mm == pytest.approx(spacing[::-1], rel=1e-4)


# ----------------------------------------------------------------------------------------------- fields that disagree


WIDE = (220, 200, 4, 2)


def spacing_of(path: Path) -> tuple[tuple[float, ...] | None, str]:
    study = read(path)
    return study.views["sax"].spacing_mm, "; ".join(study.notes)


@pytest.mark.parametrize(
    ("affine_mm", "pixdim", "expected", "said"),
    [
        ((1.4, 1.4, 8.0), (1.4, 1.4, 8.0), (8.0, 1.4, 1.4), ""),
        ((1.4, 1.4, 8.0), (1.4001, 1.3999, 8.0), (8.0, 1.4, 1.4), ""),
        ((1.4, 1.4, 8.0), (1.0, 1.0, 1.0), (8.0, 1.4, 1.4), "the affine is taken"),
        ((1.4, 1.4, 8.0), (0.3, 0.3, 8.0), (8.0, 1.4, 1.4), "the affine is taken"),  # 66 mm: no body
        ((4.0, 4.0, 8.0), (1.4, 1.4, 8.0), (8.0, 1.4, 1.4), "pixdim is taken"),  # 880 mm
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), None, "no voxel of a heart"),
    ],
)
def test_the_sizes_that_could_be_a_heart_s_are_taken_and_said(
    tmp_path: Path, affine_mm, pixdim, expected, said: str
) -> None:
    array = np.random.default_rng(0).integers(1, 900, WIDE).astype(np.int16)
    spacing, notes = spacing_of(save(tmp_path / "p_4d.nii", array, hearts.affine(affine_mm), pixdim=pixdim))
    assert spacing == (None if expected is None else pytest.approx(expected, rel=1e-3))
    assert said in notes
    assert bool(said) == bool(notes)


@pytest.mark.parametrize("pixdim", [(1.0, 1.0, 8.0), (1.4, 1.4, 10.0), (1.1, 1.4, 8.0)])
def test_two_sizes_that_both_could_be_are_refused(tmp_path: Path, pixdim: tuple[float, ...]) -> None:
    array = np.random.default_rng(0).integers(1, 900, WIDE).astype(np.int16)
    path = save(tmp_path / "p_4d.nii", array, hearts.affine((1.4, 1.4, 8.0)), pixdim=pixdim)
    with pytest.raises(InputError, match=r"pixdim says .*, the affine 1\.4 x 1\.4 x 8, and both could be"):
        read(path)


@pytest.mark.parametrize(
    ("unit", "factor", "said"),
    [
        ("mm", 1.0, ""), ("unknown", 1.0, ""), ("meter", 1e-3, ""), ("micron", 1e3, ""),
        ("meter", 1.0, "taken as"), ("micron", 1.0, "taken as"), ("mm", 1e-3, "taken as"), ("unknown", 1e3, "taken as"),
    ],
)  # fmt: skip
def test_units_against_sizes(tmp_path: Path, unit: str, factor: float, said: str) -> None:
    sizes = tuple(factor * size for size in hearts.SPACING)
    path = save(tmp_path / "p_4d.nii.gz", magnitude(), hearts.affine(sizes), units=(unit, "sec"))
    save(tmp_path / "p_seg_4d.nii.gz", coded(classes(), *CHALLENGE), hearts.affine(sizes), units=(unit, "sec"))
    study = read(path)
    assert study.views["sax"].spacing_mm == pytest.approx((8.0, 1.5, 1.4), rel=1e-4)
    assert study.labels["lvedv_ml"] == pytest.approx(volume_ml(classes()), rel=1e-3)
    assert said in "; ".join(study.notes)
    assert bool(said) == bool(study.notes)


def test_sizes_of_no_unit_are_unknown(tmp_path: Path) -> None:
    for sizes in ((90.0, 90.0, 800.0), (0.02, 0.02, 0.1)):
        spacing, notes = spacing_of(save(tmp_path / "p_4d.nii", magnitude(), hearts.affine(sizes)))
        assert spacing is None
        assert "spacing unknown" in notes


@pytest.mark.parametrize(
    ("step", "unit", "seconds", "said"),
    [(40.0, "sec", 0.04, True), (0.04, "msec", 0.04, True), (0.04, "sec", 0.04, False), (7.0, "sec", 0.007, True)],
)
def test_time_against_its_unit(tmp_path: Path, step: float, unit: str, seconds: float, said: bool) -> None:
    study = read(save(tmp_path / "p_4d.nii.gz", magnitude(), frame_time=step, units=("mm", unit)))
    assert study.views["sax"].frame_time_s == pytest.approx(seconds)
    assert any("taken as" in note for note in study.notes) == said


def test_pixdim_beside_an_affine_that_knows_nothing(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(magnitude(), np.eye(4))
    image.header.set_zooms((1.4, 1.5, 8.0, 0.04))
    image.header.set_sform(np.eye(4), 1)
    nibabel.save(image, tmp_path / "p_4d.nii")
    spacing, notes = spacing_of(tmp_path / "p_4d.nii")
    assert spacing == pytest.approx((8.0, 1.5, 1.4))
    assert "pixdim is taken" in notes


def test_an_sform_is_believed_before_a_qform_and_said(tmp_path: Path) -> None:
    turned = hearts.affine() @ np.diag([-1.0, -1, 1, 1])
    plain = read(save(tmp_path / "a" / "p_4d.nii", magnitude()))
    for code, said in ((1, True), (0, False)):
        image = nibabel.Nifti1Image(magnitude(), hearts.affine())
        image.header.set_xyzt_units("mm", "sec")
        image.header.set_sform(hearts.affine(), 1)
        image.header.set_qform(turned, code)
        nibabel.save(image, tmp_path / "p_4d.nii")
        study = read(tmp_path / "p_4d.nii")
        np.testing.assert_array_equal(study.views["sax"].kspace, plain.views["sax"].kspace)
        assert any("sform and qform" in note for note in study.notes) == said


def test_could_be() -> None:
    assert geometry.could_be((1.4, 1.4, 8.0), (256, 256, 10))
    assert geometry.could_be((1.0, 1.0, 1.0), (256, 256, 80))
    for sizes in ((1.0, 1.0, 1.0), (0.0, 1.4, 8.0), (float("nan"), 1.4, 8.0), (-1.4, 1.4, 8.0), (1.4, 1.4, 90.0)):
        assert not geometry.could_be(sizes, (256, 256, 10))
