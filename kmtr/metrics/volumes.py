"""Volumes, mass and ejection fraction from segmentations, as phenotypes under the names of `kmtr.types.PHENOTYPES`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

from kmtr.metrics.segmentation import LA, LV_CAVITY, LV_MYOCARDIUM, RA, RV, contoured_classes
from kmtr.types import MYOCARDIAL_DENSITY_G_ML, SEGMENTATION_CLASSES, UNLABELLED, InputError

SIMPSON_SLICES = 6
"""Short-axis slices from which on their sum is a volume."""

_EXTREMES = {
    "lv": ("lv_cavity", ("lvedv_ml", "lvesv_ml", "lvsv_ml", "lvef_pct")),
    "rv": ("rv", ("rvedv_ml", "rvesv_ml", "rvsv_ml", "rvef_pct")),
    "la": ("la", ("lav_max_ml", "lav_min_ml", "lasv_ml", "laef_pct")),
    "ra": ("ra", ("rav_max_ml", "rav_min_ml", "rasv_ml", "raef_pct")),
}
"""Chamber -> its curve, and names of its largest and smallest volume, their difference, and that over the largest."""


@dataclass(frozen=True)
class Masks:
    """Segmentation of one view group over the cycle, true or predicted.

    Attributes:
        segmentation: ``slice t y x`` of SEGMENTATION_CLASSES and UNLABELLED, without padded slices.
        spacing_mm: distance between these slices (thickness and gap), pixel height, pixel width. Where a reader chose
            some of a stack's slices, it is the distance between those chosen.
        contoured: classes that the source draws (`View.contoured`), of others nothing is known; None: all.
    """

    segmentation: Integer[np.ndarray, "slice t y x"]
    spacing_mm: tuple[float, float, float]
    contoured: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not all(size > 0 for size in self.spacing_mm):
            raise InputError(f"spacing_mm: expected three sizes above 0, got {self.spacing_mm}")

    def areas_mm2(self, *values: int) -> Float[np.ndarray, "slice t"]:
        """Area of some classes together. NaN where a pixel of the slice is UNLABELLED or one is not contoured."""
        _, height, width = self.spacing_mm
        area = np.isin(self.segmentation, values).sum((2, 3)) * (height * width)
        known = (self.segmentation != UNLABELLED).all((2, 3)) & (set(values) <= set(contoured_classes(self.contoured)))
        return np.where(known, area, np.nan)


def simpson_ml(sax: Masks, *values: int) -> Float[np.ndarray, " t"]:
    """Volume of some classes together over the cycle: sum of areas in short-axis slices times their distance.

    NaN with fewer than 6 slices, which say too little of what lies between them.
    """
    volume = sax.areas_mm2(*values).sum(0) * sax.spacing_mm[0] / 1000
    return volume if len(sax.segmentation) >= SIMPSON_SLICES else np.full_like(volume, np.nan)


def area_length_ml(a: Masks, b: Masks, *values: int) -> Float[np.ndarray, " t"]:
    """Volume of some classes together over the cycle from two long-axis views, 8 A1 A2 / (3 pi L): an ellipsoid's.

    L is the shorter of the two lengths (`length_mm`), the rule of echocardiography for the left atrium. Given the same
    view twice this is the single-plane formula 8 A^2 / (3 pi L). 0 where either view does not show the classes.

    Raises:
        InputError: numbers of frames differ, or a view has not exactly one slice.
    """
    shapes = [view.segmentation.shape for view in (a, b)]
    if shapes[0][0] != 1 or shapes[0][:2] != shapes[1][:2]:
        raise InputError(
            f"area-length: expected two long-axis views of one slice and as many frames, got {shapes[0][:2]} and "
            f"{shapes[1][:2]} slices and frames"
        )
    area = [view.areas_mm2(*values)[0] for view in (a, b)]
    length = np.min([[length_mm(frame, view, values) for frame in view.segmentation[0]] for view in (a, b)], axis=0)
    product = area[0] * area[1]
    volume = 8 * product / (3 * np.pi * np.where(length > 0, length, 1)) / 1000
    return np.where(product == 0, 0.0, volume)


def length_mm(frame: Integer[np.ndarray, "y x"], view: Masks, values: Sequence[int]) -> float:
    """Extent of some classes together along their principal axis (of largest second moment), a pixel included; 0 where
    they are not there.
    """
    pixel = np.array(view.spacing_mm[1:])
    points = np.argwhere(np.isin(frame, values)) * pixel
    if not len(points):
        return 0.0
    points = points - points.mean(0)
    axis = np.linalg.eigh(points.T @ points)[1][:, -1]
    return float(np.ptp(points @ axis) + np.linalg.norm(axis * pixel))


def volume_curves(views: Mapping[str, Masks]) -> dict[str, Float[np.ndarray, " t"]]:
    """Volume in mL of each structure over the cycle, by its name in SEGMENTATION_CLASSES.

    Ventricles and myocardium: Simpson's rule on `sax` from six slices on; otherwise LV cavity and myocardium (what
    encloses both less the cavity) by the biplane area-length formula on `lax_2ch` and `lax_4ch`. Left atrium: biplane.
    Right atrium: single-plane area-length on `lax_4ch`, the only view that shows it. What these views cannot give is
    absent; frames of which it is unknown are NaN.

    Args:
        views: view group (one of kmtr.types.VIEWS) -> its masks.
    """
    curves: dict[int, np.ndarray] = {}
    if "lax_4ch" in views:
        curves[RA] = area_length_ml(views["lax_4ch"], views["lax_4ch"], RA)
    if "lax_4ch" in views and "lax_2ch" in views:
        long = views["lax_2ch"], views["lax_4ch"]
        curves[LA] = area_length_ml(*long, LA)
        curves[LV_CAVITY] = area_length_ml(*long, LV_CAVITY)
        curves[LV_MYOCARDIUM] = area_length_ml(*long, LV_CAVITY, LV_MYOCARDIUM) - curves[LV_CAVITY]
    if "sax" in views:
        stack = {value: simpson_ml(views["sax"], value) for value in (LV_CAVITY, LV_MYOCARDIUM, RV)}
        curves |= {value: curve for value, curve in stack.items() if not np.isnan(curve).all()}
    return {SEGMENTATION_CLASSES[value]: curve for value, curve in sorted(curves.items()) if not np.isnan(curve).all()}


def mask_phenotypes(views: Mapping[str, Masks], heart_rate_bpm: float = float("nan")) -> dict[str, float]:
    """Phenotypes of one subject from its masks, at each chamber's own extremes over the cycle.

    Volumes in mL and ejection fractions in %; LV mass in g, 1.05 g/mL times the myocardium at the frame of the largest
    LV cavity; cardiac output in L/min, of the heart rate.

    Returns:
        All of LV, RV, LA and RA; NaN where `volume_curves` has no curve, or fewer than two frames of it. A chamber that
        is found in no frame has volume 0 and ejection fraction 0: an error that counts, not a subject left out.
    """
    curves = volume_curves(views)
    out: dict[str, float] = {}
    for curve_name, names in _EXTREMES.values():
        out |= dict(zip(names, _extremes(curves.get(curve_name, np.full(1, np.nan))), strict=True))
    out["lvco_l_min"] = out["lvsv_ml"] * heart_rate_bpm / 1000
    out["lvm_g"] = float("nan")
    if {"lv_cavity", "lv_myocardium"} <= set(curves) and not np.isnan(out["lvedv_ml"]):
        end_diastole = int(np.nanargmax(curves["lv_cavity"]))
        out["lvm_g"] = float(MYOCARDIAL_DENSITY_G_ML * curves["lv_myocardium"][end_diastole])
    return out


def _extremes(curve: Float[np.ndarray, " t"]) -> tuple[float, float, float, float]:
    """Largest and smallest volume, their difference (mL), and that over the largest (%)."""
    known = curve[~np.isnan(curve)]
    if len(known) < 2:
        return (float("nan"),) * 4
    full, empty = float(known.max()), float(known.min())
    return full, empty, full - empty, 100 * (full - empty) / full if full > 0 else 0.0
