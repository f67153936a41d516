"""Keeps participant data and large files out of the repository: ``python .ci/guard.py [FILE ...]``.

Without arguments it looks at every file that git tracks. A file is refused for its name (image, k-space and array
formats), for its content (the same formats under another name, gzip included) or for its size. One line per refused
file, exit status 1. Standard library only, so that it also runs before anything is installed.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

MAX_BYTES = 1 << 20

EXTENSIONS = {
    **dict.fromkeys((".dcm", ".dicom", ".ima"), "DICOM"),
    **dict.fromkeys((".nii", ".hdr", ".img", ".nrrd", ".nhdr", ".mha", ".mhd"), "medical image"),
    **dict.fromkeys((".mat", ".h5", ".hdf5", ".mrd", ".cfl", ".dat", ".raw"), "k-space"),
    **dict.fromkeys((".npy", ".npz", ".parquet"), "array"),
}

SIGNATURES = (
    (128, b"DICM", "DICOM"),
    (344, b"n+1\0", "NIfTI-1"),
    (344, b"ni1\0", "NIfTI-1"),
    (4, b"n+2\0", "NIfTI-2"),
    (4, b"ni2\0", "NIfTI-2"),
    (0, b"MATLAB 5.0 MAT-file", "MATLAB 5"),
    (0, b"MATLAB 7.3 MAT-file", "MATLAB 7.3"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5"),
    (512, b"\x89HDF\r\n\x1a\n", "HDF5"),
    (0, b"\x93NUMPY", "NumPy"),
    (0, b"PAR1", "Parquet"),
    (0, b"NRRD000", "NRRD"),
)
"""Offset in the file, bytes found there, format. An HDF5 file may begin with a block of its user (MATLAB 7.3 does)."""

ROWS, ROW_BYTES = "kmtr/studies/rows", 128 << 10
"""Folder of the rows of studies: predictions for simulated subjects, numbered, as small Parquet files (`task_rows`)."""

HEAD = 1024


def known_format(head: bytes) -> str | None:
    """The data format that the first `HEAD` bytes of a file belong to; None: none of ours."""
    return next((name for at, magic, name in SIGNATURES if head[at : at + len(magic)] == magic), None)


def content(path: Path) -> str | None:
    """The data format of a file by its content, looking into gzip and into zip's list of names (.npz)."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head.startswith(b"\x1f\x8b"):
        try:
            with gzip.open(path) as file:
                head = file.read(HEAD)
        except (OSError, EOFError, zlib.error):
            return "damaged gzip"
    elif zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile:
            return "damaged zip"
        return next((f"archive with {kind}" for name in names if (kind := by_name(name))), None)
    return known_format(head)


def by_name(name: str) -> str | None:
    """The data format that a file's name stands for, whatever follows it (.nii.gz, .mat.bak)."""
    return next((EXTENSIONS[part] for part in map(str.lower, Path(name).suffixes) if part in EXTENSIONS), None)


def refusal(path: Path) -> str | None:
    """Why a file must not be committed; None: it may. A symbolic link is judged by its own name only."""
    if path.is_relative_to(ROWS) and path.suffix == ".parquet" and path.is_file() and not path.is_symlink():
        fits = path.stat().st_size <= ROW_BYTES and content(path) == "Parquet"
        return None if fits else f"no row of a study: expected Parquet of at most {ROW_BYTES >> 10} KiB"
    if kind := by_name(path.name):
        return f"{kind} file by its name"
    if path.is_symlink() or not path.is_file():
        return None
    if kind := content(path):
        return f"{kind} data by its content"
    if (size := path.stat().st_size) > MAX_BYTES:
        return f"{size / MAX_BYTES:.1f} MiB, expected at most {MAX_BYTES >> 20}"
    return None


def tracked() -> list[str]:
    """Every file that git tracks, from the top of the repository."""
    listing = subprocess.run(["git", "ls-files", "-z"], check=True, stdout=subprocess.PIPE).stdout
    return [os.fsdecode(name) for name in listing.split(b"\0") if name]


def main(names: Sequence[str]) -> int:
    refused = [(name, why) for name in names or tracked() if (why := refusal(Path(name)))]
    for name, why in refused:
        sys.stderr.write(f"{name}: {why}: participant data and large files stay out of the repository\n")
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
