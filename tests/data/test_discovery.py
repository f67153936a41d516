"""Looking for subjects: a file that cannot be read is one subject's, and what nobody reads is counted."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydicom")
from raw_files import lines_of, write_ismrmrd, write_mat73, xml_header
from test_dicom import CORE, contour, stack, write
from test_sources import save_nifti

from kmtr.data.sources import Options, discover, read, unused
from kmtr.physics.fourier import fft2c
from kmtr.types import InputError

UNREADABLE = Path("/proc/self/mem")
"""Opens, and cannot be read from its beginning, whoever asks: as a file on a broken disk."""

BAD = {"nifti": "P2/b_4d.nii", "cmrxrecon": "P2/cine_sax.mat", "ismrmrd": "P2/sax.h5", "dicom": "P2/1.dcm"}


def good(format: str, folder: Path) -> Path:
    """A folder with one subject whose files are right."""
    rng = np.random.default_rng(0)
    if format == "nifti":
        save_nifti(folder / "P1" / "a_4d.nii.gz", rng.integers(1, 900, (8, 8, 1, 2)).astype(np.int16))
    elif format == "dicom":
        write(folder / "P1", stack(1))
    else:
        kspace = fft2c((1 + rng.random((1, 1, 2, 12, 16))).astype(np.complex64))
        if format == "cmrxrecon":
            write_mat73(folder / "P1" / "cine_sax.mat", "kspace_full", kspace[0, 0, 0])
        else:
            write_ismrmrd(folder / "P1" / "sax.h5", xml_header((12, 16)), lines_of(kspace))
    return folder


@pytest.mark.skipif(not UNREADABLE.exists(), reason="no /proc")
@pytest.mark.parametrize("format", list(BAD))
def test_a_file_that_cannot_be_read_is_one_subject_s(tmp_path: Path, format: str) -> None:
    bad = good(format, tmp_path) / BAD[format]
    bad.parent.mkdir()
    bad.symlink_to(UNREADABLE)
    one, other = discover(format, str(tmp_path))
    if "P1" not in str(one.files):
        one, other = other, one
    assert read(one).views
    with pytest.raises(InputError, match="cannot be read") as caught:
        read(other)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("format", "called"),
    [
        ("nifti", "layouts.open_image"),
        ("nifti", "layouts._is_part"),
        ("ismrmrd", "hdf5.opened"),
        ("dicom", "dicom._beginning"),
        ("dicom", "dicom._identity"),
        ("dicom", "dicom._alias_table"),
    ],
)
def test_what_a_library_raises_ends_no_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, called: str
) -> None:
    good(format, tmp_path)
    (tmp_path / "table.csv").write_text("PatientID,OriginalID\nP1,S1\n")
    (tmp_path / "P1" / "no_ending").write_bytes(b"x")

    def fails(*_: object) -> None:
        raise RecursionError("deep inside of a library")

    importlib.import_module(f"kmtr.data.sources.{format}")  # first imported now, it would keep what is put in place
    monkeypatch.setattr(f"kmtr.data.sources.{called}", fails)
    items = discover(format, str(tmp_path))
    assert len(items) == 1
    assert len(unused(format, str(tmp_path), items)) == (format == "dicom")


@pytest.mark.parametrize("format", list(BAD))
def test_folders_called_as_files_are_no_subjects(tmp_path: Path, format: str) -> None:
    (good(format, tmp_path) / BAD[format]).mkdir(parents=True)
    assert len(discover(format, str(tmp_path))) == 1


def names(folder: Path) -> dict[str, set[str]]:
    """Reason -> names of the files that no subject of DICOM reads."""
    paths = sorted(folder.rglob("*"), key=str)
    left = unused("dicom", str(folder), discover("dicom", str(folder)))
    return {files.reason: {paths[n - 1].name for n in files.files} for files in left}


def test_dicom_contours_of_nobody_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "images", stack(1))
    (tmp_path / "patients.csv").write_text("PatientID,OriginalID\nP7,SC-1\n")
    contour(tmp_path / "contours" / "SC-1" / "i", 2, "i", CORE)
    contour(tmp_path / "contours" / "SC-2" / "i", 3, "i", CORE)
    contour(tmp_path / "contours" / "SC-2" / "o", 4, "o", CORE)
    polygons = {"IM-0001-0003-icontour-manual.txt", "IM-0001-0004-ocontour-manual.txt"}
    assert names(tmp_path) == {"contours of nobody whose images are there": polygons}


def test_other_files_beside_dicom_images_are_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "images", stack(1))
    (folder / "below").mkdir()
    for name in ("IM_0001", "mask.nii.gz", ".1.dcm", "below/report.png", "notes.txt", "DICOMDIR"):
        (folder / name).write_bytes(b"no image")
    contour(folder / "below", 2, "i", CORE)
    assert names(tmp_path) == {
        "files that hold no DICOM image": {"IM_0001", "mask.nii.gz", "report.png"},
        "hidden files": {".1.dcm"},
    }


def test_archives_of_a_later_visit_are_counted(tmp_path: Path) -> None:
    for name in ("1001_20209_2_0.zip", "1001_20209_3_0.zip", "1001_20208_2_0.zip", "1001_20208_2_1.zip"):
        (tmp_path / name).write_bytes(b"x")
    later = {"1001_20209_3_0.zip", "1001_20208_2_1.zip"}
    assert names(tmp_path) == {"archives of a later visit, or a second one of a visit": later}


@pytest.mark.parametrize("format", list(BAD))
def test_what_no_shard_can_hold_is_refused_by_its_shape(tmp_path: Path, format: str) -> None:
    (item,) = discover(format, str(good(format, tmp_path)))
    with pytest.raises(InputError, match=r"less than 2 GiB of k-space as stored"):
        read(item, Options(matrix=(1 << 15, 1 << 14), dtype="float32"))
