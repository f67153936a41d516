"""NIfTI cine: magnitude images, made complex by a simulated phase (`kmtr.data.sources.cine`).

Three layouts, recognised by the file names (``.nii`` or ``.nii.gz``):

- cine: any 4D short axis (x, y, z, t), with contours beside it named ``X_seg_4d`` (for ``X_4d``), ``X_seg`` or
  ``X_gt``, of values 1 = RV, 2 = LV myocardium, 3 = LV cavity. X is the subject, or the folder is where X says only
  what the image is (``sax``, ``cine``). Left out of a folder: 3D images, other contours (``seg_*``, ``label_*``) and
  long axes (``lax``, ``2ch``, ``3ch``, ``4ch``): their values and planes would be taken for what they are not.
- ACDC: ``patientNNN_frameNN`` and ``patientNNN_frameNN_gt`` (numbers from 1; values as above), perhaps the whole cine
  ``patientNNN_4d``, and ``Info.cfg``, of which only the diagnostic group is read. Without the cine the study has only
  the frames that are there, end-diastole and end-systole, in order of time.
- UK Biobank, fields 20208 (long axes) and 20209 (short axis) as ``ukbb_cardiac`` (Bai et al., JCMR 2018) converts them:
  one folder per subject, named by it, with ``sa`` and ``la_2ch``, ``la_3ch``, ``la_4ch``, and contours beside:
  ``label_X`` (by hand) before ``seg4_X`` before ``seg_X`` (both by a network). Values of the short axis and of
  ``seg4_la_4ch`` are SEGMENTATION_CLASSES; of other long axes 1 = left, 2 = right atrium. The rest of the folder
  (single frames, aorta, enlarged contours) is left out. The DICOM archives themselves: `kmtr.data.sources.dicom`.
"""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from kmtr.data.sources import Item, Options, check_size, optional
from kmtr.data.sources.cine import LA, LV_CAVITY, LV_MYOCARDIUM, RA, RV, Cine, oriented, plausible_frame_time, to_study
from kmtr.types import InputError, Study

SOURCE = "nifti/2"

CHALLENGE_CODES = (0, RV, LV_MYOCARDIUM, LV_CAVITY)
"""Value in contours of ACDC and Sunnybrook -> class."""
VENTRICLE_CODES = (0, LV_CAVITY, LV_MYOCARDIUM, RV)
HEART_CODES = (0, LV_CAVITY, LV_MYOCARDIUM, RV, LA, RA)
ATRIA_CODES = (0, LA, RA)

BIOBANK: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "sa": ("sax", {"label_sa": VENTRICLE_CODES, "seg_sa": VENTRICLE_CODES}),
    "la_2ch": ("lax_2ch", {"label_la_2ch": ATRIA_CODES, "seg_la_2ch": ATRIA_CODES}),
    "la_3ch": ("lax_3ch", {}),
    "la_4ch": ("lax_4ch", {"label_la_4ch": ATRIA_CODES, "seg4_la_4ch": HEART_CODES, "seg_la_4ch": ATRIA_CODES}),
}
"""Image of a UK Biobank folder -> its view, and its contours' names, most wanted first, with what their values mean."""

ACDC_GROUPS = {"DCM": "dcm", "HCM": "hcm", "MINF": "infarct", "RV": "rv_disease", "NOR": None}
"""The five exclusive groups of ACDC (Bernard et al., IEEE TMI 2018) -> the disease that is 1; None: healthy."""

MILLIMETRES = {"meter": 1e3, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}
SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}

EXTENSIONS_BYTES = 1 << 20
"""Most bytes between the header and the voxels; nibabel reads all of them at once."""

ELSEWHERE_MM = 1.0
"""Contours whose corners lie further than this from the image's belong to another image."""

_NIFTI = re.compile(r"(?P<stem>.+?)\.nii(\.gz)?")
_FRAME = re.compile(r"(?P<subject>.+)_frame(?P<number>\d+)(?P<contours>_gt)?\.nii(\.gz)?")
_CONTOURS = re.compile(r"(.+(_seg_4d|_seg|_gt)|(seg4?|label)_.+)\.nii(\.gz)?")
_LONG_AXIS = re.compile(r"(?:^|[_-])(lax?|[234]ch)[_.-]", re.IGNORECASE)
_NO_SUBJECT = ("sax", "cine", "cine_sax")
"""Names of images that are alike for everybody."""


def find(source: Path) -> list[Item]:
    """Subjects in a file or folder; see the module for the layouts.

    Raises:
        InputError: nothing found, or the file itself is not a cine.
    """
    if source.is_file():
        if _stem(source) in BIOBANK:
            return [_biobank_item([source])]
        if not _NIFTI.fullmatch(source.name) or not _may_be_cine(source):
            raise InputError(f"{source}: expected a 4D short axis, .nii or .nii.gz, not contours, long axis or others")
        if _FRAME.fullmatch(source.name):
            raise InputError(f"{source}: expected a 4D image; single frames are read together, name their folder")
        return [_cine_item(source)]
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for path in sorted(source.rglob("*")):
        if _NIFTI.fullmatch(path.name) and path.is_file():
            by_folder[path.parent].append(path)
    items = [item for folder in sorted(by_folder) for item in _folder_items(folder, by_folder[folder])]
    if not items:
        raise InputError(
            f"{source}: looked for 4D .nii or .nii.gz images, ACDC's patientNNN_frameNN.nii.gz and UK Biobank's "
            f"sa.nii.gz, found none among {sum(map(len, by_folder.values()))} NIfTI files"
        )
    return items


def read(item: Item, where: str, subject_id: str, options: Options) -> Study:
    """The study of one subject, one coil; see `kmtr.data.sources.read`."""
    if options.axes:
        raise InputError("axes: NIfTI names its axes itself; the key is for cmrxrecon only")
    labels: dict[str, float] = {}
    if any(_stem(path) in BIOBANK for path in item.files):
        cines = _read_biobank(item, where, options)
    elif any(_FRAME.fullmatch(path.name) for path in item.files):
        cine, labels = _read_acdc(item, where, options)
        cines = {"sax": cine}
    else:
        contours = [path for path in item.files if _CONTOURS.fullmatch(path.name)]
        (path,) = (path for path in item.files if path not in contours)
        cines = {"sax": _read_cine(path, contours[0] if contours else None, CHALLENGE_CODES, "sax", where, options)}
    return to_study(subject_id, cines, labels, SOURCE, options, where)


# ---------------------------------------------------------------------------------------------------- which files


def _stem(path: Path) -> str:
    match = _NIFTI.fullmatch(path.name)
    return match["stem"] if match else path.name


def _cine_item(image: Path) -> Item:
    """A 4D image and the contours beside it."""
    stem = _stem(image)
    name = stem.removesuffix("_4d")
    subject = image.resolve().parent.name if name.lower() in _NO_SUBJECT else name
    names = [f"{name}_seg_4d"] if stem.endswith("_4d") else [f"{stem}_seg", f"{stem}_gt"]
    return Item("nifti", subject, tuple(sorted([image, *_beside(image, names)])))


def _biobank_item(images: list[Path]) -> Item:
    """The views of one folder, each with the best contours that it has."""
    contours = [path for image in images for path in _beside(image, list(BIOBANK[_stem(image)][1]))]
    return Item("nifti", images[0].resolve().parent.name, tuple(sorted(images + contours)))


def _beside(image: Path, stems: list[str]) -> list[Path]:
    """The first of these files that lies beside an image, if any."""
    paths = (image.with_name(stem + ending) for stem in stems for ending in (".nii.gz", ".nii"))
    return [path for path in paths if path.is_file()][:1]


def _folder_items(folder: Path, paths: list[Path]) -> list[Item]:
    if biobank := {_stem(path): path for path in reversed(paths) if _stem(path) in BIOBANK}:
        return [_biobank_item(list(biobank.values()))]
    acdc: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        if match := _FRAME.fullmatch(path.name):
            acdc[match["subject"]].append(path)
    items = []
    for subject, files in acdc.items():
        files += [path for path in paths if path.name.startswith(f"{subject}_4d.nii")]
        if len(acdc) == 1 and (folder / "Info.cfg").is_file():
            files.append(folder / "Info.cfg")
        items.append(Item("nifti", subject, tuple(sorted(files))))
    taken = {path for item in items for path in item.files}
    items += [_cine_item(path) for path in paths if path not in taken and _may_be_cine(path) and _is_cine(path)]
    return items


def _may_be_cine(path: Path) -> bool:
    return not _CONTOURS.fullmatch(path.name) and not _LONG_AXIS.search(path.name)


def _is_cine(path: Path) -> bool:
    """Whether an image is 4D. One that can't be opened counts as one: `read` refuses it, and only it."""
    if re.search(r"_4d\.nii", path.name):
        return True
    try:
        return len(_open(path, "").shape) == 4
    except InputError:
        return True


# -------------------------------------------------------------------------------------------------- how they are read


def _read_biobank(item: Item, where: str, options: Options) -> dict[str, Cine]:
    of = {_stem(path): path for path in item.files}
    cines = {}
    for stem, (view, contours) in BIOBANK.items():
        if stem in of:
            name = next((name for name in contours if name in of), None)
            codes = HEART_CODES if name is None else contours[name]
            cines[view] = _read_cine(of[stem], of[name] if name else None, codes, view, where, options)
    return cines


def _read_cine(
    path: Path, contours: Path | None, codes: tuple[int, ...], view: str, where: str, options: Options
) -> Cine:
    """A 4D image and its contours, whose values mean `codes`."""
    image = _open(path, where)
    if len(image.shape) != 4:
        raise InputError(f"{where}: expected a 4D image (x, y, z, t), got {len(image.shape)}D {image.shape}")
    magnitude = _voxels(image, where, options)
    classes = None if contours is None else _classes(contours, codes, image, image.shape, where, options)
    return _oriented(image, magnitude, classes, view, _frame_time_s(image.header))


def _read_acdc(item: Item, where: str, options: Options) -> tuple[Cine, dict[str, float]]:
    """The cine, or its contoured frames, of an ACDC patient, and the diseases."""
    frames: dict[int, Path] = {}
    contours: dict[int, Path] = {}
    for path in item.files:
        if match := _FRAME.fullmatch(path.name):
            (contours if match["contours"] else frames)[int(match["number"])] = path
    whole = [path for path in item.files if re.search(r"_4d\.nii", path.name)]
    if whole:
        image = _open(whole[0], where)
        if len(image.shape) != 4:
            raise InputError(f"{where}: expected a 4D image (x, y, z, t), got {len(image.shape)}D {image.shape}")
        magnitude, numbers = _voxels(image, where, options), list(range(1, image.shape[3] + 1))
    else:
        numbers = sorted(frames)
        images = [_open(frames[number], where) for number in numbers]
        if len({image.shape for image in images}) != 1 or len(images[0].shape) != 3:
            raise InputError(f"{where}: expected 3D frames of one shape, got {sorted({i.shape for i in images})}")
        image, magnitude = images[0], np.stack([_voxels(image, where, options) for image in images], -1)
    if not set(contours) <= set(numbers):
        raise InputError(f"{where}: contours of frame {max(set(contours) - set(numbers))}, which has no image")
    classes = np.zeros(magnitude.shape, np.uint8) if contours else None
    for number, path in contours.items():
        drawn = _classes(path, CHALLENGE_CODES, image, magnitude.shape[:3], where, options)
        classes[..., numbers.index(number)] = drawn  # type: ignore[index]
    info = [path for path in item.files if path.name == "Info.cfg"]
    frame_time_s = _frame_time_s(image.header) if whole else None
    return _oriented(image, magnitude, classes, "sax", frame_time_s), _diseases(info[0], where) if info else {}


def _diseases(info: Path, where: str) -> dict[str, float]:
    """The four diseases of ACDC as 0 or 1; empty where the file names no group."""
    with info.open("rb") as file:
        text = file.read(1 << 16).decode("utf-8", "replace")
    group = re.search(r"^\s*Group\s*:\s*(\w+)", text, re.MULTILINE)
    if group is None:
        return {}
    if group[1] not in ACDC_GROUPS:
        raise InputError(f"{where}: Info.cfg: expected Group {', '.join(ACDC_GROUPS)}, got another one")
    return {name: float(name == ACDC_GROUPS[group[1]]) for name in ACDC_GROUPS.values() if name}


def _open(path: Path, where: str) -> Any:
    """A nibabel image; its voxels are not read yet."""
    nibabel = optional("nibabel")
    problems = (OSError, EOFError, ValueError, OverflowError, zlib.error, struct.error)
    known = (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError)
    try:
        _check_extensions(path, where)
        return nibabel.load(path)
    except InputError:
        raise
    except (*problems, *known) as error:
        raise InputError(f"{where}: a NIfTI file cannot be read ({type(error).__name__}); fetch it again") from None


def _check_extensions(path: Path, where: str) -> None:
    """Refuse a header that claims more extensions than anybody writes (NIfTI-1: vox_offset at byte 108; -2: at 168).

    Raises:
        ValueError: no NIfTI header at all, or half of one.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
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


def _voxels(image: Any, where: str, options: Options) -> np.ndarray:
    """float32, dimensions as stored; scaled as the header says."""
    stored = image.get_data_dtype()
    if stored.kind not in "biuf":
        raise InputError(f"{where}: expected magnitudes, one number a voxel, got {stored}")
    check_size(where, "image", image.shape, max(8, stored.itemsize), options)  # complex64, once it is k-space
    try:
        return np.asarray(image.dataobj, np.float32)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{where}: a NIfTI file is cut short ({type(error).__name__}); fetch it again") from None


def _classes(
    path: Path, codes: tuple[int, ...], image: Any, shape: tuple[int, ...], where: str, options: Options
) -> np.ndarray:
    """uint8 classes from contours, dimensions as stored, of the image's shape and place."""
    contours = _open(path, where)
    if contours.shape != shape:
        raise InputError(f"{where}: expected contours of the image's shape {shape}, got {contours.shape}")
    if _apart_mm(contours, image) > ELSEWHERE_MM:
        raise InputError(f"{where}: the contours lie elsewhere than the image: those of another patient or series?")
    array = _voxels(contours, where, options)
    if not np.isin(array, np.arange(len(codes))).all():
        raise InputError(
            f"{where}: expected contours with values 0 to {len(codes) - 1}, got {array.min():g} to {array.max():g}"
        )
    return np.array(codes, np.uint8)[array.astype(np.uint8)]


def _apart_mm(one: Any, other: Any) -> float:
    """Greatest distance between the corners of two images of one shape; 0 where either doesn't know its place."""
    for image in (one, other):
        header = image.header
        if not (int(header["sform_code"]) or int(header["qform_code"])) or np.array_equal(image.affine, np.eye(4)):
            return 0.0
    corners = np.stack(np.meshgrid(*((0, n - 1) for n in one.shape[:3]), [1], indexing="ij")).reshape(4, -1)
    return float(np.linalg.norm(((one.affine - other.affine) @ corners)[:3], axis=0).max())


def _oriented(
    image: Any, magnitude: np.ndarray, classes: np.ndarray | None, view: str, frame_time_s: float | None
) -> Cine:
    """Stored dimensions (x, y, z, t) -> a cine, with the header's spacing."""
    scale = MILLIMETRES[_units(image.header)[0]]
    x, y, z = (float(zoom) * scale for zoom in image.header.get_zooms()[:3])
    # An identity affine is what software writes that never knew the geometry.
    known = all(np.isfinite(zoom) and zoom > 0 for zoom in (x, y, z)) and not np.array_equal(image.affine, np.eye(4))
    return oriented(magnitude, classes, image.affine, view, (x, y, z) if known else None, frame_time_s)


def _units(header: Any) -> tuple[str, str]:
    """Units of space and time; a code that the standard does not have counts as unknown."""
    try:
        return header.get_xyzt_units()
    except KeyError:
        return "unknown", "unknown"


def _frame_time_s(header: Any) -> float | None:
    """Time between two frames in s, where the header's value is plausible; without a unit, as ms or else as s."""
    value, unit = float(header.get_zooms()[3]), _units(header)[1]
    tried = (SECONDS[unit],) if unit in SECONDS else (1e-3, 1.0)
    return next((t for second in tried if (t := plausible_frame_time(value * second)) is not None), None)
