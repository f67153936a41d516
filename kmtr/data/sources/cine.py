"""Parts that readers of magnitude cine share (nifti, dicom): orientation, contours, volumes, and the way to k-space.

Orientation. An affine whose axes are oblique to the patient, as any real cardiac view is, is believed: the in-plane
axes are exchanged and each axis flipped, whichever brings it nearest to these directions (`WANTED`), in which the
simulated hearts lie too, but for their slices, which go from apex to base:

    sax       slices from base to apex, y to the inferior wall, x from the septum to the lateral wall
    lax_4ch   y from apex to base, x from the right ventricle to the lateral wall
    lax_2ch   y from apex to base, x from the inferior to the anterior wall
    lax_3ch   y from apex to base, x from the inferolateral wall to the anterior septum

An axis-aligned affine has lost the orientation: the array is taken as stored, (x, y, z) = dimensions 1, 2, 3, slices in
stored order. `View.affine` keeps it all the same, so that masks lie on their source.

Contours. `View.contoured` are the classes that occur anywhere in the view's contours, so a class that a source doesn't
draw, as Sunnybrook the right ventricle, counts as unknown and not as background. A frame without any contour is
UNLABELLED as a whole. In a frame that lacks one of the view's classes (Sunnybrook draws the outer contour at
end-diastole only) whatever is not contoured is UNLABELLED too: it may be that class.

The k-space is the Fourier transform of the magnitude, cropped to `matrix` where asked, times a smooth random phase that
all frames of a slice share (`kmtr.simulation.acquisition`), a pure function of (seed, subject, slice).
The FFT of a cropped magnitude has no physical field of view: it belongs to no acquisition that a scanner could run.
All slices of the source are kept; training takes `data.sax_slices` of them evenly, neither the outermost base nor apex.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kmtr.data.affine import flipped, resized
from kmtr.data.sources import Options, anatomy
from kmtr.data.sources.anatomy import LV_CAVITY, LV_MYOCARDIUM, RV
from kmtr.data.sources.geometry import AGREE, SCALES
from kmtr.physics.fourier import crop_or_pad
from kmtr.simulation.acquisition import acquire
from kmtr.types import MYOCARDIAL_DENSITY_G_ML, SEGMENTATION_CLASSES, UNLABELLED, VIEWS, InputError, Study, View

FRAME_TIME_S = (0.005, 0.2)
"""Plausible time between two frames of a cine; other values in a header are place holders."""

NEGATIVE = 0.01
"""Largest share of a magnitude's energy in negative voxels; interpolation leaves less."""

SLICES_OF_A_VIEW = 1024
"""Views count their slices from multiples of this, so that no two slices of a subject share their phase."""

_TO_APEX = np.array([-1, 1, -1]) / np.sqrt(3)  # right, anterior, superior
_TO_LATERAL = np.array([-1, -1, 0]) / np.sqrt(2)
_TO_INFERIOR = np.cross(_TO_LATERAL, _TO_APEX)

WANTED = {
    "sax": (_TO_APEX, _TO_INFERIOR, _TO_LATERAL),
    "lax_2ch": (_TO_LATERAL, -_TO_APEX, -_TO_INFERIOR),
    "lax_3ch": ((_TO_INFERIOR - _TO_LATERAL) / np.sqrt(2), -_TO_APEX, -(_TO_INFERIOR + _TO_LATERAL) / np.sqrt(2)),
    "lax_4ch": (_TO_INFERIOR, -_TO_APEX, _TO_LATERAL),
}
"""View -> directions that z, y, x come nearest to, in a heart whose axis points left, anterior and inferior alike."""

_AXIS_ALIGNED = 0.9999
"""Cosine between each axis and one of the patient's, from which on a geometry is a place holder."""


@dataclass(frozen=True)
class Cine:
    """The images of one view group, oriented.

    Attributes:
        magnitude: float32, ``slice t y x``.
        classes: uint8, ``slice t y x``; of SEGMENTATION_CLASSES, background where nothing is drawn. None: no contours.
        spacing_mm: (z, y, x); None: unknown.
        frame_time_s: None: unknown.
        affine: as `View.affine`; None: unknown.
        notes: as `Study.notes`.
    """

    magnitude: np.ndarray
    classes: np.ndarray | None = None
    spacing_mm: tuple[float, float, float] | None = None
    frame_time_s: float | None = None
    affine: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def oriented(
    stored: np.ndarray,
    classes: np.ndarray | None,
    affine: np.ndarray,
    view: str,
    zooms: tuple[float, float, float] | None,
    frame_time_s: float | None,
    placed: bool = True,
) -> Cine:
    """A cine from arrays as files store them.

    Args:
        stored, classes: magnitudes and classes, both ``x y z t``.
        affine: see `orientation`.
        zooms: distance between voxels along x, y, z in mm; None: unknown.
        placed: the affine is where the scanner had the voxels, as no affine is that a library made up.
    """
    (z, y, x), flips = orientation(affine, view)
    flipped = tuple(axis for axis, flip in zip((0, 2, 3), flips, strict=True) if flip)

    def turn(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.flip(array.transpose(z, 3, y, x), flipped))

    spacing = None if zooms is None else (zooms[z], zooms[y], zooms[x])
    where = _turned(affine, stored.shape, (z, y, x), flips, zooms) if placed and zooms is not None else None
    return Cine(turn(stored), None if classes is None else turn(classes), spacing, frame_time_s, where)


def orientation(affine: np.ndarray, view: str = "sax") -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Stored dimensions (0, 1, 2) that are z, y, x, and those of z, y, x that are to be flipped; see the module.

    Args:
        affine: 4x4, voxel index -> mm in right-anterior-superior coordinates; the third column steps through slices.
        view: one of VIEWS.
    """
    columns = np.asarray(affine, float)[:3, :3]
    lengths = np.linalg.norm(columns, axis=0)
    if not lengths.all() or not np.isfinite(lengths).all():
        return (2, 1, 0), (False, False, False)
    directions = columns / lengths
    if (np.abs(directions).max(0) > _AXIS_ALIGNED).all():
        return (2, 1, 0), (False, False, False)
    wanted = np.stack(WANTED[view])
    orders = ((2, 1, 0), (2, 0, 1))
    order = max(orders, key=lambda order: np.abs((wanted * directions[:, order].T).sum(1)).sum())
    z, y, x = (bool(wanted[n] @ directions[:, order[n]] < 0) for n in range(3))
    return order, (z, y, x)


def _turned(
    affine: np.ndarray,
    shape: tuple[int, ...],
    order: tuple[int, int, int],
    flips: tuple[bool, bool, bool],
    zooms: tuple[float, float, float],
) -> np.ndarray | None:
    """`Cine.affine`; None where the affine's sizes are not those that are believed.

    Args:
        shape: stored, ``x y z t``.
        order, flips: `orientation`.
        zooms: along the stored axes in mm: an affine in another unit is converted, and nothing else changes it.
    """
    columns = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not np.linalg.det(affine[:3, :3]):
        return None
    unit = next((unit for unit in SCALES.values() if np.allclose(columns * unit, zooms, rtol=AGREE)), None)
    if unit is None:
        return None
    found = np.diag((unit, unit, unit, 1.0)) @ affine
    for axis, flip in zip(order, flips, strict=True):
        found = flipped(found, axis, shape[axis]) if flip else found
    z, y, x = order
    return np.ascontiguousarray(found[:, [x, y, z, 3]])


def plausible_frame_time(seconds: float) -> float | None:
    """The time between two frames, or None where it can't be one."""
    low, high = FRAME_TIME_S
    return seconds if low <= seconds <= high else None


def to_study(
    subject_id: str,
    cines: dict[str, Cine],
    labels: dict[str, float],
    source: str,
    options: Options,
    where: str,
    *,
    vendor: str | None = None,
    field_strength_t: float | None = None,
) -> Study:
    """The study of a subject's cines, one coil each; what contours of the short axis tell is added to the labels.

    Raises:
        InputError: images that are not finite, empty of any signal or no magnitudes; contours of the short axis that do
            not fit each other or the images (`anatomy`).
    """
    views = {}
    notes: list[str] = []
    for view in VIEWS:
        if view in cines:
            check_signal(cines[view].magnitude, where)
            views[view] = _view(cines[view], view, subject_id, options)
            notes += (f"{view}: {note}" for note in cines[view].notes)
    if (sax := cines.get("sax")) is not None and sax.classes is not None:
        if not options.classes:  # whoever says what they mean has looked
            anatomy.check_surrounded(sax.classes, where)
        anatomy.check_turned(sax.magnitude, sax.classes, where)
        labels = volumes(sax.classes, sax.spacing_mm) | labels
    if "heart_rate_bpm" in labels and "lvsv_ml" in labels:
        labels = {"lvco_l_min": labels["lvsv_ml"] * labels["heart_rate_bpm"] / 1000} | labels
    return Study(subject_id, views, labels, source, vendor, field_strength_t, tuple(notes))


def check_signal(magnitude: np.ndarray, where: str) -> None:
    """Refuse what can't be an image. Raises InputError."""
    if not np.isfinite(magnitude).all():
        raise InputError(f"{where}: expected finite voxels, got NaN or infinity")
    if not magnitude.any():
        raise InputError(f"{where}: expected images, got nothing but zeros")
    if magnitude.min() < 0:
        energy = np.square(magnitude, dtype=np.float64)
        if (share := float(energy[magnitude < 0].sum() / energy.sum())) > NEGATIVE:
            raise InputError(
                f"{where}: expected magnitudes, got {share:.0%} of the energy in negative voxels: a phase image, or "
                "images normalised to a mean of zero?"
            )


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


def segmentation(
    classes: np.ndarray, matrix: tuple[int, int] | None
) -> tuple[np.ndarray | None, tuple[int, ...] | None]:
    """`View.segmentation` and `View.contoured`, see the module: cropped classes with UNLABELLED where nobody contoured,
    which is decided on the whole frames; (None, None) where nothing is drawn at all.
    """
    drawn = np.stack([(classes == c).any((0, 2, 3)) for c in range(1, len(SEGMENTATION_CLASSES))])  # class t
    contoured = np.flatnonzero(drawn.any(1))
    if not len(contoured):
        return None, None
    complete = drawn[contoured].all(0)
    cropped = classes if matrix is None else crop_or_pad(classes, matrix, (-2, -1))
    unknown = ~complete.reshape(1, -1, 1, 1) & (cropped == 0)
    return np.where(unknown, np.uint8(UNLABELLED), cropped), tuple(int(c) + 1 for c in contoured)


def _view(cine: Cine, view: str, subject_id: str, options: Options) -> View:
    magnitude, matrix, affine = cine.magnitude, options.matrix, cine.affine
    if matrix is not None:
        for axis, have, want in zip((1, 0), magnitude.shape[-2:], matrix, strict=True):
            affine = None if affine is None else resized(affine, axis, have, want, cropped=True)
        magnitude = crop_or_pad(magnitude, matrix, (-2, -1))
    subject = int(subject_id.removeprefix("p-"), 16)
    kspace = np.empty((magnitude.shape[0], 1, *magnitude.shape[1:]), np.complex64)
    for index, frames in enumerate(magnitude):
        kspace[index] = acquire(
            frames,
            coils=1,
            snr_db=np.inf,  # the images have a noise of their own
            oversampling=1.0,
            seed=options.seed,
            subject=subject,
            slice_index=VIEWS.index(view) * SLICES_OF_A_VIEW + index,
        )
    classes, contoured = (None, None) if cine.classes is None else segmentation(cine.classes, matrix)
    return View(kspace, None, classes, cine.spacing_mm, cine.frame_time_s, contoured, affine)


def _ventricle(name: str, edv: float, esv: float) -> dict[str, float]:
    stroke = edv - esv
    values = {"edv_ml": edv, "esv_ml": esv, "sv_ml": stroke, "ef_pct": 100 * stroke / edv}
    return {name + key: float(value) for key, value in values.items()}
