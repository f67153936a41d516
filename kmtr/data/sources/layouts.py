"""Subjects of NIfTI files: by their names, and single slices by where they lie.

See `kmtr.data.sources.nifti` for the layouts.
"""

from __future__ import annotations

import gzip
import json
import re
import struct
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from kmtr.data.sources import Item, looked, optional
from kmtr.data.sources.anatomy import LA, LV_CAVITY, LV_MYOCARDIUM, RA, RV
from kmtr.data.sources.geometry import shape_4d
from kmtr.types import InputError

CHALLENGE_CODES = {0: 0, 1: RV, 2: LV_MYOCARDIUM, 3: LV_CAVITY}
"""Value in contours of ACDC and Sunnybrook -> class."""
VENTRICLE_CODES = {0: 0, 1: LV_CAVITY, 2: LV_MYOCARDIUM, 3: RV}
"""The same of M&Ms, M&Ms-2 and UK Biobank."""
HEART_CODES = VENTRICLE_CODES | {4: LA, 5: RA}
ATRIA_CODES = {0: 0, 1: LA, 2: RA}

BIOBANK: dict[str, tuple[str, dict[str, dict[int, int]]]] = {
    "sa": ("sax", {"label_sa": VENTRICLE_CODES, "seg_sa": VENTRICLE_CODES}),
    "la_2ch": ("lax_2ch", {"label_la_2ch": ATRIA_CODES, "seg_la_2ch": ATRIA_CODES}),
    "la_3ch": ("lax_3ch", {}),
    "la_4ch": ("lax_4ch", {"label_la_4ch": ATRIA_CODES, "seg4_la_4ch": HEART_CODES, "seg_la_4ch": ATRIA_CODES}),
}
"""Image of a UK Biobank folder -> its view, and its contours' names, most wanted first, with what their values mean."""

EXTENSIONS_BYTES = 1 << 20
"""Most bytes between the header and the voxels; nibabel reads all of them at once."""

PARALLEL = 1 - 1e-6
"""Cosine between axes of slices that one scan made; of two people's it is less."""
SAME_PLANE_MM, SAME_LINE_MM = 0.5, 1.0
"""Distance across slices up to which two are one, and in plane up to which they belong to one stack."""

IRREGULAR = 0.1
"""Largest difference among the distances between slices, as a share of the median."""

NIFTI = re.compile(r"(?P<stem>.+?)\.nii(\.gz)?", re.IGNORECASE)
FRAME = re.compile(r"(?P<subject>.+)_frame(?P<number>\d+)(?P<contours>_gt)?\.nii(\.gz)?")
MNMS2 = re.compile(r"(?P<subject>.+)_(?P<axis>SA|LA)_(?P<what>CINE|ED|ES)(?P<contours>_gt)?\.nii(\.gz)?")
WHOLE = re.compile(r".+_4d\.nii(\.gz)?", re.IGNORECASE)
_CONTOURS = re.compile(r"(.+(_seg_4d|_seg|_gt)|(seg4?|label)_.+)\.nii(\.gz)?", re.IGNORECASE)
_LONG_AXIS = re.compile(r"(?:^|[_-])(lax?|[234]ch)[_.-]", re.IGNORECASE)
_PARTS = re.compile(r"(?:^|[_-])(ph|phase|real|imag|imaginary|part-(?:phase|real|imag))(?=[_.-])", re.IGNORECASE)
_NO_SUBJECT = ("sax", "cine", "cine_sax")
"""Names of images that are alike for everybody."""


def find(source: Path) -> list[Item]:
    """Subjects in a file or folder.

    Raises:
        InputError: nothing found, or the file itself is not a cine.
    """
    if source.is_file():
        if stem(source) in BIOBANK:
            return [_biobank_item([source])]
        if match := MNMS2.fullmatch(source.name):
            beside = [
                path
                for path in source.parent.iterdir()
                if (m := MNMS2.fullmatch(path.name)) and m["axis"] == match["axis"]
            ]
            return [item for item in _named_items(sorted(beside), MNMS2) if item.subject == match["subject"]]
        if why := _why_no_cine(source):
            raise InputError(
                f"{source}: expected a 4D short axis, .nii or .nii.gz, not contours, long axis or others: {why}"
            )
        if FRAME.fullmatch(source.name):
            raise InputError(f"{source}: expected a 4D image; single frames are read together, name their folder")
        return [_cine_item(source)]
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for path in sorted(source.rglob("*")):
        if NIFTI.fullmatch(path.name) and path.is_file() and not path.name.startswith("."):
            by_folder[path.parent].append(path)
    items = [item for folder in sorted(by_folder) for item in _folder_items(folder, by_folder[folder], source)]
    if not items:
        raise InputError(
            f"{source}: looked for 4D .nii or .nii.gz images, ACDC's patientNNN_frameNN.nii.gz, M&Ms' and UK Biobank's "
            f"sa.nii.gz, found none among {sum(map(len, by_folder.values()))} NIfTI files"
        )
    return items


def why_unused(path: Path) -> str:
    """Reason why a file below the source that no item has is not read."""
    if path.name.startswith("."):
        return "hidden files"
    if why := _why_no_cine(path):
        return why
    return (
        "images of one frame"
        if looked(_cine, path, _unreadable(path)) is None
        else "images beside a layout that knows no such name"
    )


def stem(path: Path) -> str:
    """A file's name without ``.nii`` or ``.nii.gz``."""
    match = NIFTI.fullmatch(path.name)
    return match["stem"] if match else path.name


def is_contours(path: Path) -> bool:
    """True if a file has a name of contours."""
    return _CONTOURS.fullmatch(path.name) is not None


def codes_of(image: Path) -> dict[int, int]:
    """Meaning of the values of the contours beside a cine, by its name; `anatomy.meaning` looks at their shape."""
    return VENTRICLE_CODES if stem(image).endswith("_sa") else CHALLENGE_CODES


def contours_beside(image: Path) -> list[Path]:
    """The contours of a cine of no known layout: none or one file."""
    name = stem(image)
    names = [f"{name.removesuffix('_4d')}_seg_4d"] if name.endswith("_4d") else [f"{name}_seg", f"{name}_gt"]
    return _beside(image, names)


def open_image(path: Path, where: str) -> Any:
    """A nibabel image; its voxels are not read yet.

    Raises:
        InputError: no NIfTI file, or a damaged header.
    """
    nibabel = optional("nibabel")
    problems = (OSError, EOFError, ValueError, OverflowError, zlib.error, struct.error)
    known = (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError)
    try:
        _check_header(path, where)
        return nibabel.load(path)
    except InputError:
        raise
    except (*problems, *known) as error:
        raise InputError(f"{where}: a NIfTI file cannot be read ({type(error).__name__}); fetch it again") from None


def _check_header(path: Path, where: str) -> None:
    """Refuse a header that claims more extensions than anybody writes (NIfTI-1: vox_offset at byte 108; -2: at 168).

    Raises:
        ValueError: no NIfTI header at all, or half of one.
    """
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        head = file.read(540)
    for size, at, kind in ((348, 108, "f"), (540, 168, "q")):
        for order in "<>":
            if head[:4] == struct.pack(f"{order}i", size) and len(head) >= size:
                (offset,) = struct.unpack_from(order + kind, head, at)
                if not 0 <= offset <= size + EXTENSIONS_BYTES:
                    raise InputError(
                        f"{where}: a NIfTI header claims voxels at byte {offset:g}: damaged, fetch it again"
                    )
                return
    raise ValueError("no NIfTI header")


# -------------------------------------------------------------------------------------------------- layouts by name


def _cine_item(image: Path) -> Item:
    """A 4D image and the contours beside it."""
    name = stem(image).removesuffix("_4d")
    subject = image.resolve().parent.name if name.lower() in _NO_SUBJECT else name.removesuffix("_sa")
    return Item("nifti", subject, tuple(sorted([image, *contours_beside(image)])))


def _biobank_item(images: list[Path]) -> Item:
    """The views of one folder, each with the best contours that it has."""
    contours = [path for image in images for path in _beside(image, list(BIOBANK[stem(image)][1]))]
    return Item("nifti", images[0].resolve().parent.name, tuple(sorted(images + contours)))


def _beside(image: Path, stems: list[str]) -> list[Path]:
    """The first of these files that lies beside an image, if any."""
    paths = (image.with_name(stem + ending) for stem in stems for ending in (".nii.gz", ".nii"))
    return [path for path in paths if path.is_file()][:1]


def _named_items(paths: Sequence[Path], layout: re.Pattern[str]) -> list[Item]:
    """The subjects of ACDC (`FRAME`) or M&Ms-2 (`MNMS2`) among the files of one folder."""
    of: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        if match := layout.fullmatch(path.name):
            of[match["subject"]].append(path)
    for subject, files in of.items():
        files += [path for path in paths if layout is FRAME and path.name.startswith(f"{subject}_4d.nii")]
        info = files[0].with_name("Info.cfg")
        if layout is FRAME and len(of) == 1 and info.is_file():
            files.append(info)
    return [Item("nifti", subject, tuple(sorted(files))) for subject, files in of.items()]


def _folder_items(folder: Path, paths: list[Path], source: Path) -> list[Item]:
    if biobank := {stem(path): path for path in reversed(paths) if stem(path) in BIOBANK}:
        return [_biobank_item(list(biobank.values()))]
    items = _named_items(paths, FRAME) + _named_items(paths, MNMS2)
    taken = {path for item in items for path in item.files}
    cines = [looked(_cine, path, _unreadable(path)) for path in paths if path not in taken and not _why_no_cine(path)]
    scans = _scans([cine for cine in cines if cine is not None])
    below = "" if folder == source or len(scans) > 1 else folder.name
    return items + [_cine_item(scan[0].path) if len(scan) == 1 else _scan_item(scan, below) for scan in scans]


def _why_no_cine(path: Path) -> str:
    """Reason why a file is no short-axis cine, by its name and what lies beside it; empty: it may be one."""
    if not NIFTI.fullmatch(path.name):
        return "files of another ending than .nii and .nii.gz"
    if is_contours(path):
        return "contours without an image that they are called after"
    if _LONG_AXIS.search(path.name):
        return "long axes"
    if _PARTS.search(path.name) or looked(_is_part, path.with_name(f"{stem(path)}.json"), False):
        return "phase, real or imaginary images"
    return ""


def _is_part(sidecar: Path) -> bool:
    """True if dcm2niix's description of an image says that it is no magnitude."""
    if not sidecar.is_file():
        return False
    with sidecar.open("rb") as file:
        described = json.loads(file.read(1 << 20))
    words = described.get("ImageType") if isinstance(described, dict) else None
    kinds = {str(word).upper() for word in (words if isinstance(words, list) else [words])}
    return bool(kinds & {"P", "PHASE", "R", "REAL", "I", "IMAGINARY"})


# ----------------------------------------------------------------------------------- slices of one scan in many files


@dataclass(frozen=True)
class _Cine:
    """Place of a cine, as its header tells.

    Attributes:
        shape: x, y, slice, t; None: the file can't be read.
        axes: ``3 3``, unit columns; None: the header knows no place.
        centre: mm.
    """

    path: Path
    shape: tuple[int, ...] | None = None
    sizes: tuple[float, ...] = ()
    axes: np.ndarray | None = None
    centre: np.ndarray | None = None

    @property
    def tokens(self) -> list[str]:
        return re.split(r"[_\-. ]+", stem(self.path))


def _cine(path: Path) -> _Cine | None:
    """None: fewer than four dimensions. What can't be opened counts as a cine (by `looked`)."""
    image = open_image(path, "")
    shape = shape_4d(image)
    if len(shape) < 4:
        return _Cine(path) if WHOLE.fullmatch(path.name) else None
    affine, header = np.asarray(image.affine, float), image.header
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    placed = int(header["sform_code"]) or int(header["qform_code"])
    if not placed or not lengths.all() or not np.isfinite(affine).all() or np.array_equal(affine, np.eye(4)):
        return _Cine(path, shape)
    centre = affine @ (*((n - 1) / 2 for n in shape[:3]), 1)
    return _Cine(path, shape, tuple(map(float, lengths)), affine[:3, :3] / lengths, centre[:3])


def _unreadable(path: Path) -> _Cine | None:
    return _Cine(path)


def _scans(cines: Sequence[_Cine]) -> list[list[_Cine]]:
    """Cines by the scan that made them; those of one scan by their position along the slices."""
    found: list[list[_Cine]] = []
    for cine in cines:
        scan = next((scan for scan in found if _of_one_scan(scan[0], cine)), None)
        if scan is None:
            found.append([cine])
        else:
            scan.append(cine)
    return [sorted(scan, key=_depth) if len(scan) > 1 else scan for scan in found]


def _depth(cine: _Cine) -> float:
    return 0.0 if cine.axes is None or cine.centre is None else float(cine.centre @ cine.axes[:, 2])


def _of_one_scan(one: _Cine, other: _Cine) -> bool:
    """True if two files show one heart: they lie on one line across their planes, as no two people do by chance.

    An affine along the patient's axes is one that anybody may have: then the names must agree. They do where they
    differ in their numbers, or after words with a number in it (``P01_SAX_5``, ``P01_SAX_9``). Files that lie in the
    same place, or that hold several slices each, may be of a cohort that was brought to one place, and need such words
    as well.
    """
    if one.axes is None or other.axes is None or one.shape is None or other.shape is None:
        return False
    normal = one.axes[:, 2]
    offset = np.asarray(other.centre) - np.asarray(one.centre)
    along = float(offset @ normal)
    if (one.axes * other.axes).sum(0).min() < PARALLEL or np.linalg.norm(offset - along * normal) > SAME_LINE_MM:
        return False
    same = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(one.tokens, other.tokens, strict=False))]
    one_exam = bool(re.search(r"\d", "".join(same)))
    oblique = bool((np.abs(one.axes).max(0) < PARALLEL).any())
    if one.shape[2] == other.shape[2] == 1 and abs(along) > SAME_PLANE_MM:
        return oblique or one_exam or re.sub(r"\d", "", stem(one.path)) == re.sub(r"\d", "", stem(other.path))
    return one_exam and oblique


def _scan_item(scan: list[_Cine], folder: str) -> Item:
    """One subject of several files; `folder` is its name where nothing else lies there, else empty."""
    first = scan[0]
    same = [
        words[0]
        for words in takewhile(lambda words: len(set(words)) == 1, zip(*(c.tokens for c in scan), strict=False))
    ]
    subject = folder or "_".join(same) or first.path.resolve().parent.name
    gaps = np.diff([_depth(cine) for cine in scan])
    problem = ""
    if any(cine.shape is not None and cine.shape[2] > 1 for cine in scan):
        problem = f"{len(scan)} cines of one place, called alike: one person scanned again? Leave one of them"
    elif gaps.min() < SAME_PLANE_MM:
        problem = f"{len(scan)} files, two or more of one slice (scanned again, or no magnitude?); leave one of a slice"
    elif any(cine.shape != first.shape or not np.allclose(cine.sizes[:2], first.sizes[:2], rtol=1e-3) for cine in scan):
        shapes = sorted({f"{cine.shape} of {cine.sizes[0]:.4g} x {cine.sizes[1]:.4g} mm" for cine in scan})
        problem = f"slices in {len(scan)} files that do not fit each other: {' and '.join(shapes)}"
    elif np.ptp(gaps) > IRREGULAR * np.median(gaps):
        shown = ", ".join(f"{gap:g}" for gap in np.unique(gaps.round(1)))
        problem = f"slices in {len(scan)} files at irregular distances ({shown} mm): is one missing?"
    files = [path for cine in scan for path in (cine.path, *contours_beside(cine.path))]
    return Item("nifti", subject, tuple(sorted(files)), problem)
