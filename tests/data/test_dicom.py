"""DICOM cine that the test writes itself: how images become slices and frames, views, and what is refused."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kmtr.data.sources import Options, discover, polygons, read, series
from kmtr.data.sources.pseudonyms import pseudonym
from kmtr.physics.fourier import ifft2c
from kmtr.types import UNLABELLED, InputError, Study

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid  # noqa: E402

FRAMES, ROWS, COLUMNS = 8, 12, 10
MR, ENHANCED = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"

# Sunnybrook's short axis (left, posterior, superior): rows run to the lateral wall, columns to the inferior one, the
# normal from apex to base.
SHORT = np.array([[0.712221, 0.701112, -0.0343949], [-0.307716, 0.267798, -0.913015]])
AXIAL = np.array([[1.0, 0.0, 0.0], [0.0, 0.98, 0.199]])
FOUR_CHAMBERS = np.array([[0.707, 0.707, 0.0], [0.577, -0.577, -0.577]])  # to the lateral wall, to the apex

Change = Callable[[Dataset, int, int], Any]


def pixels(z: int, t: int, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """Values that tell slice, frame and pixel."""
    return (1000 * z + 100 * t + np.arange(rows * columns).reshape(rows, columns) % 100 + 1).astype(np.uint16)


def image(z: int = 0, t: int = 0, axes: np.ndarray = SHORT, **header: Any) -> Dataset:
    """One frame of one slice."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = MR, generate_uid()
    dataset.PatientID, dataset.PatientName, dataset.StudyInstanceUID = "P7", "Doe^Jane", "1.2.3"
    dataset.SeriesInstanceUID, dataset.SeriesNumber, dataset.SeriesDescription = "1.2.3.4", 4, "cine"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    dataset.Manufacturer, dataset.MagneticFieldStrength, dataset.InstitutionName = "SIEMENS", "1.5", "Hospital"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = ROWS, COLUMNS, 1
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation, dataset.PhotometricInterpretation = 15, 0, "MONOCHROME2"
    dataset.ImageOrientationPatient = [f"{v:.6f}" for v in axes.ravel()]
    dataset.ImagePositionPatient = [f"{v:.4f}" for v in (1, 2, 3) - 8.0 * z * np.cross(*axes)]
    dataset.PixelSpacing, dataset.SliceThickness = ["1.5", "1.25"], "6"
    dataset.TriggerTime, dataset.InstanceNumber = f"{10 + 40 * t}", z * FRAMES + t + 1
    dataset.PixelData = pixels(z, t).tobytes()
    for name, value in header.items():
        setattr(dataset, name, value) if value is not None else delattr(dataset, name)
    return dataset


def save(path: Path, dataset: Dataset, syntax: str = ExplicitVRLittleEndian) -> Path:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def write(folder: Path, datasets: Iterable[Dataset], start: int = 0) -> Path:
    """Under names that say nothing: in a scrambled order."""
    for n, dataset in enumerate(datasets, start):
        save(folder / f"{(n * 7919) % 10007}.dcm", dataset)
    return folder


def stack(slices: int = 3, frames: int = FRAMES, **header: Any) -> list[Dataset]:
    return [image(z, t, **header) for z in range(slices) for t in range(frames)]


def magnitude(study: Study, view: str = "sax") -> np.ndarray:
    return np.abs(ifft2c(study.views[view].kspace))[:, 0]


def short_axis(slices: int = 3) -> np.ndarray:
    """``slice t y x`` of `stack`."""
    return np.stack([[pixels(z, t) for t in range(FRAMES)] for z in range(slices)])


def test_slices_by_position_and_frames_by_trigger_time(tmp_path: Path) -> None:
    """Instance numbers, file names and the order of series say something else, and do not count."""
    rng = np.random.default_rng(0)
    datasets = stack()
    for dataset in datasets:
        dataset.InstanceNumber = int(rng.integers(1, 10_000))
    study = read(write(tmp_path, [datasets[n] for n in rng.permutation(len(datasets))]))
    view = study.views["sax"]
    np.testing.assert_allclose(magnitude(study), short_axis(), atol=1e-2)
    assert view.spacing_mm == pytest.approx((8.0, 1.5, 1.25), rel=1e-4)
    assert view.frame_time_s == pytest.approx(0.04)
    assert view.segmentation is None
    # x grows with the column, y with the row, slices from the base; left and posterior are right and anterior.
    assert view.affine is not None
    right = np.array([-1, -1, 1])[:, None]
    columns = np.stack([1.25 * SHORT[0], 1.5 * SHORT[1], -8.0 * np.cross(*SHORT), (1, 2, 3)], 1)
    np.testing.assert_allclose(view.affine[:3], right * columns, atol=1e-3)
    assert (study.vendor, study.field_strength_t) == ("Siemens", 1.5)
    assert study.subject_id == pseudonym("P7", b"kmtr")


@pytest.mark.parametrize(("millimetres", "kept"), [(0.0, True), (0.5, True), (20.0, False)])
def test_slices_that_lie_on_no_line_have_no_place(tmp_path: Path, millimetres: float, kept: bool) -> None:
    """One slice of three is planned anew, beside the others in its plane."""
    datasets = stack()
    for dataset in datasets[FRAMES : 2 * FRAMES]:
        moved = np.array(dataset.ImagePositionPatient, float) + millimetres * SHORT[0]
        dataset.ImagePositionPatient = [f"{v:.4f}" for v in moved]
    study = read(write(tmp_path, datasets))
    assert (study.views["sax"].affine is not None) == kept
    assert any("slices are not on one line" in note for note in study.notes) != kept


def test_nothing_that_identifies_is_kept(tmp_path: Path) -> None:
    study = read(write(tmp_path / "Jane", stack(Manufacturer="St. Mary's MRI of Jane Doe")))
    assert not any(word in repr(study).lower() for word in ("jane", "doe", "p7", "hospital", "mary", "1.2.3"))


def test_rescale_by_each_image(tmp_path: Path) -> None:
    datasets = stack(1)
    for t, dataset in enumerate(datasets):
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{0.5 + t}", f"{t}"
    expected = np.stack([pixels(0, t) * (0.5 + t) + t for t in range(FRAMES)])[None]
    np.testing.assert_allclose(magnitude(read(write(tmp_path, datasets))), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("axes", [SHORT * [[-1], [1]], SHORT[::-1], -SHORT])
def test_storage_does_not_matter(tmp_path: Path, axes: np.ndarray) -> None:
    """The same slab scanned with its rows and columns exchanged or turned reads as the same images."""
    direction = -np.cross(*SHORT)
    datasets = []
    for z in range(3):
        for t in range(FRAMES):
            dataset = image(z, t, axes)
            seen = pixels(z, t)
            if abs(axes[0] @ SHORT[0]) < 0.5:
                seen = seen.T
                dataset.Rows, dataset.Columns, dataset.PixelSpacing = COLUMNS, ROWS, ["1.25", "1.5"]
            along = [axis for axis, row in ((1, axes[0]), (0, axes[1])) if max(row @ SHORT.T, key=abs) < 0]
            dataset.PixelData = np.flip(seen, along).tobytes()
            dataset.ImagePositionPatient = [f"{v:.4f}" for v in 8.0 * z * direction]
            datasets.append(dataset)
    study = read(write(tmp_path, datasets))
    np.testing.assert_allclose(magnitude(study), short_axis(), atol=1e-2)
    assert study.views["sax"].spacing_mm == pytest.approx((8.0, 1.5, 1.25), rel=1e-4)


def test_views_by_description_or_orientation(tmp_path: Path) -> None:
    """UK Biobank's names; other series of the same planes, and long axes without a name, are left out."""
    series = [(f"CINE_segmented_SAX_b{z}", [image(z, t) for t in range(FRAMES)]) for z in range(3)]
    for name in ("CINE_segmented_LAX_2Ch", "CINE_segmented_LAX_4Ch", "cine long axis"):
        series.append((name, [image(0, t, FOUR_CHAMBERS) for t in range(FRAMES)]))
    series.append(("CINE_segmented_SAX_InlineVF", [image(z, t) for z in range(3) for t in range(FRAMES)]))
    series.append(("T1_map_SAX", [image(z, t) for z in range(4) for t in range(FRAMES)]))
    series.append(("stack", [image(z, t, AXIAL) for z in range(5) for t in range(FRAMES)]))
    for number, (name, datasets) in enumerate(series):
        for dataset in datasets:
            dataset.SeriesDescription, dataset.SeriesNumber = name, number
            dataset.SeriesInstanceUID = f"1.2.3.{number}"
        write(tmp_path / name, datasets)
    study = read(tmp_path)
    assert list(study.views) == ["sax", "lax_2ch", "lax_4ch"]
    np.testing.assert_allclose(magnitude(study), short_axis(), atol=1e-2)
    # Rows of the four-chamber images run to the lateral wall, its columns to the apex: turned, they run to the base.
    np.testing.assert_allclose(magnitude(study, "lax_4ch")[0, 0], pixels(0, 0)[::-1], atol=1e-2)
    assert study.views["lax_4ch"].spacing_mm == pytest.approx((6.0, 1.5, 1.25))  # of one slice: its thickness
    assert not np.allclose(study.views["lax_4ch"].kspace, study.views["lax_2ch"].kspace[:, :, :, ::-1])


def test_the_last_complete_scan_of_a_slice_counts(tmp_path: Path) -> None:
    """Slice 1 was scanned three times; the last was broken off."""
    datasets = stack()
    for number, frames, bias in ((5, FRAMES, 500), (6, FRAMES - 3, 700)):
        for t in range(frames):
            again = image(1, t, SeriesNumber=number, SeriesInstanceUID=f"1.2.3.{number}")
            again.PixelData = (pixels(1, t) + np.uint16(bias)).tobytes()
            datasets.append(again)
    expected = short_axis()
    expected[1] += 500
    np.testing.assert_allclose(magnitude(read(write(tmp_path, datasets))), expected, atol=1e-2)


def test_other_images_are_left_out(tmp_path: Path) -> None:
    """Phase images, colour, scouts, reports, and files of macOS and of the medium beside the images."""
    datasets = stack()
    datasets += [image(z, t, ImageType=["ORIGINAL", "PRIMARY", "P"]) for z in range(3) for t in range(FRAMES)]
    datasets += [image(0, 0, SamplesPerPixel=3), image(0, 0, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")]
    datasets += [image(z, 0, SeriesDescription="scout_sa", TriggerTime=None, InstanceNumber=None) for z in range(3)]
    write(tmp_path / "a", datasets)
    (tmp_path / "a" / "._1.dcm").write_bytes(b"macOS")
    (tmp_path / "a" / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "a" / "readme.txt").write_text("x")
    save(tmp_path / "b" / "x.dcm", image(0, 0)).rename(tmp_path / "b" / "1.2.840.1234")  # named by a UID
    np.testing.assert_allclose(magnitude(read(tmp_path / "a")), short_axis(), atol=1e-2)
    assert len(discover("dicom", str(tmp_path))[0].files) == 2


def test_order_without_trigger_times(tmp_path: Path) -> None:
    """A place holder that is the same everywhere is no time: instance numbers then tell."""
    for name, trigger in (("none", None), ("zero", "0")):
        study = read(write(tmp_path / name, stack(TriggerTime=trigger)))
        np.testing.assert_allclose(magnitude(study), short_axis(), atol=1e-2)
        assert study.views["sax"].frame_time_s is None


def test_run_length_encoding(tmp_path: Path) -> None:
    datasets = stack(1)
    for dataset in datasets:
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.compress(RLELossless, generate_instance_uid=False)
        save(tmp_path / f"{dataset.InstanceNumber}.dcm", dataset, dataset.file_meta.TransferSyntaxUID)
    np.testing.assert_allclose(magnitude(read(tmp_path)), short_axis(1), atol=1e-2)


def test_enhanced_multi_frame(tmp_path: Path) -> None:
    """One file with all slices and frames, their geometry, times and rescaling in functional groups."""
    dataset = image(SOPClassUID=ENHANCED, NumberOfFrames=str(3 * FRAMES), NominalInterval=800)
    for name in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "TriggerTime", "SliceThickness"):
        delattr(dataset, name)

    def group(**sequences: dict[str, Any]) -> Dataset:
        outer = Dataset()
        for name, values in sequences.items():
            inner = Dataset()
            for keyword, value in values.items():
                setattr(inner, keyword, value)
            setattr(outer, name, [inner])
        return outer

    order = [(z, t) for t in range(FRAMES) for z in (2, 0, 1)]
    dataset.SharedFunctionalGroupsSequence = [
        group(
            PlaneOrientationSequence={"ImageOrientationPatient": image().ImageOrientationPatient},
            PixelMeasuresSequence={"PixelSpacing": ["1.5", "1.25"], "SliceThickness": "6"},
            PixelValueTransformationSequence={"RescaleSlope": "2", "RescaleIntercept": "1"},
        )
    ]
    dataset.PerFrameFunctionalGroupsSequence = [
        group(
            PlanePositionSequence={"ImagePositionPatient": image(z).ImagePositionPatient},
            CardiacSynchronizationSequence={"NominalCardiacTriggerDelayTime": 10.0 + 40 * t},
        )
        for z, t in order
    ]
    dataset.PixelData = b"".join(pixels(z, t).tobytes() for z, t in order)
    study = read(save(tmp_path / "one.dcm", dataset))
    np.testing.assert_allclose(magnitude(study), 2 * short_axis() + 1, rtol=1e-5, atol=2e-2)
    assert study.views["sax"].frame_time_s == pytest.approx(0.04)
    assert study.labels == {"heart_rate_bpm": 75.0}


# Subjects


def test_subjects_by_patient_or_by_folder(tmp_path: Path) -> None:
    """Several folders of one patient are one subject; without a patient id the folder names it."""
    write(tmp_path / "x" / "sax", stack())
    write(tmp_path / "x" / "lax", [image(0, t, FOUR_CHAMBERS, SeriesDescription="2ch") for t in range(FRAMES)])
    nameless = stack(PatientID="")
    for dataset in nameless:
        dataset.PixelData = (np.frombuffer(dataset.PixelData, np.uint16) + np.uint16(7)).tobytes()
    write(tmp_path / "1002" / "cine", nameless)
    write(tmp_path / "y1", stack(PatientID="P8"))
    write(tmp_path / "y2", stack(PatientID="P8", StudyInstanceUID="1.2.9"))
    items = discover("dicom", str(tmp_path))
    assert [(item.subject, len(item.files)) for item in items] == [("1002", 1), ("P7", 2), ("P8", 2)]
    assert list(read(items[1]).views) == ["sax", "lax_2ch"]
    with pytest.raises(InputError, match="2 studies"):
        read(items[2])


def test_uk_biobank_archives(tmp_path: Path) -> None:
    """Long and short axes of the first visit make one study, named by the participant."""
    plain = write(tmp_path / "plain", stack(PatientID="scanner"))
    header = {"SeriesDescription": "CINE_segmented_LAX_4Ch", "PatientID": "scanner's code of another day"}
    long = [image(0, t, FOUR_CHAMBERS, **header) for t in range(FRAMES)]
    for name, datasets in (("1000001_20209_2_0", stack()), ("1000001_20208_2_0", long), ("1000001_20209_3_0", long)):
        folder = write(tmp_path / "out" / name, datasets)
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("manifest.cvs", "filename,series discription\n")
            for path in folder.iterdir():
                archive.write(path, path.name)
    items = discover("dicom", str(tmp_path / "1000001_20209_2_0.zip"))
    assert items[0].subject == "1000001"
    (tmp_path / "zips").mkdir()
    for path in tmp_path.glob("*.zip"):
        path.rename(tmp_path / "zips" / path.name)
    (item,) = discover("dicom", str(tmp_path / "zips"))
    assert [path.name for path in item.files] == ["1000001_20208_2_0.zip", "1000001_20209_2_0.zip"]
    study = read(item)
    assert list(study.views) == ["sax", "lax_4ch"]
    np.testing.assert_allclose(magnitude(study), magnitude(read(plain)), atol=1e-2)
    with pytest.raises(InputError, match=r"ingest\.gib"):
        read(item, Options(most_bytes=4000))


# Contours


def contour(folder: Path, number: int, kind: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"IM-0001-{number:04d}-{kind}contour-manual.txt").write_text(text)


SQUARE, CORE = "2.5 2.5\n8.5 2.5\n8.5 9.0\n2.5 9.0\n", "4 4\n6 4\n6 6\n4 6\n"


def test_polygons_cover_their_outline() -> None:
    points = np.array([line.split() for line in SQUARE.splitlines()], float)
    expected = np.zeros((ROWS, COLUMNS), bool)
    expected[2:10, 2:9] = True
    np.testing.assert_array_equal(polygons.filled(points, (ROWS, COLUMNS)), expected)


def test_contours_of_the_subject_and_of_no_other(tmp_path: Path) -> None:
    write(tmp_path / "images", stack())
    (tmp_path / "patients.csv").write_text("PatientID,Age,OriginalID\nP7,60,SC-1\n")
    contour(tmp_path / "contours" / "SC-1" / "i", 9 + 2, "i", CORE)  # slice 1, frame 2
    contour(tmp_path / "contours" / "SC-1" / "o", 9 + 2, "o", SQUARE)
    contour(tmp_path / "contours" / "SC-1" / "i", 9 + 5, "i", "4 4\n5 4\n5 5\n4 5\n")
    contour(tmp_path / "contours" / "SC-2" / "i", 9 + 3, "i", CORE)
    study = read(tmp_path, format="dicom")
    view = study.views["sax"]
    assert view.segmentation is not None
    assert view.contoured == (1, 2)
    assert [(view.segmentation[1, 2] == c).sum() for c in (1, 2)] == [9, 56 - 9]
    assert (view.segmentation[0, 2] == 0).all()
    # No outer contour in frame 5: what is beside the cavity may be myocardium. No contour at all in the others.
    assert sorted(np.unique(view.segmentation[:, 5])) == [1, UNLABELLED]
    assert (view.segmentation[:, (0, 1, 3, 4, 6, 7)] == UNLABELLED).all()
    voxel_ml = 8.0 * 1.5 * 1.25 / 1000
    assert study.labels["lvedv_ml"] == pytest.approx(9 * voxel_ml, rel=1e-4)
    assert study.labels["lvesv_ml"] == pytest.approx(4 * voxel_ml, rel=1e-4)
    assert study.labels["lvm_g"] == pytest.approx(47 * voxel_ml * 1.05, rel=1e-4)


@pytest.mark.parametrize(
    ("number", "text", "said"),
    [
        (99, CORE, "contours of image 99"),
        (1, "1 2\n3 4\n", "three or more lines"),
        (1, "a b\n" * 4, "three or more lines"),
        (1, "1 2 3\n" * 4, "three or more lines"),
        (1, "nan 1\n" * 4, "three or more lines"),
        (1, "4 4\n400 4\n4 400\n", "leaves the image"),
        (1, "1 1\n" * 300_000, "three or more lines"),
    ],
)
def test_contours_that_do_not_fit(tmp_path: Path, number: int, text: str, said: str) -> None:
    contour(write(tmp_path, stack(1)), number, "i", text)
    with pytest.raises(InputError, match=said) as caught:
        read(tmp_path, format="dicom")
    assert "\n" not in str(caught.value)


def box(left: int, top: int, size: int = 6) -> str:
    """A square of 7 x 7 pixels; `CORE` has 3 x 3 at (4, 4)."""
    right, bottom = left + size, top + size
    return f"{left} {top}\n{right} {top}\n{right} {bottom}\n{left} {bottom}\n"


@pytest.mark.parametrize(("outer", "said"), [(box(2, 5), "33%"), (box(0, 0, 4), "89%"), (box(0, 0, 2), "100%")])
def test_an_outer_contour_that_is_not_around_the_inner_one(tmp_path: Path, outer: str, said: str) -> None:
    """As in published copies of Sunnybrook, where a subject has outer contours of another."""
    contour(write(tmp_path, stack(1)), 2, "i", CORE)
    contour(tmp_path, 2, "o", outer)
    with pytest.raises(InputError, match=f"{said} of an inner contour lies outside of the outer one"):
        read(tmp_path, format="dicom")


def test_contours_that_touch_or_that_come_alone_are_right(tmp_path: Path) -> None:
    contour(write(tmp_path, stack(3)), 2, "i", CORE)
    contour(tmp_path, 2, "o", box(3, 2))  # the wall is thin at one side
    contour(tmp_path, 4, "i", CORE)  # end-systole
    contour(tmp_path, 9 + 2, "o", box(3, 3))  # apex without a cavity
    contour(tmp_path, 17 + 2, "i", CORE)
    assert read(tmp_path, format="dicom").views["sax"].contoured == (1, 2)


def test_the_same_contours_under_two_subjects_are_nobody_s(tmp_path: Path) -> None:
    for n, name in enumerate(("P1", "P2", "P3")):
        datasets = stack(1, PatientID=name)
        for t, dataset in enumerate(datasets):
            dataset.PixelData = (pixels(0, t) + np.uint16(17 * n)).tobytes()
        contour(write(tmp_path / name, datasets), 2, "i", CORE)
        contour(tmp_path / name, 3, "i", CORE.replace("4", "3") if name == "P3" else CORE.replace("4", "5"))
    contour(tmp_path / "P3", 2, "i", CORE.replace("6", "7"))
    items = discover("dicom", str(tmp_path))
    assert [bool(item.problem) for item in items] == [True, True, False]
    with pytest.raises(InputError, match=r"subjects 1, 2 of 3 .* the same contours: whose are they"):
        read(items[0])


def test_the_same_images_under_two_patients_are_one_person(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(1, 900, (ROWS, COLUMNS)).astype(np.uint16) for _ in range(FRAMES)]
    for name in ("P1", "P2", "P3"):
        datasets = stack(1, PatientID=name, StudyInstanceUID=f"1.2.{name[1]}")
        for t, dataset in enumerate(datasets):
            dataset.PixelData = (noise[t] + np.uint16(name == "P2")).tobytes()
        write(tmp_path / name, datasets)
    items = discover("dicom", str(tmp_path))
    assert [bool(item.problem) for item in items] == [False, False, True]
    assert items[2].problem.startswith("the same images as subject 1 of 3")


# Refusals


REFUSED: dict[str, tuple[Callable[[], list[Dataset]], str]] = {
    "a frame is missing": (lambda: stack()[:-1], r"equally many frames, got \[7, 8\]"),
    "a slice is missing": (
        lambda: [d for d in stack(5) if not 2 * FRAMES < d.InstanceNumber <= 3 * FRAMES],
        "irregular",
    ),
    "an image twice": (lambda: [*stack(), image(1, 3)], "same"),
    "no order": (lambda: stack(TriggerTime=None, InstanceNumber=None), "tells their order"),
    "two visits": (lambda: [*stack(), image(StudyInstanceUID="1.2.9")], "2 studies"),
    "two patients": (lambda: [*stack(), image(PatientID="P8")], "2 patients"),
    "too few frames": (lambda: stack(frames=5), "at least 8 frames"),
    "a long axis without a name": (lambda: [image(0, t, FOUR_CHAMBERS) for t in range(FRAMES)], "description names"),
    "no MR": (lambda: stack(SOPClassUID="1.2.840.10008.5.1.4.1.1.2"), "0 MR images"),
    "no geometry": (lambda: stack(ImageOrientationPatient=None), "0 MR images"),
    "crooked axes": (lambda: stack(ImageOrientationPatient=["1", "0", "0", "1", "0", "0"]), "cannot be read"),
    "no pixels": (lambda: stack(PixelData=None), "cannot be read"),
    "too few pixels": (lambda: stack(PixelData=b"\1" * 100), "cannot be read"),
    "only zeros": (lambda: stack(PixelData=bytes(2 * ROWS * COLUMNS)), "nothing but zeros"),
    "huge claims": (lambda: stack(NumberOfFrames="9999999", Rows=65535, Columns=65535), "at most 4 GiB"),
    "many frames": (lambda: stack(NumberOfFrames="99999"), "at most 10000 frames"),
    "infinite slope": (lambda: stack(RescaleSlope="1e999"), "cannot be read|finite"),
    "slices of no size": (lambda: stack(Rows=0), "holds something"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals_are_one_line_without_identity(tmp_path: Path, name: str) -> None:
    make, said = REFUSED[name]
    write(tmp_path / "Jane", make())
    (item,) = discover("dicom", str(tmp_path))
    with pytest.raises(InputError, match=said) as caught:
        read(item)
    message = str(caught.value)
    assert message.startswith("p-")
    assert "\n" not in message
    assert not any(word in message for word in ("Jane", "Doe", "P7", "P8", ".dcm"))


def test_more_orientations_than_a_scan_has() -> None:
    """As a hostile file may claim, whose sorting would never end."""
    turns = np.linspace(0, np.pi, 300)
    axes = [np.array([[np.cos(a), np.sin(a), 0], [0, 0, 1]]) for a in turns]
    found = [frame for a in axes for frame in series.frames(image(axes=a), 1)[0]]
    with pytest.raises(InputError, match="more than 200 orientations"):
        series.views([replace(frame, shape=(n, n)) for n, frame in enumerate(found)], "x")


def test_damaged_files(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.dcm", image()).read_bytes()
    syntax = ExplicitVRLittleEndian.encode()
    damaged = {
        "empty": b"",
        "junk": b"not DICOM at all" * 50,
        "cut in the header": whole[:300],
        "cut in the pixels": whole[:-50],
        "deflated": whole.replace(syntax + b"\0", b"1.2.840.10008.1.2.1.99"),
        "compressed": whole.replace(syntax + b"\0", b"1.2.840.10008.1.2.4.70"),
    }
    for name, content in damaged.items():
        folder = write(tmp_path / name, stack(1))
        (folder / "bad.dcm").write_bytes(content)
        with pytest.raises(InputError) as caught:
            read(folder)
        assert "\n" not in str(caught.value), name
    bad = tmp_path / "1_20209_2_0.zip"
    for content in (b"PK no", b""):
        bad.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            read(bad)
    for source in (tmp_path / "none", bad.with_suffix(".txt")):
        source.mkdir() if not source.suffix else source.write_text("x")
        with pytest.raises(InputError):
            discover("dicom", str(source))
