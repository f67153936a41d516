"""Bad images for the corpus of `hostile_files`: NIfTI and DICOM."""

from __future__ import annotations

import gzip
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from hostile_files import LARGE, RNG, bad, cut, family, mat, written
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless

# NIfTI

CINE = RNG.integers(1, 900, (16, 18, 3, 4)).astype(np.int16)


def nifti(folder: Path, array: np.ndarray = CINE, name: str = "case_4d.nii.gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.5, 1.5, 8, 1])), folder / name)
    return folder / name


def patched(offset: int, code: str, *values: float, packed: bool = True) -> Callable[[Path], Path]:
    """A NIfTI whose header says something else."""

    def build(folder: Path) -> Path:
        path = nifti(folder, name="case_4d.nii")
        content = bytearray(path.read_bytes())
        struct.pack_into(f"<{code}", content, offset, *values)
        return written(folder / "case_4d.nii.gz", gzip.compress(content)) if packed else written(path, bytes(content))

    return build


@bad("nifti", "cannot be read|extensions|header")
def header_that_inflates(folder: Path) -> Path:
    """A header whose extension is 160 MB of zeros, packed into less than one."""
    head = bytearray(nifti(folder, name="case_4d.nii").read_bytes()[:352])
    (folder / "case_4d.nii").unlink()
    struct.pack_into("<f", head, 108, float(LARGE))
    head[348] = 1
    content = bytes(head) + struct.pack("<ii", LARGE - 352, 0) + bytes(LARGE)
    return written(folder / "case_4d.nii.gz", gzip.compress(content, 1))


@bad("nifti", "shape")
def contours_of_another(folder: Path) -> Path:
    nifti(folder, np.zeros((16, 20, 3, 4), np.uint8), "case_seg_4d.nii.gz")
    return nifti(folder)


def contoured(codes: np.ndarray) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        nifti(folder, codes, "case_seg_4d.nii.gz")
        return nifti(folder)

    return build


def acdc(folder: Path, shapes: list[tuple[int, ...]], group: str = "NOR") -> Path:
    folder = folder / "patient001"
    for number, shape in enumerate(shapes, 1):
        nifti(folder, np.ones(shape, np.int16), f"patient001_frame{number:02d}.nii.gz")
    (folder / "Info.cfg").write_text(f"ED: 1\nES: 2\nGroup: {group}\n")
    return folder


@bad("nifti", "which has no image")
def contours_of_a_missing_frame(folder: Path) -> Path:
    source = acdc(folder, [(8, 8, 2)] * 2)
    nifti(source, np.zeros((8, 8, 2), np.uint8), "patient001_frame07_gt.nii.gz")
    return source


for name, said, build in (
    ("nifti_truncated", "cut short|cannot be read", lambda f: cut(nifti(f, name="case_4d.nii"))),
    ("nifti_gz_truncated", "cut short|cannot be read", lambda f: cut(nifti(f))),
    ("nifti_zero_size", "cannot be read", lambda f: written(f / "case_4d.nii.gz", b"")),
    ("nifti_is_text", "cannot be read", lambda f: written(f / "case_4d.nii", b"voxels" * 99)),
    ("nifti_is_a_mat", "cannot be read", lambda f: mat(f).rename(f / "case_4d.nii")),
    ("nifti_is_no_gzip", "cannot be read", lambda f: nifti(f, name="a_4d.nii").rename(f / "case_4d.nii.gz")),
    ("claims_gigabytes", "raise ingest.gib", patched(40, "8h", 4, 32000, 32000, 900, 99, 1, 1, 1)),
    ("claims_all_dimensions", "4D|raise ingest.gib", patched(40, "8h", 7, *[32767] * 7)),
    ("negative_dimension", "cannot be read|holds something|4D", patched(40, "8h", 4, -16, 18, 3, 4, 1, 1, 1)),
    ("no_frames", "cannot be read|holds something|4D", patched(40, "8h", 4, 16, 18, 3, 0, 1, 1, 1)),
    ("data_far_away", "voxels at byte", patched(108, "f", 1e9)),
    ("data_before_the_header", "cannot be read|extensions|header", patched(108, "f", -352.0)),
    ("unknown_numbers", "cannot be read|numbers", patched(70, "h", 1777)),
    ("scaled_beyond_numbers", "finite|cannot be read", patched(112, "ff", 3e38, 0.0)),
    ("voxels_of_nan", "finite", lambda f: nifti(f, np.full((16, 18, 3, 4), np.nan, np.float32))),
    ("one_volume", "4D", lambda f: nifti(f, CINE[..., 0])),
    ("contours_of_other_values", "values 0, 1, 2, 3", contoured(np.full(CINE.shape, 9, np.uint8))),
    ("contours_of_halves", "values 0, 1, 2, 3|whole", contoured(np.full(CINE.shape, 0.5, np.float32))),
    ("frames_of_two_sizes", "one shape", lambda f: acdc(f, [(8, 8, 2), (8, 9, 2)])),
    ("group_unknown", "expected Group", lambda f: acdc(f, [(8, 8, 2)] * 2, "JANE")),
):  # fmt: skip
    family("nifti", name, said, build)


# DICOM

ROWS, COLUMNS, FRAMES, SLICES = 12, 14, 8, 3


def image(z: int, t: int, **header: Any) -> Dataset:
    """One frame of one slice of a short axis."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", f"1.2.3.{z}.{t}"
    dataset.PatientID, dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "P7", "1.2", "1.2.3"
    dataset.SeriesDescription, dataset.ImageType = "cine sax", ["ORIGINAL", "PRIMARY", "M"]
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = ROWS, COLUMNS, 1
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation, dataset.PhotometricInterpretation = 15, 0, "MONOCHROME2"
    dataset.ImageOrientationPatient, dataset.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 8 * z]
    dataset.PixelSpacing, dataset.SliceThickness = [1.5, 1.5], 8
    dataset.TriggerTime, dataset.InstanceNumber = 40 * t, z * FRAMES + t + 1
    dataset.PixelData = (1 + z + t + np.arange(ROWS * COLUMNS)).astype("<u2").tobytes()
    for name, value in header.items():
        setattr(dataset, name, value)
    return dataset


def save(path: Path, dataset: Dataset, syntax: str = ExplicitVRLittleEndian) -> Path:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def dicom(folder: Path, change: Callable[[int, int], dict[str, Any] | None] = lambda z, t: {}) -> Path:
    """A short axis; `change` alters the header of an image, or leaves it out (None)."""
    for z, t in np.ndindex(SLICES, FRAMES):
        if (fields := change(z, t)) is not None:
            save(folder / f"{z}_{t}.dcm", image(z, t, **fields))
    return folder


def with_file(name: str, content: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    """A short axis, and beside it a file that is made of one of its images."""

    def build(folder: Path) -> Path:
        whole = dicom(folder).joinpath("0_0.dcm").read_bytes()
        (folder / "0_0.dcm").unlink()
        written(folder / name, content(whole))
        return folder

    return build


def nested(depth: int) -> bytes:
    """Sequences in sequences of undefined length."""
    return b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * depth


@bad("dicom", "raise ingest.gib|not supported|cannot be read")
def dicom_that_inflates(folder: Path) -> Path:
    """The deflated transfer syntax: everything after the first group is one zlib stream."""
    whole = save(folder / "a.dcm", image(0, 0), DeflatedExplicitVRLittleEndian).read_bytes()
    start = whole.index(DeflatedExplicitVRLittleEndian.encode()) + len(DeflatedExplicitVRLittleEndian) + 1
    stream = zlib.compressobj(1, zlib.DEFLATED, -15)
    return written(folder / "a.dcm", whole[:start] + stream.compress(bytes(LARGE)) + stream.flush())


@bad("dicom", "raise ingest.gib|cannot be read")
def archive_that_inflates(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("0.dcm", save(folder / "0.dcm", image(0, 0)).read_bytes() + bytes(LARGE))
    return folder / "a.zip"


@bad("dicom", "nothing but zeros|cannot be read")
def run_lengths_that_inflate(folder: Path) -> Path:
    """Run-length encoding of 128 bytes in two, 20,000 times, for an image of 168 pixels."""
    segment = b"\x81\x00" * 20_000
    frame = struct.pack("<16I", 2, 64, 64 + len(segment), *[0] * 13) + segment * 2
    for t in range(FRAMES):
        dataset = image(0, t)
        dataset.PixelData = encapsulate([frame])
        dataset["PixelData"].VR = "OB"
        save(folder / f"{t}.dcm", dataset, RLELossless)
    return folder


@bad("dicom", "archive|cannot be read")
def archive_truncated(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.write(save(folder / "0.dcm", image(0, 0)), "0.dcm")
    return cut(folder / "a.zip")


for name, said, build in (
    ("dicom_truncated_header", "2 patients|cannot be read", with_file("bad.dcm", lambda whole: whole[:300])),
    ("dicom_truncated_pixels", "cannot be read", with_file("bad.dcm", lambda whole: whole[:-50])),
    ("dicom_zero_size", "cannot be read", with_file("bad.dcm", lambda whole: b"")),
    ("dicom_is_text", "cannot be read", with_file("bad.dcm", lambda whole: b"not DICOM" * 99)),
    ("dicom_is_no_archive", "cannot be read", lambda f: written(f / "a.zip", b"PK\3\4" + bytes(500))),
    ("dicom_nested_without_end", "2 patients|cannot be read",
     with_file("bad.dcm", lambda whole: whole[:300] + nested(100_000))),
    ("dicom_claims_a_vast_element", "cannot be read",
     with_file("bad.dcm", lambda whole: whole[:-348] + b"\xe0\x7f\x10\x00OW\0\0\xf0\xff\xff\x7f" + bytes(99))),
    ("dicom_claims_vast_pixels", "raise ingest.gib|cannot be read|at most",
     lambda f: dicom(f, lambda z, t: {"Rows": 65535, "Columns": 65535})),
    ("dicom_claims_many_frames", "at most", lambda f: dicom(f, lambda z, t: {"NumberOfFrames": 2_000_000_000})),
    ("dicom_missing_frame", "equally many frames", lambda f: dicom(f, lambda z, t: None if (z, t) == (1, 3) else {})),
    ("dicom_missing_slice", "irregular distances",
     lambda f: dicom(f, lambda z, t: {"ImagePositionPatient": [0, 0, 3 * z * z]})),
    ("dicom_slice_copied", "two or more at the same",
     lambda f: dicom(f, lambda z, t: {"ImagePositionPatient": [0, 0, 0], "SeriesInstanceUID": "1.2.3"})),
    ("dicom_mixed_spacing", "one size and pixel spacing",
     lambda f: dicom(f, lambda z, t: {"PixelSpacing": [1.5 + z, 1.5]})),
    ("dicom_mixed_sizes", "one size and pixel spacing",
     lambda f: dicom(f, lambda z, t: {"Rows": ROWS // 2, "Columns": 2 * COLUMNS} if z == 1 else {})),
    ("dicom_of_two_patients", "2 patients", lambda f: dicom(f, lambda z, t: {"PatientID": f"P{z % 2}"})),
    ("dicom_spacing_of_nothing", "cannot be read", lambda f: dicom(f, lambda z, t: {"PixelSpacing": [0, 0]})),
):  # fmt: skip
    family("dicom", name, said, build)
