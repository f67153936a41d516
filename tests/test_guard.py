"""The guard refuses participant data under any name, and large files; sources and documents pass."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io

GUARD = Path(__file__).parents[1] / ".ci" / "guard.py"
MEMBERS = np.zeros((4, 4, 2, 3), np.float32)


def guard(*names: Path | str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(GUARD), *map(str, names)], cwd=cwd, text=True, capture_output=True, timeout=60, check=False
    )


def write_dicom(path: Path) -> None:
    path.write_bytes(b"\0" * 128 + b"DICM" + b"\2\0\0\0UL\4\0" + b"\0" * 64)


def write_nifti(path: Path) -> None:
    path.write_bytes(nib.Nifti1Image(MEMBERS, np.eye(4)).to_bytes())


def write_nifti2(path: Path) -> None:
    path.write_bytes(nib.Nifti2Image(MEMBERS, np.eye(4)).to_bytes())


def write_nifti_gz(path: Path) -> None:
    path.write_bytes(gzip.compress(nib.Nifti1Image(MEMBERS, np.eye(4)).to_bytes()))


def write_mat5(path: Path) -> None:
    with path.open("wb") as file:
        scipy.io.savemat(file, {"kspace": MEMBERS})


def write_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["kspace"] = MEMBERS


def write_mat73(path: Path) -> None:
    with h5py.File(path, "w", userblock_size=512) as file:
        file["kspace"] = MEMBERS
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file")


def write_hdf5_userblock(path: Path) -> None:
    with h5py.File(path, "w", userblock_size=512) as file:
        file["kspace"] = MEMBERS


def write_npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, MEMBERS)


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, kspace=MEMBERS)


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), path)


WRITERS = {
    "DICOM": write_dicom,
    "NIfTI-1": write_nifti,
    "NIfTI-2": write_nifti2,
    "NIfTI-1 in gzip": write_nifti_gz,
    "MATLAB 5": write_mat5,
    "MATLAB 7.3": write_mat73,
    "HDF5": write_hdf5,
    "HDF5 behind a user block": write_hdf5_userblock,
    "NumPy": write_npy,
    "archive with array": write_npz,
    "Parquet": write_parquet,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_content_is_refused_under_an_innocent_name(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / "notes.txt")
    result = guard("notes.txt", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(f"notes.txt: {kind.split(' in ')[0].split(' behind ')[0]} data by its content")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    [
        "a.dcm",
        "a.IMA",
        "a.nii",
        "a.nii.gz",
        "a.mat",
        "a.h5",
        "a.hdf5",
        "a.npy",
        "a.npz",
        "a.dat",
        "a.parquet",
        "a.dat.bak",
    ],
)
def test_name_is_refused_whatever_the_content(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("anything")
    result = guard(name, cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "by its name" in result.stderr


def test_size_limit_is_one_mebibyte(tmp_path: Path) -> None:
    (tmp_path / "fits.txt").write_bytes(b"x" * (1 << 20))
    (tmp_path / "large.txt").write_bytes(b"x" * ((1 << 20) + 1))
    result = guard("fits.txt", "large.txt", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("large.txt: 1.0 MiB")
    assert "fits.txt" not in result.stderr


def test_sources_and_documents_pass(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "README.md").write_text("MATLAB 5.0 and DICM are words\n" * 20)
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"just text"))
    (tmp_path / "link").symlink_to("nowhere")
    result = guard("empty", "README.md", "text.gz", "link", "deleted.py", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


def test_without_arguments_every_tracked_file_is_looked_at(tmp_path: Path) -> None:
    for words in (("init", "-q"), ("add", "tracked one.txt", "code.py")):
        if words[0] == "add":
            write_dicom(tmp_path / "tracked one.txt")
            write_dicom(tmp_path / "untracked.txt")
            (tmp_path / "code.py").write_text("pass\n")
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    result = guard(cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "tracked one.txt: DICOM data by its content: participant data and large files stay out of the repository"
    ]


def test_rows_of_a_study_may_be_committed_where_they_belong_and_small(tmp_path: Path) -> None:
    place = tmp_path / "kmtr/studies/rows/easy"
    place.mkdir(parents=True)
    pq.write_table(pa.table({"R": [4, 8], "place": [0, 1], "dice": [0.5, 0.6]}), place / "row.parquet")
    assert guard("kmtr/studies/rows/easy/row.parquet", cwd=tmp_path).returncode == 0
    (tmp_path / "row.parquet").write_bytes((place / "row.parquet").read_bytes())
    assert guard("row.parquet", cwd=tmp_path).returncode == 1
    pq.write_table(pa.table({"large": np.random.default_rng(0).random(50_000)}), place / "large.parquet")
    (place / "other.parquet").write_bytes(b"something else")
    for name in ("large", "other"):
        refused = guard(f"kmtr/studies/rows/easy/{name}.parquet", cwd=tmp_path)
        assert refused.returncode == 1
        assert "no row of a study: expected Parquet of at most 128 KiB" in refused.stderr
