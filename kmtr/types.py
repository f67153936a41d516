"""The axis legend and the records that pass between stages. Imports nothing of ours.

Axes, always in this order and under these names:

    k-space   complex   ``batch slice coil t ky kx``
    image     real      ``batch slice t y x``
    tokens    real      ``batch token channel``

``ky`` is the phase-encoding direction (undersampled), ``kx`` the readout (always complete); the centre of
k-space is index ``n // 2``. Masks say what True means and are never called just "mask":

    sampled   True = acquired by the scanner (or kept by a simulated pattern)
    hidden    True = acquired, but withheld from the encoder by masked pretraining
    padded    True = not data
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

VIEWS = ("sax", "lax_2ch", "lax_3ch", "lax_4ch")
"""View groups of a cardiac study, in the order in which their slices are concatenated."""

PHENOTYPES = {
    "lvedv_ml": "mL",
    "lvesv_ml": "mL",
    "lvsv_ml": "mL",
    "lvef_pct": "%",
    "lvco_l_min": "L/min",
    "lvm_g": "g",
    "rvedv_ml": "mL",
    "rvesv_ml": "mL",
    "rvsv_ml": "mL",
    "rvef_pct": "%",
    "lav_max_ml": "mL",
    "lav_min_ml": "mL",
    "lasv_ml": "mL",
    "laef_pct": "%",
    "rav_max_ml": "mL",
    "rav_min_ml": "mL",
    "rasv_ml": "mL",
    "raef_pct": "%",
    "wall_thickness_mm": "mm",
    "wall_thickness_max_mm": "mm",
    "thickening_min_pct": "%",
    "gcs_pct": "%",
}
"""Regression targets: name (its ending is the unit) -> unit. Missing values are NaN / null.

Wall: `wall_thickness_mm` is the LV's mean at end-diastole and `wall_thickness_max_mm` that of its thickest segment;
`thickening_min_pct` is the systolic thickening of the segment that thickens least; `gcs_pct` the global circumferential
strain at end-systole (negative where the wall shortens). Segments: the 16 of the American Heart Association (Cerqueira
2002).
"""

PROBED = ("lvedv_ml", "lvef_pct", "lvm_g")
"""Phenotypes that validation during training, the search and an evaluation probe, unless told otherwise."""

STUDIED = ("lvedv_ml", "lvesv_ml", "lvef_pct", "lvm_g", "rvedv_ml")
"""Phenotypes whose mean R2 a study compares, unless told otherwise."""

DISEASES = ("cad", "infarct", "stroke", "hypertension", "diabetes", "dcm", "hcm", "rv_disease", "dilated_atria")
"""Binary targets; missing values are NaN / null."""

COVARIATES = {"male": "0 or 1", "age_y": "years", "bsa_m2": "m2", "heart_rate_bpm": "1/min"}
"""Known of the person beside the heart: for strata and for indexing, no targets."""

LABELS = (*PHENOTYPES, *DISEASES, *COVARIATES)
"""All numbers that a study may carry."""

MYOCARDIAL_DENSITY_G_ML = 1.05
"""Mass of myocardium over its volume, g/mL."""

SEGMENTATION_CLASSES = ("background", "lv_cavity", "lv_myocardium", "rv", "la", "ra")
"""Names of the segmentation values 0 to 5."""

UNLABELLED = 255
"""Segmentation value of a pixel, or of a whole frame, that nobody contoured."""


_PASSWORD = re.compile(r"(?<=://)[^/\s@'\"]*@")


def redact(text: str) -> str:
    """``scheme://user:password@host`` -> ``scheme://***@host``, anywhere in the text."""
    return _PASSWORD.sub("***@", text)


class KmtrError(Exception):
    """An error that the user can act on: one line, without traceback. The command ends with status 1."""

    def __str__(self) -> str:
        """One line without passwords, whatever of a user's text is quoted in it."""
        return redact(" ".join(super().__str__().splitlines()))


class StoppedError(KmtrError):
    """A run that was asked to stop, and goes on with the same command. Status 1."""


class InputError(KmtrError, ValueError):
    """Bad input (configuration, dataset, source file), found before work starts. Status 2."""


def lines_of(error: BaseException | str) -> list[str]:
    """Lines of what an error (or its text) says that are not empty; its kind where it says nothing."""
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]


def first_line(error: BaseException) -> str:
    """First line of what an error says: the reason, where a library puts advice behind it."""
    return lines_of(error)[0]


def last_line(error: BaseException | str) -> str:
    """Last line of what an error says: the reason, where a traceback comes before it."""
    return lines_of(error)[-1]


def with_kind(error: BaseException) -> str:
    """First line of an error that is not ours, behind its kind, which may be half of what it says."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def find_cause(error: BaseException | None, kind: type[KmtrError]) -> KmtrError | None:
    """The first error of `kind` among an error, its causes and what Ray wrapped; None if there is none."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        error = queue.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, kind):
            lines = str(error).strip().splitlines() or [""]
            marked = [line.partition(f"{kind.__name__}: ")[2] for line in lines if f"{kind.__name__}: " in line]
            return kind(marked[0] if marked else lines[0])  # Ray puts a traceback before, and advice behind
        queue += [error.__cause__, error.__context__, getattr(error, "cause", None)]
    return None


@dataclass(frozen=True)
class View:
    """The k-space of one view group of one subject.

    Attributes:
        kspace: complex64, ``slice coil t ky kx``; centred orthonormal FFT convention; arbitrary units. Which end of the
            short axis comes first is the source's choice: base, or in simulated hearts the apex.
        sampled: bool, ``slice t ky``; what the source acquired. None: everything.
        segmentation: uint8, ``slice t y x``; see SEGMENTATION_CLASSES and UNLABELLED. None: no contours at all.
        spacing_mm: distance between slices, pixel height, pixel width (z, y, x) in mm; None: unknown.
        frame_time_s: time between two frames in s; None: unknown.
        contoured: the classes that the source draws, ascending, of 1 to 5; a class that is not among them may be
            anywhere in the background. None: all that the view shows.
        affine: float64, 4x4; voxel (x, y, slice) of the image -> mm in the scanner's right-anterior-superior
            coordinates, as NIfTI has it; None: unknown.
    """

    kspace: np.ndarray
    sampled: np.ndarray | None = None
    segmentation: np.ndarray | None = None
    spacing_mm: tuple[float, float, float] | None = None
    frame_time_s: float | None = None
    contoured: tuple[int, ...] | None = None
    affine: np.ndarray | None = None

    def __post_init__(self) -> None:
        k = self.kspace
        if k.ndim != 5 or k.dtype != np.complex64:
            raise InputError(f"kspace: expected complex64 with axes slice coil t ky kx, got {k.dtype} {k.shape}")
        slices, _, frames, ny, nx = k.shape
        for name, array, shape, dtype in (
            ("sampled", self.sampled, (slices, frames, ny), np.bool_),
            ("segmentation", self.segmentation, (slices, frames, ny, nx), np.uint8),
        ):
            if array is not None and (array.shape != shape or array.dtype != dtype):
                raise InputError(f"{name}: expected {np.dtype(dtype)} {shape}, got {array.dtype} {array.shape}")
        if self.affine is not None and not (
            self.affine.shape == (4, 4)
            and np.isfinite(self.affine).all()
            and np.array_equal(self.affine[3], (0, 0, 0, 1))
            and np.linalg.det(self.affine)
        ):
            raise InputError("affine: expected 4 x 4 finite numbers that place voxels, the last row 0 0 0 1")
        drawn = range(1, len(SEGMENTATION_CLASSES))
        if self.contoured is not None and (
            list(self.contoured) != sorted(set(self.contoured)) or not set(self.contoured) <= set(drawn)
        ):
            raise InputError(
                f"contoured: expected ascending classes of {drawn[0]} to {drawn[-1]}, got {self.contoured}"
            )


@dataclass(frozen=True)
class Study:
    """One subject: k-space of one or more view groups, and what is known about the heart.

    Attributes:
        subject_id: pseudonym; never a name, a date or a path.
        views: view group (one of VIEWS) -> View.
        labels: one of LABELS -> value in its unit; absent or NaN = unknown.
        source: the format or simulator it came from, with its version.
        vendor, field_strength_t: of the scanner; field strength in tesla.
        notes: lines for `refused.json` about what the source has of the subject and the study has not, and about
            doubts and how they were settled; they name neither subject nor file.
    """

    subject_id: str
    views: dict[str, View]
    labels: dict[str, float] = field(default_factory=dict)
    source: str = ""
    vendor: str | None = None
    field_strength_t: float | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.views:
            raise InputError("study: expected at least one view, got none")
        for what, names, known in (
            ("view", self.views, VIEWS),
            ("label", self.labels, LABELS),
        ):
            unknown = set(names) - set(known)
            if unknown:
                raise InputError(f"study: unknown {what} {sorted(unknown)[0]!r}, expected one of {', '.join(known)}")
