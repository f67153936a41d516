"""NIfTI beyond one short axis: UK Biobank's layout, what the contours say, and headers that lie."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest

from kmtr.config import RunConfig, override
from kmtr.data.affine import flipped
from kmtr.data.dataset.ingest import ingested, table_of
from kmtr.data.sources import Options, discover, read
from kmtr.data.sources.cine import WANTED, orientation, segmentation
from kmtr.physics.fourier import ifft2c
from kmtr.types import UNLABELLED, VIEWS, InputError

SHAPE = (10, 12, 3, 4)  # x y z t


def affine_of(view: str, spacing=(1.5, 1.25, 8.0), shift=(5.0, 6.0, 7.0)) -> np.ndarray:
    """Columns that run as the view's x, y, z want them to, in right-anterior-superior coordinates."""
    z, y, x = WANTED[view]
    affine = np.eye(4)
    affine[:3, :3] = np.stack([x, y, z], 1) * spacing
    affine[:3, 3] = shift
    return affine


def save(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm", "sec")
    if array.ndim == 4:
        image.header.set_zooms((*image.header.get_zooms()[:3], 0.03))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def cine(slices: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 900, (*SHAPE[:2], slices, SHAPE[3])).astype(np.int16)


def drawn(slices: int, values: tuple[int, ...]) -> np.ndarray:
    """Six pixels of the first value in frame 0, three in frame 2; the second around them, the others beside."""
    codes = np.zeros((*SHAPE[:2], slices, SHAPE[3]), np.uint8)
    for t, end in ((0, 8), (2, 5)):
        if len(values) > 1:
            codes[1:4, 1 : end + 1, :, t] = values[1]
        codes[2, 2:end, :, t] = values[0]
        for n, value in enumerate(values[2:]):
            codes[n + 5, 2:end, :, t] = value
    return codes


@pytest.fixture
def biobank(tmp_path: Path) -> Path:
    folder = tmp_path / "1000001"
    for seed, (stem, view) in enumerate(
        (("sa", "sax"), ("la_2ch", "lax_2ch"), ("la_3ch", "lax_3ch"), ("la_4ch", "lax_4ch"))
    ):
        save(folder / f"{stem}.nii.gz", cine(3 if stem == "sa" else 1, seed), affine_of(view))
    for stem, view, slices, values in (
        ("seg_sa", "sax", 3, (1, 2, 3)),
        ("seg_la_2ch", "lax_2ch", 1, (1,)),
        ("seg_la_4ch", "lax_4ch", 1, (1, 2)),
        ("seg4_la_4ch", "lax_4ch", 1, (1, 2, 3, 4, 5)),
    ):
        save(folder / f"{stem}.nii.gz", drawn(slices, values), affine_of(view))
    for stem in ("sa_ED", "seg_sa_ED", "ao", "label_up_sa"):  # beside them, and none of ours
        save(folder / f"{stem}.nii.gz", cine(1, 9) if stem == "ao" else cine(1, 9)[..., 0], affine_of("sax"))
    return folder


def test_biobank_views_and_contours(biobank: Path) -> None:
    (item,) = discover("nifti", str(biobank.parent))
    assert (item.subject, len(item.files)) == ("1000001", 7)
    study = read(item)
    assert tuple(study.views) == VIEWS
    assert {name: view.contoured for name, view in study.views.items()} == {
        "sax": (1, 2, 3), "lax_2ch": (4,), "lax_3ch": None, "lax_4ch": (1, 2, 3, 4, 5),
    }  # fmt: skip
    for seed, name in enumerate(("sax", "lax_2ch", "lax_3ch", "lax_4ch")):
        view = study.views[name]
        expected = cine(3 if name == "sax" else 1, seed).transpose(2, 3, 1, 0)
        np.testing.assert_allclose(np.abs(ifft2c(view.kspace))[:, 0], expected, atol=1e-2)
        assert view.spacing_mm == pytest.approx((8.0, 1.25, 1.5), rel=1e-4)
        assert view.frame_time_s == pytest.approx(0.03)
        if view.segmentation is not None:
            assert (view.segmentation[:, (1, 3)] == UNLABELLED).all()
            np.testing.assert_array_equal(np.unique(view.segmentation[:, 0]), [0, *(view.contoured or ())])
    two = study.views["lax_2ch"].segmentation
    assert two is not None
    assert (two[0, 0] == 4).sum() == 6  # there, 1 is the left atrium
    assert study.labels["lvef_pct"] == pytest.approx(50)
    assert study.labels["lvedv_ml"] == pytest.approx(3 * 6 * 1.5 * 1.25 * 8 / 1000)


def test_biobank_prefers_contours_by_hand(biobank: Path) -> None:
    save(biobank / "label_sa.nii.gz", drawn(3, (1, 2)), affine_of("sax"))
    save(biobank / "label_la_4ch.nii.gz", drawn(1, (1, 2)), affine_of("lax_4ch"))
    study = read(biobank)
    assert study.views["sax"].contoured == (1, 2)
    assert study.views["lax_4ch"].contoured == (4, 5)


def test_biobank_file_by_itself_is_the_same_view(biobank: Path) -> None:
    alone, study = read(biobank / "la_4ch.nii.gz"), read(biobank)
    assert list(alone.views) == ["lax_4ch"]
    assert alone.subject_id == study.subject_id
    np.testing.assert_array_equal(alone.views["lax_4ch"].kspace, study.views["lax_4ch"].kspace)


def test_every_view_has_a_phase_of_its_own(biobank: Path) -> None:
    image = [ifft2c(read(biobank).views[name].kspace)[0, 0, 0] for name in VIEWS]
    phases = [np.angle(i / i[0, 0]) for i in image]
    assert all(np.abs(one - other).max() > 0.05 for n, one in enumerate(phases) for other in phases[:n])


@pytest.mark.parametrize("view", VIEWS)
def test_any_storage_of_a_view_reads_alike(tmp_path: Path, view: str) -> None:
    """Long axes too: flipped or transposed in the file, with the affine that says so."""
    assert orientation(affine_of(view), view) == ((2, 1, 0), (False, False, False))
    array, affine = cine(1, 3), affine_of(view)
    turned = affine.copy()
    turned[:3, 3] += affine[:3, 0] * (array.shape[0] - 1)
    turned[:3, 0] *= -1
    turned[:3, :3] = turned[:3, (1, 0, 2)]
    stem = {"sax": "sa", "lax_2ch": "la_2ch", "lax_3ch": "la_3ch", "lax_4ch": "la_4ch"}[view]
    one = read(save(tmp_path / "1" / f"{stem}.nii", array, affine)).views[view]
    other = read(save(tmp_path / "a" / "1" / f"{stem}.nii", array[::-1].transpose(1, 0, 2, 3), turned)).views[view]
    np.testing.assert_array_equal(one.kspace, other.kspace)
    assert one.spacing_mm == pytest.approx(other.spacing_mm)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("matrix", [None, (7, 14), (16, 5)])
def test_affines_find_every_voxel_in_the_file_again(tmp_path: Path, view: str, matrix: tuple[int, int] | None) -> None:
    """Through any flip and exchange, and a crop or padding of odd or even sizes."""
    array, wanted = cine(3 if view == "sax" else 1, 3), affine_of(view)
    for turn in range(8):
        turned = array
        affine = wanted
        for axis in range(3):
            if turn >> axis & 1:
                turned, affine = np.flip(turned, axis), flipped(affine, axis, array.shape[axis])
        if turn % 2:  # x and y exchanged
            turned, affine = turned.transpose(1, 0, 2, 3), affine[:, [1, 0, 2, 3]]
        stem = {"sax": "sa", "lax_2ch": "la_2ch", "lax_3ch": "la_3ch", "lax_4ch": "la_4ch"}[view]
        path = save(tmp_path / f"{turn}" / "1" / f"{stem}.nii", turned, affine)
        found = read(path, Options(matrix=matrix)).views[view]
        assert found.affine is not None
        stored, image = nibabel.load(path), np.abs(ifft2c(found.kspace))[:, 0]
        voxels = np.stack(np.meshgrid(*(range(n) for n in image.transpose(3, 2, 0, 1).shape[:3]), indexing="ij"), -1)
        voxels = voxels.reshape(-1, 3)
        places = (np.linalg.inv(stored.affine) @ found.affine @ np.c_[voxels, np.ones(len(voxels))].T)[:3].T
        np.testing.assert_allclose(places, places.round(), atol=1e-4)
        inside = ((places.round() >= 0) & (places.round() < turned.shape[:3])).all(1)
        assert inside.sum() == array[..., 0].size if matrix is None else inside.any()
        x, y, z = voxels[inside].T
        at = tuple(places[inside].round().astype(int).T)
        np.testing.assert_allclose(image[z, :, y, x], np.asarray(stored.dataobj)[at], atol=1e-2)


def test_affines_that_nobody_wrote_or_believes_are_unknown(tmp_path: Path) -> None:
    """A library makes one up where the header has none; in metres it is one of millimetres."""
    array, affine = cine(3, 0), affine_of("sax")
    assert read(save(tmp_path / "1" / "sa.nii", array, affine)).views["sax"].affine is not None
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    image.header.set_zooms((1.5, 1.25, 8.0, 0.03))
    nibabel.save(image, tmp_path / "1" / "sa.nii")
    alone = read(tmp_path / "1" / "sa.nii").views["sax"]
    assert (alone.affine, alone.spacing_mm) == (None, pytest.approx((8.0, 1.25, 1.5), rel=1e-4))
    image = nibabel.Nifti1Image(array, np.diag([1e-3, 1e-3, 1e-3, 1]) @ affine)
    image.header.set_xyzt_units("meter", "sec")
    image.header.set_zooms((*image.header.get_zooms()[:3], 0.03))
    nibabel.save(image, tmp_path / "1" / "sa.nii")
    in_metres = read(tmp_path / "1" / "sa.nii").views["sax"].affine
    assert in_metres is not None
    np.testing.assert_allclose(in_metres, affine, rtol=1e-5)


@pytest.mark.parametrize(
    ("pixdim", "kept"), [((1.5, 1.25, 8.0), True), ((1.507, 1.256, 8.0), True), ((2.0, 2.0, 9.0), False)]
)
def test_affines_are_never_stretched_to_other_sizes(
    tmp_path: Path, pixdim: tuple[float, float, float], kept: bool
) -> None:
    """Its origin would move with them; where another size is believed, none is kept."""
    affine = affine_of("sax") if kept else affine_of("sax", spacing=(0.1, 0.1, 0.45))
    affine[:3, 3] = 140.0, 150.0, 160.0
    image = nibabel.Nifti1Image(cine(3, 0), affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][1:5] = (*pixdim, 0.03)
    (tmp_path / "1").mkdir()
    nibabel.save(image, tmp_path / "1" / "sa.nii")
    found = read(tmp_path / "1" / "sa.nii").views["sax"]
    assert found.spacing_mm == pytest.approx(pixdim[::-1], rel=1e-4)
    if kept:
        assert found.affine is not None
        np.testing.assert_allclose(found.affine, affine, atol=1e-4)
    else:
        assert found.affine is None


def test_a_class_that_a_source_never_draws_is_unknown() -> None:
    """Sunnybrook: no right ventricle at all, and no outer contour at end-systole."""
    classes = np.zeros((2, 4, 6, 6), np.uint8)
    classes[:, 0, 1:5, 1:5], classes[:, 0, 2:4, 2:4], classes[:, 2, 2:4, 2:4] = 2, 1, 1
    out, contoured = segmentation(classes, (4, 8))
    assert contoured == (1, 2)
    assert out is not None
    assert out.shape == (2, 4, 4, 8)
    assert [sorted(np.unique(out[:, t])) for t in range(4)] == [[0, 1, 2], [UNLABELLED], [1, UNLABELLED], [UNLABELLED]]
    assert segmentation(np.zeros_like(classes), None) == (None, None)


def test_contours_elsewhere_are_refused(tmp_path: Path) -> None:
    """Same shape, another place: of another patient, or of another series."""
    path = save(tmp_path / "a_4d.nii.gz", cine(3, 0), affine_of("sax"))
    save(tmp_path / "a_seg_4d.nii.gz", drawn(3, (3, 2)), affine_of("sax", shift=(5.0, 9.0, 7.0)))
    with pytest.raises(InputError, match="lie elsewhere"):
        read(path)
    nibabel.save(nibabel.Nifti1Image(drawn(3, (3, 2)), np.eye(4)), tmp_path / "a_seg_4d.nii.gz")  # knows no place
    assert read(path).views["sax"].contoured == (1, 2)


def test_one_unreadable_file_refuses_only_itself(tmp_path: Path, biobank: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "broken.nii.gz").write_bytes(b"no gzip at all")
    items = discover("nifti", str(tmp_path))
    assert [item.subject for item in items] == ["1000001", "broken"]
    assert read(items[0]).views
    with pytest.raises(InputError, match="cannot be read"):
        read(items[1])


def test_a_subject_found_twice_refuses_only_itself(tmp_path: Path) -> None:
    for seed, (folder, name) in enumerate((("a", "1"), ("b", "1"), ("a", "2"))):
        save(tmp_path / folder / f"{name}_4d.nii", cine(1, seed), affine_of("sax"))
    one, two = discover("nifti", str(tmp_path))
    assert read(two).views
    with pytest.raises(InputError, match="2 recordings of this subject"):
        read(one)
    (tmp_path / "a" / "2_4d.nii").unlink()
    with pytest.raises(InputError, match="2 recordings of 1 subjects"):
        discover("nifti", str(tmp_path))


def with_header(path: Path, at: int, layout: str, *values: float) -> Path:
    """Overwrite a field of a NIfTI-1 header."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into(layout, content, at, *values)
    path.write_bytes(gzip.compress(bytes(content)))
    return path


@pytest.mark.parametrize(
    ("at", "layout", "values", "said"),
    [
        (40, "<8h", (4, 30000, 30000, 300, 300, 1, 1, 1), "at most 4 GiB"),
        (40, "<8h", (4, 10, 12, 0, 4, 1, 1, 1), "holds something"),
        (40, "<8h", (4, 10, -12, 3, 4, 1, 1, 1), "holds something|cannot be read"),
        (40, "<8h", (4, 10, 12, 3, 40, 1, 1, 1), "cut short"),
        (40, "<8h", (99, 10, 12, 3, 4, 1, 1, 1), "cannot be read"),
        (70, "<2h", (128, 24), "one number a voxel"),
        (70, "<2h", (9999, 16), "cannot be read"),
        (108, "<f", (2e9,), "claims voxels at byte"),
        (108, "<f", (float("nan"),), "claims voxels at byte"),
        (0, "<i", (7,), "cannot be read"),
    ],
)
def test_headers_that_lie(tmp_path: Path, at: int, layout: str, values: tuple[float, ...], said: str) -> None:
    path = with_header(save(tmp_path / "a_4d.nii.gz", cine(3, 0), affine_of("sax")), at, layout, *values)
    with pytest.raises(InputError, match=said) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_size_that_is_allowed(tmp_path: Path) -> None:
    path = save(tmp_path / "a_4d.nii.gz", cine(3, 0), affine_of("sax"))
    with pytest.raises(InputError, match=r"ingest\.gib"):
        read(path, Options(most_bytes=8 * 1439))
    assert read(path, Options(most_bytes=8 * 1440)).views


def test_labels_of_a_table_go_before_those_of_contours(biobank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = biobank.parent / "labels.csv"
    table.write_text("eid,ef,sex\n1000001,61,1\n1000002,55,0\n")
    keys = {"ingest.labels": str(table), "ingest.columns": "subject=eid lvef_pct=ef male=sex"}
    config = override(RunConfig(), keys)
    items = discover("nifti", str(biobank.parent))
    labels = table_of(config, items)
    assert "labels for 1 of 1 subjects: lvef_pct 1, male 1; the table has 2" in capsys.readouterr().out
    found = ingested(0, items, labels, config, b"kmtr").labels
    assert (found["lvef_pct"], found["male"]) == (61.0, 1.0)
    assert found["lvedv_ml"] == read(biobank).labels["lvedv_ml"]
    with pytest.raises(InputError, match="whose columns these are"):
        table_of(override(RunConfig(), {"ingest.columns": "subject=eid"}), items)
