"""NIfTI short-axis cine: magnitude images, made complex by a simulated phase.

Two layouts, recognised by the file names:

- cine: any 4D ``.nii`` or ``.nii.gz`` (x, y, z, t), with contours beside it named ``X_seg_4d`` (for ``X_4d``),
  ``X_seg`` or ``X_gt``. X is the subject, or the folder is where X says only what the image is (``sa``, ``sax``,
  ``cine``). Left out of a folder: 3D images, other contours (``seg_*``, ``label_*``) and long-axis views (``la_*``,
  ``lax``, ``2ch``, ``3ch``, ``4ch``), because their values and planes would be taken for what they are not.
- ACDC: ``patientNNN_frameNN`` and ``patientNNN_frameNN_gt`` (numbers from 1), perhaps the whole cine ``patientNNN_4d``,
  and ``Info.cfg``, of which only the diagnostic group is read. Without the cine the study has only the frames that
  are there, end-diastole and end-systole, in order of time.

Contours count 1 = RV, 2 = LV myocardium, 3 = LV cavity in both and become SEGMENTATION_CLASSES. A frame without any
contour is UNLABELLED as a whole. In a frame with a cavity but no myocardium (Sunnybrook draws the outer contour at
end-diastole only), whatever is not contoured is UNLABELLED too: it may be myocardium. Where a source never contours
the right ventricle, as Sunnybrook, its pixels count as background.

Orientation. An affine whose axes are oblique to the patient, as any real short axis is, is believed: slices run from
base to apex (towards left, anterior, inferior), y runs to inferior and x to the left-posterior, by the exchange of
the two in-plane axes and the flips that bring each nearest to that. An axis-aligned affine has lost the orientation:
the array is taken as stored, (x, y, z) = dimensions 1, 2, 3, slices in stored order.

The k-space is the Fourier transform of the magnitude, cropped to `matrix` where asked, times a smooth random phase that
all frames of a slice share (`kmtr.physics.coils.phase_map`), a pure function of (seed, subject, slice).
The FFT of a cropped magnitude has no physical field of view: it belongs to no acquisition that a scanner could run.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kmtr.data.sources import Item, Options, optional
from kmtr.physics.coils import phase_map
from kmtr.physics.fourier import crop_or_pad, fft2c
from kmtr.types import UNLABELLED, InputError, Study, View

SOURCE = "nifti/1"

CLASS_OF_CODE = np.array([0, 3, 2, 1], np.uint8)
"""Value in the file -> index in SEGMENTATION_CLASSES; its own inverse."""
LV_CAVITY, LV_MYOCARDIUM, RV = 1, 2, 3

MYOCARDIAL_DENSITY_G_ML = 1.05

ACDC_GROUPS = {"DCM": "dcm", "HCM": "hcm", "MINF": "infarct", "RV": "rv_disease", "NOR": None}
"""The five exclusive groups of ACDC (Bernard et al., IEEE TMI 2018) -> the disease that is 1; None: healthy."""

MILLIMETRES = {"meter": 1e3, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}
SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}
FRAME_TIME_S = (0.005, 0.2)
"""Plausible time between two frames of a cine; other values in a header are place holders."""

_NIFTI = re.compile(r"(?P<stem>.+?)\.nii(\.gz)?")
_FRAME = re.compile(r"(?P<subject>.+)_frame(?P<number>\d+)(?P<contours>_gt)?\.nii(\.gz)?")
_CONTOURS = re.compile(r"(.+(_seg_4d|_seg|_gt)|(seg|label)_.+)\.nii(\.gz)?")
_LONG_AXIS = re.compile(r"(?:^|[_-])(lax?|[234]ch)[_.-]", re.IGNORECASE)
_NO_SUBJECT = ("sa", "sax", "cine", "cine_sax")
"""Names of images that are alike for everybody."""


def find(source: Path) -> list[Item]:
    """Subjects in a file or folder; see the module for the layouts.

    Raises:
        InputError: nothing found, or the file itself is not a cine.
    """
    if source.is_file():
        if not _NIFTI.fullmatch(source.name) or not _may_be_cine(source):
            raise InputError(f"{source}: expected a 4D short axis, .nii or .nii.gz, not contours, long axis or others")
        if _FRAME.fullmatch(source.name):
            raise InputError(f"{source}: expected a 4D image; single frames are read together, name their folder")
        return [_cine_item(source)]
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for path in sorted(source.rglob("*")):
        if path.is_file() and _NIFTI.fullmatch(path.name):
            by_folder[path.parent].append(path)
    items = [item for folder in sorted(by_folder) for item in _folder_items(folder, by_folder[folder], str(source))]
    if not items:
        raise InputError(
            f"{source}: looked for 4D .nii or .nii.gz images and for ACDC's patientNNN_frameNN.nii.gz, found none "
            f"among {sum(map(len, by_folder.values()))} NIfTI files"
        )
    return items


def read(item: Item, where: str, subject_id: str, options: Options) -> Study:
    """The study of one subject, view ``sax``, one coil; see `kmtr.data.sources.read`."""
    if options.axes:
        raise InputError("axes: NIfTI names its axes itself; the key is for cmrxrecon only")
    acdc = any(_FRAME.fullmatch(path.name) for path in item.files)
    cine = _read_acdc(item, where) if acdc else _read_cine(item, where)
    magnitude, codes = cine.magnitude, cine.codes
    classes = None if codes is None else CLASS_OF_CODE[codes]
    labels = cine.labels | ({} if classes is None else volumes(classes, cine.spacing_mm))
    if (matrix := options.matrix) is not None:
        magnitude = crop_or_pad(magnitude, matrix, (-2, -1))
    segmentation = None if classes is None else _segmentation(classes, matrix)
    subject = int(subject_id.removeprefix("p-"), 16)
    kspace = np.empty((magnitude.shape[0], 1, *magnitude.shape[1:]), np.complex64)
    for index, frames in enumerate(magnitude):
        phase = phase_map(frames.shape[1:], seed=options.seed, subject=subject, slice_index=index)
        kspace[index, 0] = fft2c(frames * np.exp(1j * phase))
    view = View(kspace, None, segmentation, cine.spacing_mm, cine.frame_time_s)
    return Study(subject_id, {"sax": view}, labels, SOURCE)


def volumes(classes: np.ndarray, spacing_mm: tuple[float, float, float] | None) -> dict[str, float]:
    """Ventricular phenotypes from contours by counting voxels.

    Args:
        classes: uint8 ``slice t y x`` of SEGMENTATION_CLASSES, complete (before any crop).
        spacing_mm: (z, y, x); None: nothing can be said.

    Returns:
        Volumes in mL, ejection fraction in %, mass in g. End-diastole is the frame with the largest LV cavity,
        end-systole the one with the smallest among those that have one; empty unless there are two. Mass is
        myocardium at end-diastole times 1.05 g/mL. RV values are given at the same two frames where both show it.
    """
    if spacing_mm is None:
        return {}
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    lv, myocardium, rv = ((classes == c).sum((0, 2, 3)) * voxel_ml for c in (LV_CAVITY, LV_MYOCARDIUM, RV))
    frames = np.flatnonzero(lv)
    if len(frames) < 2:
        return {}
    ed, es = frames[lv[frames].argmax()], frames[lv[frames].argmin()]
    labels = _ventricle("lv", lv[ed], lv[es])
    if myocardium[ed]:
        labels["lvm_g"] = float(myocardium[ed] * MYOCARDIAL_DENSITY_G_ML)
    if rv[ed] and rv[es]:
        labels |= _ventricle("rv", rv[ed], rv[es])
    return labels


def orientation(affine: np.ndarray) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Which stored dimensions (0, 1, 2) are z, y, x, and which of z, y, x are to be flipped; see the module.

    Args:
        affine: 4x4, voxel index -> mm in right-anterior-superior coordinates.
    """
    columns = np.asarray(affine, float)[:3, :3]
    lengths = np.linalg.norm(columns, axis=0)
    directions = columns / np.where(lengths > 0, lengths, 1)
    if (np.abs(directions).max(0) > 0.9999).all() or not lengths.all() or not np.isfinite(lengths).all():
        return (2, 1, 0), (False, False, False)
    to_apex = np.array([-1, 1, -1]) / np.sqrt(3)
    to_left_posterior = np.array([-1, -1, 0]) / np.sqrt(2)
    to_inferior = np.cross(to_left_posterior, to_apex)
    wanted = np.stack([to_apex, to_inferior, to_left_posterior])
    order = max(((2, 1, 0), (2, 0, 1)), key=lambda order: np.abs((wanted * directions[:, order].T).sum(1)).sum())
    z, y, x = (bool(wanted[n] @ directions[:, order[n]] < 0) for n in range(3))
    return order, (z, y, x)


@dataclass(frozen=True)
class _Cine:
    """magnitude float32 and codes uint8 (values of the file), both ``slice t y x``; labels: the diseases."""

    magnitude: np.ndarray
    codes: np.ndarray | None
    spacing_mm: tuple[float, float, float] | None
    frame_time_s: float | None
    labels: dict[str, float]


def _cine_item(image: Path) -> Item:
    """A 4D image and the contours beside it."""
    match = _NIFTI.fullmatch(image.name)
    stem = match["stem"] if match else image.name
    name = stem.removesuffix("_4d")
    subject = image.resolve().parent.name if name.lower() in _NO_SUBJECT else name
    names = [f"{name}_seg_4d"] if stem.endswith("_4d") else [f"{stem}_seg", f"{stem}_gt"]
    beside = (image.with_name(contours + ending) for contours in names for ending in (".nii.gz", ".nii"))
    found = [path for path in beside if path.is_file()][:1]
    return Item("nifti", subject, tuple(sorted([image, *found])))


def _folder_items(folder: Path, paths: list[Path], where: str) -> list[Item]:
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
    for path in paths:
        if path not in taken and _may_be_cine(path) and _is_cine(path, where):
            items.append(_cine_item(path))
    return items


def _may_be_cine(path: Path) -> bool:
    return not _CONTOURS.fullmatch(path.name) and not _LONG_AXIS.search(path.name)


def _is_cine(path: Path, where: str) -> bool:
    return bool(re.search(r"_4d\.nii", path.name)) or len(_open(path, where).shape) == 4


def _open(path: Path, where: str) -> Any:
    """A nibabel image; its voxels are not read yet."""
    nibabel = optional("nibabel")
    try:
        return nibabel.load(path)
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise InputError(f"{where}: a NIfTI file cannot be read ({type(error).__name__}); fetch it again") from None


def _voxels(image: Any, where: str) -> np.ndarray:
    """float32, dimensions as stored; scaled as the header says."""
    try:
        array = np.asarray(image.dataobj, np.float32)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{where}: a NIfTI file is cut short ({type(error).__name__}); fetch it again") from None
    if not np.isfinite(array).all():
        raise InputError(f"{where}: expected finite voxels, got NaN or infinity")
    return array


def _codes(path: Path, where: str, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 contours, dimensions as stored, of the image's shape."""
    array = _voxels(_open(path, where), where)
    if array.shape != shape:
        raise InputError(f"{where}: expected contours of the image's shape {shape}, got {array.shape}")
    values = np.unique(array)
    if not np.isin(values, (0, 1, 2, 3)).all():
        raise InputError(f"{where}: expected contours with values 0 to 3, got {values.min():g} to {values.max():g}")
    return array.astype(np.uint8)


def _read_cine(item: Item, where: str) -> _Cine:
    contours = [path for path in item.files if _CONTOURS.fullmatch(path.name)]
    (path,) = (path for path in item.files if path not in contours)
    image = _open(path, where)
    if len(image.shape) != 4:
        raise InputError(f"{where}: expected a 4D image (x, y, z, t), got {len(image.shape)}D {image.shape}")
    codes = _codes(contours[0], where, image.shape) if contours else None
    return _oriented(image, _voxels(image, where), codes, _frame_time_s(image.header), {})


def _read_acdc(item: Item, where: str) -> _Cine:
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
        magnitude, numbers = _voxels(image, where), list(range(1, image.shape[3] + 1))
    else:
        numbers = sorted(frames)
        images = [_open(frames[number], where) for number in numbers]
        if len({image.shape for image in images}) != 1 or len(images[0].shape) != 3:
            raise InputError(f"{where}: expected 3D frames of one shape, got {sorted({i.shape for i in images})}")
        image, magnitude = images[0], np.stack([_voxels(image, where) for image in images], -1)
    if not set(contours) <= set(numbers):
        raise InputError(f"{where}: contours of frame {max(set(contours) - set(numbers))}, which has no image")
    codes = np.zeros(magnitude.shape, np.uint8) if contours else None
    for number, path in contours.items():
        codes[..., numbers.index(number)] = _codes(path, where, magnitude.shape[:3])  # type: ignore[index]
    info = [path for path in item.files if path.name == "Info.cfg"]
    labels = _diseases(info[0], where) if info else {}
    return _oriented(image, magnitude, codes, _frame_time_s(image.header) if whole else None, labels)


def _diseases(info: Path, where: str) -> dict[str, float]:
    """The four diseases of ACDC as 0 or 1; empty where the file names no group."""
    group = re.search(r"^\s*Group\s*:\s*(\w+)", info.read_text("utf-8", "replace"), re.MULTILINE)
    if group is None:
        return {}
    if group[1] not in ACDC_GROUPS:
        raise InputError(f"{where}: Info.cfg: expected Group {', '.join(ACDC_GROUPS)}, got {group[1]!r}")
    return {name: float(name == ACDC_GROUPS[group[1]]) for name in ACDC_GROUPS.values() if name}


def _oriented(
    image: Any, magnitude: np.ndarray, codes: np.ndarray | None, frame_time_s: float | None, labels: dict[str, float]
) -> _Cine:
    """Stored dimensions (x, y, z, t) -> ``slice t y x``, with the header's spacing."""
    (z, y, x), flips = orientation(image.affine)
    flipped = tuple(axis for axis, flip in zip((0, 2, 3), flips, strict=True) if flip)

    def turn(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.flip(array.transpose(z, 3, y, x), flipped))

    scale = MILLIMETRES[_units(image.header)[0]]
    zooms = [float(zoom) * scale for zoom in image.header.get_zooms()[:3]]
    # An identity affine is what software writes that never knew the geometry.
    known = all(np.isfinite(zoom) and zoom > 0 for zoom in zooms) and not np.array_equal(image.affine, np.eye(4))
    spacing = (zooms[z], zooms[y], zooms[x]) if known else None
    return _Cine(turn(magnitude), None if codes is None else turn(codes), spacing, frame_time_s, labels)


def _units(header: Any) -> tuple[str, str]:
    """Units of space and time; a code that the standard does not have counts as unknown."""
    try:
        return header.get_xyzt_units()
    except KeyError:
        return "unknown", "unknown"


def _frame_time_s(header: Any) -> float | None:
    """Time between two frames in s, where the header's value is plausible; without a unit, as ms or else as s."""
    value, unit = float(header.get_zooms()[3]), _units(header)[1]
    low, high = FRAME_TIME_S
    for second in (SECONDS[unit],) if unit in SECONDS else (1e-3, 1.0):
        if low <= value * second <= high:
            return value * second
    return None


def _segmentation(classes: np.ndarray, matrix: tuple[int, int] | None) -> np.ndarray:
    """Cropped classes with UNLABELLED where nobody contoured, decided on the whole frame."""
    has_contours = (classes > 0).any((0, 2, 3))
    inner_only = (classes == LV_CAVITY).any((0, 2, 3)) & ~(classes == LV_MYOCARDIUM).any((0, 2, 3))
    segmentation = classes if matrix is None else crop_or_pad(classes, matrix, (-2, -1))
    unknown = (~has_contours | inner_only)[None, :, None, None] & (segmentation == 0)
    return np.where(unknown, np.uint8(UNLABELLED), segmentation)


def _ventricle(name: str, edv: float, esv: float) -> dict[str, float]:
    stroke = edv - esv
    values = {"edv_ml": edv, "esv_ml": esv, "sv_ml": stroke, "ef_pct": 100 * stroke / edv}
    return {name + key: float(value) for key, value in values.items()}
