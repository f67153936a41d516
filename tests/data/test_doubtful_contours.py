"""Contours whose values, shape or place say that they are something else; each kind with what is unusual and right."""

from __future__ import annotations

from pathlib import Path

import hearts
import numpy as np
import pytest
from hearts import classes, coded, magnitude, save, volume_ml

from kmtr.data.sources import Options, anatomy, discover, read
from kmtr.types import InputError

CHALLENGE, VENTRICLES = (3, 2, 1), (1, 2, 3)  # values of LV cavity, myocardium, right ventricle


# -------------------------------------------------------------------------------------------------- what contours mean


@pytest.mark.parametrize(
    ("image", "contours", "values", "told"),
    [
        ("A0S9V9_sa", "A0S9V9_sa_gt", VENTRICLES, False),  # M&Ms: a layout of its own
        ("A0S9V9_sa", "A0S9V9_sa_gt", CHALLENGE, True),
        ("p_4d", "p_seg_4d", CHALLENGE, False),
        ("p_4d", "p_seg_4d", VENTRICLES, True),
        ("p", "p_gt", (2, 1, 3), True),
        ("p", "p_seg", (2, 3, 1), True),
        ("sa", "seg_sa", VENTRICLES, False),
        ("sa", "label_sa", CHALLENGE, True),
    ],
)
def test_values_of_contours_are_told_by_what_surrounds_what(
    tmp_path: Path, image: str, contours: str, values: tuple[int, int, int], told: bool
) -> None:
    path = save(tmp_path / f"{image}.nii.gz", magnitude())
    save(tmp_path / f"{contours}.nii.gz", coded(classes(), *values))
    study = read(path)
    np.testing.assert_array_equal(study.views["sax"].segmentation, classes().transpose(2, 3, 1, 0))
    assert study.labels["lvedv_ml"] == pytest.approx(volume_ml(classes()), rel=1e-4)
    assert study.labels["rvedv_ml"] < study.labels["lvedv_ml"]
    assert [note for note in study.notes if "told by shape" in note] == (
        [f"sax: values of the contours told by shape, against the layout's: {listed(values)}"] if told else []
    )


def listed(values: tuple[int, int, int]) -> str:
    names = dict(zip(values, ("lv_cavity", "lv_myocardium", "rv"), strict=True))
    return ", ".join(f"{value} {names[value]}" for value in sorted(names))


@pytest.mark.parametrize(("cavity", "myocardium"), [(1, 2), (2, 1), (3, 1), (2, 3)])
def test_two_values_are_told_as_well(tmp_path: Path, cavity: int, myocardium: int) -> None:
    path = save(tmp_path / "p_4d.nii.gz", magnitude())
    save(tmp_path / "p_seg_4d.nii.gz", coded(classes(), cavity, myocardium, 0))
    assert read(path).labels["lvedv_ml"] == pytest.approx(volume_ml(classes()), rel=1e-4)


def test_one_value_is_the_layout_s_or_doubtful(tmp_path: Path) -> None:
    path = save(tmp_path / "p_4d.nii.gz", magnitude())
    save(tmp_path / "p_seg_4d.nii.gz", coded(classes(), 3, 0, 0))
    assert read(path).labels["lvedv_ml"] == pytest.approx(volume_ml(classes()), rel=1e-4)
    save(tmp_path / "p_seg_4d.nii.gz", coded(classes(), 1, 0, 0))  # a plain mask of the cavity
    with pytest.raises(InputError, match=r"one value only, 1: .* ingest\.classes=1:rv or 1:lv_cavity"):
        read(path)
    assert read(path, Options(classes="1:lv_cavity")).labels["lvedv_ml"] == pytest.approx(
        volume_ml(classes()), rel=1e-4
    )
    assert read(path, Options(classes="1:rv")).views["sax"].contoured == (3,)


def test_classes_by_the_key(tmp_path: Path) -> None:
    path = save(tmp_path / "p_4d.nii.gz", magnitude())
    drawn = coded(classes(), 50, 100, 150)
    drawn[0, 0, 0, 0] = 200
    save(tmp_path / "p_seg_4d.nii.gz", drawn)
    with pytest.raises(InputError, match=r"values 0, 1, 2, 3, got 50, 100, 150, 200; .*ingest\.classes"):
        read(path)
    with pytest.raises(InputError, match=r"values 0, 1, 50 \(ingest\.classes\), got 100, 150, 200; "):
        read(path, Options(classes="50:lv_cavity,1:rv"))
    key = "50:lv_cavity, 100:lv_myocardium, 150:rv, 200:background"
    np.testing.assert_array_equal(
        read(path, Options(classes=key)).views["sax"].segmentation, classes().transpose(2, 3, 1, 0)
    )


def test_a_scar_in_the_wall_is_no_right_ventricle(tmp_path: Path) -> None:
    """Values as those of EMIDEC: 1 cavity, 2 wall, 3 infarct."""
    path = save(tmp_path / "p_4d.nii.gz", magnitude())
    drawn = np.where(classes() == hearts.RV, 0, classes())
    drawn[55:61, 59:63][drawn[55:61, 59:63] == 2] = 3
    drawn = np.where((drawn == 3).any((0, 1)), drawn, 0).astype(np.uint8)
    save(tmp_path / "p_seg_4d.nii.gz", drawn)
    with pytest.raises(InputError, match="contours of 3 lie within 2 or at 1"):
        read(path)
    said = read(path, Options(classes="1:lv_cavity,2:lv_myocardium,3:lv_myocardium"))
    assert said.views["sax"].contoured == (1, 2)


def test_ventricles_without_a_wall_are_as_their_layout_says(tmp_path: Path) -> None:
    path = save(tmp_path / "p_4d.nii.gz", magnitude())
    drawn = coded(classes(), 3, 0, 1)
    save(tmp_path / "p_seg_4d.nii.gz", drawn)
    study = read(path)
    assert study.labels["lvedv_ml"] == pytest.approx(volume_ml(classes()), rel=1e-4)
    assert any("no myocardium tells" in note for note in study.notes)


def test_whole_numbers_that_a_slope_has_bent(tmp_path: Path) -> None:
    path = save(tmp_path / "p_4d.nii.gz", magnitude())
    save(tmp_path / "p_seg_4d.nii.gz", (coded(classes(), *CHALLENGE) * 1.0001).astype(np.float32))
    assert read(path).views["sax"].contoured == (1, 2, 3)
    save(tmp_path / "p_seg_4d.nii.gz", (coded(classes(), *CHALLENGE) * 0.9).astype(np.float32))
    with pytest.raises(InputError, match="whole values"):
        read(path)


@pytest.mark.parametrize("key", ["1", "1:lv", "x:rv", "1:rv,1:rv", "-1:rv", "300:rv", ","])
def test_a_slip_in_the_key_is_said(key: str) -> None:
    with pytest.raises(InputError, match=r"ingest\.classes: "):
        Options(classes=key)


def test_rings_around_something_else_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "p_4d.nii.gz", magnitude())
    save(tmp_path / "p_seg_4d.nii.gz", coded(classes(shift=12.0), *CHALLENGE))
    with pytest.raises(InputError, match=r"surrounds .* of the LV cavity's outline"):
        read(path)
    said = Options(classes="3:lv_cavity,2:lv_myocardium,1:rv")
    assert read(path, said).views["sax"].contoured == (1, 2, 3)  # somebody looked
    # A hand that trembles, holes of papillary muscles, and a base where the wall is open are right.
    drawn = classes(shift=1.5)
    drawn[55:61, 44:47, :4] = 0
    drawn[60:, :, :2][drawn[60:, :, :2] == 2] = 0
    save(tmp_path / "p_seg_4d.nii.gz", coded(drawn, *CHALLENGE))
    assert read(path).views["sax"].contoured == (1, 2, 3)


@pytest.mark.parametrize(("axes", "said"), [((0,), "in x"), ((1,), "in y"), ((0, 1), "in y and x")])
def test_contours_stored_the_other_way_round_are_refused(tmp_path: Path, axes: tuple[int, ...], said: str) -> None:
    """Nothing in the header shows it: the affine is the image's, or none."""
    path = save(tmp_path / "p_4d.nii.gz", magnitude())
    save(tmp_path / "p_seg_4d.nii.gz", np.flip(coded(classes(), *CHALLENGE), axes))
    with pytest.raises(InputError, match=f"only when turned over {said} "):
        read(path)


@pytest.mark.parametrize("seed", range(3))
def test_images_without_contrast_say_nothing_about_their_contours(tmp_path: Path, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(1, 900, hearts.SHAPE).astype(np.int16)
    path = save(tmp_path / "p_4d.nii.gz", noise)
    save(tmp_path / "p_seg_4d.nii.gz", coded(classes(), *CHALLENGE))
    assert "lvedv_ml" in read(path).labels


def test_dark_blood_is_no_reason_to_refuse(tmp_path: Path) -> None:
    path = save(tmp_path / "p_4d.nii.gz", (1500 - magnitude()).astype(np.int16))
    save(tmp_path / "p_seg_4d.nii.gz", coded(classes(), *CHALLENGE))
    assert "lvedv_ml" in read(path).labels


def test_a_wall_is_counted_by_its_edges() -> None:
    square = np.zeros((7, 7), np.uint8)
    square[1:6, 1:6], square[2:5, 2:5] = 2, 1
    assert anatomy.surrounded(square, 1, 2) == 1.0
    assert anatomy.surrounded(square, 2, 1) == pytest.approx(12 / 32)
    assert anatomy.surrounded(square, 1, 3) == anatomy.surrounded(square, 5, 1) == 0.0
    square[1, 2:5] = 0
    assert anatomy.surrounded(square, 1, 2) == pytest.approx(9 / 12)


# ------------------------------------------------------------------------------------------------------------- layouts


def mnms2(folder: Path, whole: bool = True) -> Path:
    """Subject 017 of M&Ms-2: end-diastole is frame 1 of the cine, end-systole frame 4."""
    for axis in ("SA", "LA"):
        if whole:
            save(folder / f"017_{axis}_CINE.nii.gz", magnitude())
        for name, t in (("ED", 0), ("ES", 3)):
            save(folder / f"017_{axis}_{name}.nii.gz", magnitude()[..., t])
            save(folder / f"017_{axis}_{name}_gt.nii.gz", classes()[..., t])
    return folder


def test_mnms2_finds_its_contoured_frames_in_the_cine(tmp_path: Path) -> None:
    mnms2(tmp_path / "017")
    (item,) = discover("nifti", str(tmp_path))
    assert (item.subject, len(item.files)) == ("017", 10)
    study = read(item)
    assert list(study.views) == ["sax", "lax_4ch"]
    segmentation = study.views["sax"].segmentation
    assert segmentation is not None
    expected = classes().transpose(2, 3, 1, 0)
    expected[:, [1, 2, 4, 5]] = 255
    np.testing.assert_array_equal(segmentation, expected)
    assert study.labels["lvedv_ml"] == pytest.approx(volume_ml(classes()), rel=1e-4)
    assert study.notes == ()
    alone = read(tmp_path / "017" / "017_SA_CINE.nii.gz")
    assert alone.subject_id == study.subject_id
    np.testing.assert_array_equal(alone.views["sax"].kspace, study.views["sax"].kspace)


def test_mnms2_without_the_cine_or_with_another(tmp_path: Path) -> None:
    pair = read(mnms2(tmp_path / "a", whole=False))
    assert pair.views["sax"].kspace.shape[2] == 2
    folder = mnms2(tmp_path / "b")
    save(folder / "017_SA_CINE.nii.gz", magnitude(seed=1))
    other = read(folder)
    assert other.views["sax"].kspace.shape[2] == 2
    assert other.labels == pytest.approx(pair.labels)
    assert other.notes == ("sax: contoured frames that the cine does not have: the cine is left out",)


def test_acdc_frames_counted_from_zero_are_refused(tmp_path: Path) -> None:
    for numbers, said in (((1, 4), ""), ((0, 3), "numbered 0 is frame 1 of the cine")):
        folder = tmp_path / str(numbers[0]) / "patient001"
        save(folder / "patient001_4d.nii.gz", magnitude())
        for number, t in zip(numbers, (0, 3), strict=True):
            save(folder / f"patient001_frame{number:02d}.nii.gz", magnitude()[..., t])
            save(folder / f"patient001_frame{number:02d}_gt.nii.gz", coded(classes(), *CHALLENGE)[..., t])
        if said:
            with pytest.raises(InputError, match=said):
                read(folder)
        else:
            assert read(folder).labels["lvedv_ml"] == pytest.approx(volume_ml(classes()), rel=1e-4)
