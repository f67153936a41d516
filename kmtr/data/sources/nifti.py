"""NIfTI cine: magnitude images, made complex by a simulated phase (`kmtr.data.sources.cine`).

Layouts, recognised by the file names (``.nii`` or ``.nii.gz``) in `kmtr.data.sources.layouts`:

- cine: any 4D short axis (x, y, slice, t), with contours beside it named ``X_seg_4d`` (for ``X_4d``), ``X_seg`` or
  ``X_gt``, of values 1 = RV, 2 = LV myocardium, 3 = LV cavity. X is the subject, or the folder is where X says only
  what the image is (``sax``, ``cine``). Left out of a folder and counted: images of one frame, other contours
  (``seg_*``, ``label_*``), long axes (``lax``, ``2ch``, ``3ch``, ``4ch``), phase, real and imaginary images.
- slices: one 4D file for each slice of one scan, as dcm2niix writes them. Files whose planes lie on one line and whose
  names agree are one subject, called as the folder if nothing else lies there, or as what their names share.
- ACDC: ``patientNNN_frameNN`` and ``patientNNN_frameNN_gt`` (numbers from 1; values as above), perhaps the whole cine
  ``patientNNN_4d``, and ``Info.cfg``, of which only the diagnostic group is read. Without the cine the study has only
  the frames that are there, end-diastole and end-systole, in order of time.
- M&Ms: ``X_sa`` and ``X_sa_gt``; M&Ms-2: ``X_SA_CINE`` and ``X_LA_CINE`` (four chambers), with the frames ``X_SA_ED``,
  ``X_SA_ES`` and their contours ``_gt``, placed where the cine has the same voxels. Values 1 = LV cavity, 2 = LV
  myocardium, 3 = RV.
- UK Biobank, fields 20208 (long axes) and 20209 (short axis) as ``ukbb_cardiac`` (Bai et al., JCMR 2018) converts them:
  one folder per subject, named by it, with ``sa`` and ``la_2ch``, ``la_3ch``, ``la_4ch``, and contours beside:
  ``label_X`` (by hand) before ``seg4_X`` before ``seg_X`` (both by a network). Values of the short axis and of
  ``seg4_la_4ch`` are SEGMENTATION_CLASSES; of other long axes 1 = left, 2 = right atrium. The rest of the folder
  (single frames, aorta, enlarged contours) is left out. The DICOM archives themselves: `kmtr.data.sources.dicom`.

What the values of contours mean is told by their shape where it contradicts the layout (`kmtr.data.sources.anatomy`),
or by ``ingest.classes``. Dimensions and spacing: `kmtr.data.sources.geometry`.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kmtr.data.sources import Item, Options, anatomy, check_size, check_stored, doubles
from kmtr.data.sources.cine import Cine, orientation, oriented, plausible_frame_time, to_study
from kmtr.data.sources.geometry import Geometry, check_time, placed, shape_4d, unit_of_time
from kmtr.data.sources.layouts import (
    BIOBANK,
    CHALLENGE_CODES,
    FRAME,
    HEART_CODES,
    MNMS2,
    VENTRICLE_CODES,
    WHOLE,
    codes_of,
    contours_beside,
    find,
    is_contours,
    open_image,
    stem,
    why_unused,
)  # fmt: skip
from kmtr.types import InputError, Study

__all__ = ["SOURCE", "contents", "find", "near", "read", "why_unused"]

SOURCE = "nifti/3"

NEAR = (".img", ".hdr", ".nii.bz2", ".nii.zst", ".mgz", ".nrrd", ".mha")
"""Endings of other files of images, which are counted as not used."""

ACDC_GROUPS = {"DCM": "dcm", "HCM": "hcm", "MINF": "infarct", "RV": "rv_disease", "NOR": None}
"""The five exclusive groups of ACDC (Bernard et al., IEEE TMI 2018) -> the disease that is 1; None: healthy."""

MNMS2_VIEWS = {"SA": "sax", "LA": "lax_4ch"}

SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}

ELSEWHERE_VOXELS = 0.75
"""Contours whose corners lie further than this from the image's, in sides of its voxels, belong to another image."""


ROUNDING = 1e-3
"""Distance by which values of contours may miss a whole number, as a slope in the header leaves them."""

MOST_COMPARED = 1 << 25
"""Voxels of an image beyond which nobody looks whether another subject has it too."""


def read(item: Item, where: str, subject_id: str, options: Options) -> Study:
    """The study of one subject, one coil; see `kmtr.data.sources.read`."""
    labels: dict[str, float] = {}
    if any(stem(path) in BIOBANK for path in item.files):
        cines = _read_biobank(item, where, options)
    elif any(MNMS2.fullmatch(path.name) for path in item.files):
        cines = _read_mnms2(item, where, options)
    elif any(FRAME.fullmatch(path.name) for path in item.files):
        cine, labels = _read_acdc(item, where, options)
        cines = {"sax": cine}
    else:
        images = [path for path in item.files if not is_contours(path)]
        if len(images) > 1:
            cines = {"sax": _read_slices(images, where, options)}
        else:
            contours = next((path for path in item.files if is_contours(path)), None)
            cines = {"sax": _read_cine(images[0], contours, codes_of(images[0]), "sax", where, options)}
    return to_study(subject_id, cines, labels, SOURCE, options, where)


def near(path: Path) -> bool:
    """True if a file of another format holds images; it is counted as not used."""
    return path.name.lower().endswith(NEAR)


def contents(item: Item) -> list[doubles.Content]:
    """Digests of the first image's first frame, whichever way it is turned, and of all contours; see `doubles`."""
    found: list[doubles.Content] = []
    images = [path for path in item.files if not is_contours(path) and path.name != "Info.cfg"]
    for path in (*images[:1], *filter(is_contours, item.files)):
        image = open_image(path, "")
        frame = (..., *[0] * (len(image.shape) - 3)) if path in images else ...
        if math.prod(image.shape) > MOST_COMPARED:
            continue
        array = np.asarray(image.dataobj[frame])
        if array.size and array.min() < array.max():
            if path in images:
                found.append(("images", doubles.digest(np.sort(array, None).astype(np.float32).tobytes())))
            else:
                drawn = np.flatnonzero(array)
                found.append(
                    ("contours", doubles.digest(drawn.tobytes() + array.ravel()[drawn].astype("f4").tobytes()))
                )
    return found


# -------------------------------------------------------------------------------------------------- how they are read


def _read_biobank(item: Item, where: str, options: Options) -> dict[str, Cine]:
    of = {stem(path): path for path in item.files}
    cines = {}
    for name, (view, contours) in BIOBANK.items():
        if name in of:
            drawn = next((drawn for drawn in contours if drawn in of), None)
            codes = HEART_CODES if drawn is None else contours[drawn]
            cines[view] = _read_cine(of[name], of[drawn] if drawn else None, codes, view, where, options)
    return cines


def _read_cine(
    path: Path, contours: Path | None, layout: Mapping[int, int], view: str, where: str, options: Options
) -> Cine:
    """A 4D image and its contours, whose values mean `layout`."""
    image = _open_4d(path, where)
    _check_stored(image, shape_4d(image)[3], view, where, options)
    codes = None if contours is None else _codes(contours, image, shape_4d(image), where, options)
    return _oriented(image, _voxels(image, where, options), codes, layout, view, where, options)


def _read_slices(images: list[Path], where: str, options: Options) -> Cine:
    """The slices of one scan, each in a file of its own with contours beside it or not."""
    opened = [_open_4d(path, where) for path in images]
    check_size(where, "images", (len(opened), *shape_4d(opened[0])), 8, options)
    depths = [float(image.affine[:3, 3] @ opened[0].affine[:3, 2]) for image in opened]
    order = sorted(range(len(opened)), key=lambda n: depths[n])
    first, last = opened[order[0]], opened[order[-1]]
    drawn = [next(iter(contours_beside(path)), None) for path in images]
    codes = None
    if any(drawn):
        empty = np.zeros(shape_4d(first), np.uint8)
        parts = [
            empty if path is None else _codes(path, image, shape_4d(image), where, options)
            for path, image in zip(drawn, opened, strict=True)
        ]
        codes = np.concatenate([parts[n] for n in order], 2)
    magnitude = np.concatenate([_voxels(opened[n], where, options) for n in order], 2)
    affine = np.array(first.affine, float)
    affine[:3, 2] = (last.affine[:3, 3] - first.affine[:3, 3]) / (len(opened) - 1)
    header = first.header.copy()
    header.set_data_shape(magnitude.shape)
    sizes = header.get_zooms()
    header.set_zooms((*sizes[:2], float(np.linalg.norm(affine[:3, 2])), *sizes[3:]))
    header.set_sform(affine, int(first.header["sform_code"]) or 1)
    stack = type(first)(np.broadcast_to(np.uint8(0), magnitude.shape), affine, header)
    return _oriented(stack, magnitude, codes, codes_of(images[0]), "sax", where, options)


def _read_acdc(item: Item, where: str, options: Options) -> tuple[Cine, dict[str, float]]:
    """The cine, or its contoured frames, of an ACDC patient, and the diseases."""
    frames: dict[int, Path] = {}
    contours: dict[int, Path] = {}
    for path in item.files:
        if match := FRAME.fullmatch(path.name):
            (contours if match["contours"] else frames)[int(match["number"])] = path
    whole = next((path for path in item.files if WHOLE.fullmatch(path.name)), None)
    cine = _read_frames(whole, frames, contours, CHALLENGE_CODES, "sax", where, options)
    info = [path for path in item.files if path.name == "Info.cfg"]
    return cine, _diseases(info[0], where) if info else {}


def _read_mnms2(item: Item, where: str, options: Options) -> dict[str, Cine]:
    """The short axis and the four chambers of M&Ms-2; end-diastole is looked for in the cine, as is end-systole."""
    cines = {}
    for axis, view in MNMS2_VIEWS.items():
        of = {(match["what"], bool(match["contours"])): path for path in item.files
              if (match := MNMS2.fullmatch(path.name)) and match["axis"] == axis}  # fmt: skip
        if not of:
            continue
        frames, contours = (
            {n: of[what, drawn] for n, what in enumerate(("ED", "ES"), 1) if (what, drawn) in of}
            for drawn in (False, True)
        )
        whole, notes = of.get(("CINE", False)), tuple[str, ...]()
        if whole and contours:
            stored = _voxels(_open_4d(whole, where), where, options)
            places = {n: _place(frames[n], stored, where, options) for n in contours if n in frames}
            if len(places) == len(contours) and all(places.values()):
                frames = {min(found): frames[n] for n, found in places.items()}
                contours = {min(places[n]): path for n, path in contours.items()}
            else:
                whole, notes = None, ("contoured frames that the cine does not have: the cine is left out",)
        cine = _read_frames(whole, frames, contours, VENTRICLE_CODES, view, where, options)
        cines[view] = replace(cine, notes=cine.notes + notes)
    return cines


def _read_frames(
    whole: Path | None, frames: dict[int, Path], contours: dict[int, Path], layout: Mapping[int, int], view: str,
    where: str, options: Options,
) -> Cine:  # fmt: skip
    """A cine of which some frames are stored by themselves, with their contours.

    Args:
        whole: the cine; None: the frames are all there is, in the order of their numbers.
        frames, contours: number of a frame, from 1 -> file.
    """
    if whole:
        image = _open_4d(whole, where)
        _check_stored(image, shape_4d(image)[3], view, where, options)
        magnitude = _voxels(image, where, options)
        numbers = list(range(1, magnitude.shape[3] + 1))
        for number in sorted(set(contours) & set(frames)):
            found = _place(frames[number], magnitude, where, options)
            if found and number not in found:
                raise InputError(
                    f"{where}: the frame that is numbered {number} is frame {min(found)} of the cine; expected numbers "
                    "from 1"
                )
    else:
        numbers = sorted(frames)
        if not numbers:
            raise InputError(f"{where}: expected images, got contours only")
        images = [open_image(frames[number], where) for number in numbers]
        if len({image.shape for image in images}) != 1 or len(images[0].shape) != 3:
            raise InputError(f"{where}: expected 3D frames of one shape, got {sorted({i.shape for i in images})}")
        _check_stored(images[0], len(images), view, where, options)
        image, magnitude = images[0], np.stack([_voxels(image, where, options) for image in images], -1)
    if not set(contours) <= set(numbers):
        raise InputError(f"{where}: contours of frame {max(set(contours) - set(numbers))}, which has no image")
    codes = np.zeros(magnitude.shape, np.uint8) if contours else None
    for number, path in contours.items():
        drawn = _codes(path, image, magnitude.shape[:3], where, options)
        codes[..., numbers.index(number)] = drawn  # type: ignore[index]
    return _oriented(image, magnitude, codes, layout, view, where, options)


def _place(frame: Path, cine: np.ndarray, where: str, options: Options) -> set[int]:
    """The frames of a cine, from 1, that are voxel by voxel those of a file; none where the shapes differ."""
    one = _voxels(open_image(frame, where), where, options)
    if one.shape != cine.shape[:3]:
        return set()
    return {int(n) + 1 for n in np.flatnonzero((cine == one[..., None]).all((0, 1, 2)))}


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


# ------------------------------------------------------------------------------------------------ arrays and headers


def _open_4d(path: Path, where: str) -> Any:
    image = open_image(path, where)
    if len(shape_4d(image)) != 4:
        raise InputError(f"{where}: expected a 4D image (x, y, z, t), got {len(image.shape)}D {image.shape}")
    return image


def _check_stored(image: Any, frames: int, view: str, where: str, options: Options) -> None:
    """`sources.check_stored` of an image that is not read yet, of as many frames."""
    check_size(where, "image", image.shape, 8, options)
    stored = (*shape_4d(image)[:3], frames)
    x, y, slices, t = (stored[n] for n in placed(image, options.axes, where).order)
    check_stored(where, view, (slices, 1, t, y, x), options)


def _voxels(image: Any, where: str, options: Options) -> np.ndarray:
    """float32, dimensions as stored without empty ones; scaled as the header says."""
    stored = image.get_data_dtype()
    if stored.kind not in "biuf":
        raise InputError(f"{where}: expected magnitudes, one number a voxel, got {stored}")
    check_size(where, "image", image.shape, max(8, stored.itemsize), options)  # complex64, once it is k-space
    try:
        return np.asarray(image.dataobj, np.float32).reshape(shape_4d(image))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{where}: a NIfTI file is cut short ({type(error).__name__}); fetch it again") from None


def _codes(path: Path, image: Any, shape: tuple[int, ...], where: str, options: Options) -> np.ndarray:
    """Values of contours, uint8, dimensions as stored, of the image's shape and place."""
    contours = open_image(path, where)
    if shape_4d(contours) != shape:
        raise InputError(f"{where}: expected contours of the image's shape {shape}, got {contours.shape}")
    if _apart(contours, image) > ELSEWHERE_VOXELS:
        raise InputError(f"{where}: the contours lie elsewhere than the image: those of another patient or series?")
    array = _voxels(contours, where, options)
    codes = np.clip(np.rint(array), 0, 255).astype(np.uint8)
    if not (np.abs(array - codes) < ROUNDING).all():
        raise InputError(
            f"{where}: expected contours with whole values 0 to 255, got {array.min():g} to {array.max():g}"
        )
    return codes


def _apart(one: Any, other: Any) -> float:
    """Greatest distance between the corners of two images of one shape, in voxels (their shortest side); 0 where either
    doesn't know its place.
    """
    for image in (one, other):
        header = image.header
        if not (int(header["sform_code"]) or int(header["qform_code"])) or np.array_equal(image.affine, np.eye(4)):
            return 0.0
    corners = np.stack(np.meshgrid(*((0, n - 1) for n in one.shape[:3]), [1], indexing="ij")).reshape(4, -1)
    apart = np.linalg.norm(((one.affine - other.affine) @ corners)[:3], axis=0).max()
    return float(apart / max(np.linalg.norm(other.affine[:3, :3], axis=0).min(), 1e-9))


def _oriented(
    image: Any, magnitude: np.ndarray, codes: np.ndarray | None, layout: Mapping[int, int], view: str, where: str,
    options: Options,
) -> Cine:  # fmt: skip
    """Stored dimensions -> a cine with the header's geometry, its contours' values told (`anatomy.meaning`)."""
    geometry = placed(image, options.axes, where)
    magnitude = magnitude.transpose(geometry.order)
    codes = None if codes is None else codes.transpose(geometry.order)
    if not options.axes:
        check_time(magnitude, where)
    frame_time_s, notes = _frame_time_s(geometry.frame_step, unit_of_time(image.header))
    placed_in_space = bool(int(image.header["sform_code"]) or int(image.header["qform_code"]))
    cine = oriented(magnitude, codes, geometry.affine, view, geometry.spacing_mm, frame_time_s, placed=placed_in_space)
    if cine.classes is not None:
        told, note = _meaning(cine.classes, layout, view, where, options)
        table = np.zeros(256, np.uint8)
        table[list(told)] = list(told.values())
        cine = replace(cine, classes=table[cine.classes])
        notes += (note,) if note else ()
    return replace(cine, notes=geometry.notes + _turned_otherwise(image, geometry, view) + notes)


def _turned_otherwise(image: Any, geometry: Geometry, view: str) -> tuple[str, ...]:
    """A note where the qform, which nobody believes beside an sform, would turn the images another way."""
    header = image.header
    if not int(header["sform_code"]) or not int(header["qform_code"]) or geometry.order[3] != 3:
        return ()
    try:
        other = np.array(header.get_qform(), float)
    except Exception:  # quaternions that are none, in nibabel's ways to say so
        return ()
    other[:, :3] = other[:, list(geometry.order[:3])]
    if orientation(other, view) == orientation(geometry.affine, view):
        return ()
    return ("sform and qform turn the images differently: the sform is taken",)


def _meaning(
    codes: np.ndarray, layout: Mapping[int, int], view: str, where: str, options: Options
) -> tuple[Mapping[int, int], str]:
    """Class of each value of a view's contours, and a note or nothing."""
    key = anatomy.parse(options.classes) if view == "sax" else {}
    told, note = (key, "") if key else anatomy.meaning(codes, layout, where)
    if unknown := sorted(set(np.unique(codes).tolist()) - set(told)):
        wanted, got = (", ".join(map(str, values)) for values in (sorted(told), unknown[:5]))
        raise InputError(
            f"{where}: expected contours with values {wanted}{' (ingest.classes)' if key else ''}, got {got}; say what "
            "they mean: ingest.classes=1:lv_cavity,2:lv_myocardium,3:rv"
        )
    return told, note


def _frame_time_s(step: float, unit: str) -> tuple[float | None, tuple[str, ...]]:
    """Time between two frames in s, in the unit that the header names or else in the first that makes a cine of it; and
    a note where the two differ.
    """
    seconds = {second: plausible_frame_time(step * second) for second in (1e-3, 1.0, 1e-6)}
    if unit in SECONDS and (found := seconds[SECONDS[unit]]) is not None:
        return found, ()
    found = next((second for second in seconds.values() if second is not None), None)
    if found is None or unit not in SECONDS:
        return found, ()
    return found, (f"frames are {step:.4g} {unit} apart: taken as {1000 * found:.4g} ms",)
