"""A beating heart in three dimensions, cut along real view planes: (seed, index) -> Study with exact labels.

Heart coordinates (mm): w runs along the LV's long axis from the apex (epicardium at w = 0) to the base, u points from
the LV to the RV, v = w x u to the anterior wall. Every chamber is a closed form whose volume is known:

    LV cavity    spheroid truncated by the base plane; its volume follows the cycle
    myocardium   between it and a larger spheroid; the wall's thickness is solved so that its volume never changes
    RV           crescent r_epi(w) < r < r_epi(w) (1 + k(w) p(angle)), k and p polynomials: so is its volume
    LA, RA       truncated spheroids between the base plane and a fixed roof; they fill while the base moves to the apex

So labels are exact and no pixel is ever counted. What is drawn around the heart (lungs, chest wall, liver, vessels) are
simple smooth bodies in patient coordinates (left, posterior, superior). It is a plain heart: circular cross-sections,
no valves, no papillary muscles, no twist, no regional motion, no blood flow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from kmtr.physics.coils import phase_map
from kmtr.physics.fourier import fft2c
from kmtr.physics.noise import Purpose, add_noise, generator
from kmtr.types import VIEWS, InputError, Study, View

SOURCE = "kmtr-phantom-1"
FIELD_OF_VIEW_MM = 240.0
"""Of the longer side of the image."""

MYOCARDIAL_DENSITY = 1.05
"""g/mL."""

LAX_ANGLE_DEG = {"lax_4ch": 0.0, "lax_3ch": 50.0, "lax_2ch": 92.0}
"""Angle from u to the plane's second direction, about the LV axis; 2ch passes beside the RV's tips."""

LV_TRUNCATION = 0.3
"""How far beyond its equator the LV's spheroid reaches to the base, in polar half-axes."""
ATRIAL_TRUNCATION = 0.6
APEX_TO_WALL = 0.7
"""Thickness of the apex over that of the wall at the equator."""
RV_CENTRE_RAD, RV_HALF_ANGLE_RAD = math.radians(5), math.radians(78)
RV_APEX = 0.1
"""Height of the RV's apex over the LV's length."""
VALVE_MM = 2.0
"""Between the base plane and an atrium."""
ATRIAL_SEPTUM_U_MM = 16.0


@dataclass(frozen=True)
class Anatomy:
    """Who the subject is and how the heart fills and empties; all that labels and shape follow from.

    Attributes:
        male: sex.
        bsa_m2: body surface area; weight_z: how heavy for the size, in standard deviations.
        heart_rate: beats per minute.
        lvedv_ml, lvesv_ml, rvedv_ml, rvesv_ml: ventricles at end-diastole (phase 0) and end-systole.
        lav_max_ml, lav_min_ml, rav_max_ml, rav_min_ml: atria at the ventricles' end-systole and end-diastole.
        lvm_g: mass of the LV myocardium.
        length_mm: LV from epicardial apex to base plane at end-diastole.
        base_motion_mm: descent of the base plane at end-systole.
        septal_shift: displacement of the cavity away from the septum, over the wall's thickness.
        es_phase, filling_phase, plateau_phase, kick_phase: end-systole, begin of early filling, begin of diastasis,
            begin of the atrial kick; fractions of the cycle.
        kick: part of the stroke volume that the kick adds.
        dcm, hcm, rv_disease: diseases.
    """

    male: bool
    bsa_m2: float
    weight_z: float
    heart_rate: float
    lvedv_ml: float
    lvesv_ml: float
    rvedv_ml: float
    rvesv_ml: float
    lav_max_ml: float
    lav_min_ml: float
    rav_max_ml: float
    rav_min_ml: float
    lvm_g: float
    length_mm: float
    base_motion_mm: float
    septal_shift: float
    es_phase: float
    filling_phase: float
    plateau_phase: float
    kick_phase: float
    kick: float
    dcm: bool
    hcm: bool
    rv_disease: bool


@dataclass(frozen=True)
class Heart:
    """The shape at some phases of the cycle; float64 arrays ``t``, mm. (u, v, w) are heart coordinates.

    Attributes:
        base: w of the base plane; centre: w of the LV's equator.
        endo_radius, endo_half: equatorial radius and polar half-axis of the LV cavity's spheroid.
        epi_radius, epi_half: of the epicardium's, same centre.
        endo_u: u of the cavity's axis (the epicardium's is 0).
        rv_apex: w; rv_width: k at the base plane.
        la_*, ra_*: radius, polar half-axis and centre of the atria's spheroids.
    """

    base: np.ndarray
    centre: np.ndarray
    endo_radius: np.ndarray
    endo_half: np.ndarray
    epi_radius: np.ndarray
    epi_half: np.ndarray
    endo_u: np.ndarray
    rv_apex: np.ndarray
    rv_width: np.ndarray
    la_radius: np.ndarray
    la_half: np.ndarray
    la_u: np.ndarray
    la_v: np.ndarray
    la_w: np.ndarray
    ra_radius: np.ndarray
    ra_half: np.ndarray
    ra_u: np.ndarray
    ra_v: np.ndarray
    ra_w: np.ndarray


@dataclass(frozen=True)
class Distances:
    """Distance to each surface, mm, negative inside; float32 ``t ...``. The sign is exact, the size to first order."""

    endo: np.ndarray
    epi: np.ndarray
    rv: np.ndarray
    la: np.ndarray
    ra: np.ndarray


# ---------------------------------------------------------------------------------------------------- population


def anatomy(index: int, *, seed: int) -> Anatomy:
    """Subject `index` of the population `seed`: correlated as in people, for body size drives volumes and mass.

    Means and spreads of the healthy are of the order of the UK Biobank reference (Petersen et al. 2017: LVEF 61 +- 5 %
    and 58 +- 5 %, LV mass 42 +- 7 and 53 +- 9 g/m2 for women and men); the rest, and the diseases (7 % DCM, 7 % HCM,
    8 % RV disease) are plausible choices, no epidemiology. Without regurgitation both ventricles eject the same
    volume, to a few per cent.
    """
    rng = generator(seed, index, Purpose.ANATOMY)
    n = iter(rng.standard_normal(24).tolist())
    male, disease, right = rng.random() < 0.5, rng.random(), rng.random()
    risk = 1.3 if male else 0.7
    dcm, hcm = disease < 0.07 * risk, disease > 1 - 0.07 * risk
    rv_disease = right < 0.08

    size = math.exp(0.085 * _clip(next(n)))
    bsa = (1.98 if male else 1.74) * size
    weight_z = _clip(next(n))
    tall = math.exp(0.15 * _clip(next(n)))  # the LV's volume for the body's size
    lvedv = (160 if male else 121) * size * tall
    lvef = (58 if male else 61) + 5 * _clip(next(n))
    lvm = (52.5 if male else 41.5) * bsa * math.sqrt(tall) * math.exp(0.14 * _clip(next(n)))
    severity, other = _clip(next(n)), _clip(next(n))
    length = 1.0
    septal_shift = 0.1 * rng.random()
    if dcm:
        lvedv *= math.exp(0.35 + 0.1 * severity)
        lvef = 33 - 5 * severity + 2 * other
        lvm *= 1.25
        length = 0.95
    if hcm:
        lvedv *= 0.92
        lvef += 5
        lvm *= math.exp(0.45 + 0.12 * severity)
        septal_shift = 0.3 + 0.2 * rng.random()
    lvef = min(max(lvef, 15.0), 78.0)
    stroke = lvedv * lvef / 100

    rv_stroke = stroke * math.exp(0.04 * _clip(next(n)))
    rvef = 56 + 0.35 * (min(lvef, 65) - 59) + 4.5 * _clip(next(n))
    if rv_disease:
        rvef -= 16 + 2 * _clip(next(n))
    rvef = min(max(rvef, 22.0), 75.0)
    rvedv = rv_stroke / rvef * 100

    # A stiff or failing ventricle fills its atrium more and is emptied into less.
    strained = 0.25 * dcm + 0.2 * hcm
    lav_max = 68 * (bsa / 1.86) * math.exp(0.2 * _clip(next(n)) + strained)
    laef = 60 + 6 * _clip(next(n)) - 40 * strained
    rav_max = 80 * (bsa / 1.86) * math.exp(0.2 * _clip(next(n)) + 0.25 * rv_disease)
    raef = 48 + 6 * _clip(next(n)) - 10 * rv_disease

    heart_rate = min(max(66 + 9 * _clip(next(n)) + 8 * dcm, 45.0), 105.0)
    # Systole lasts about a third of a second at rest, whatever the rate.
    es_phase = min(max(0.335 * heart_rate / 60, 0.30), 0.45)
    length *= 95 * (lvedv / 145) ** (1 / 3) * math.exp(0.04 * _clip(next(n)))
    return Anatomy(
        male=male,
        bsa_m2=bsa,
        weight_z=weight_z,
        heart_rate=heart_rate,
        lvedv_ml=lvedv,
        lvesv_ml=lvedv - stroke,
        rvedv_ml=rvedv,
        rvesv_ml=rvedv - rv_stroke,
        lav_max_ml=lav_max,
        lav_min_ml=lav_max * (1 - laef / 100),
        rav_max_ml=rav_max,
        rav_min_ml=rav_max * (1 - raef / 100),
        lvm_g=lvm,
        length_mm=length,
        base_motion_mm=length * 0.15 * (lvef / 59) * math.exp(0.1 * _clip(next(n))),
        septal_shift=septal_shift,
        es_phase=es_phase,
        filling_phase=es_phase + 0.05,
        plateau_phase=es_phase + 0.25,
        kick_phase=0.84,
        kick=0.25 + 0.05 * _clip(next(n)),
        dcm=dcm,
        hcm=hcm,
        rv_disease=rv_disease,
    )


def labels(who: Anatomy) -> dict[str, float]:
    """Exact phenotypes and diseases, of the continuous cycle (not of its nearest sampled frames).

    Volumes are the geometry's, by construction. Wall thickness is that at the LV's equator at end-diastole, mean over
    the circumference.
    """
    out: dict[str, float] = {}
    for chamber, most, least, full, empty in (
        ("lv", "edv_ml", "esv_ml", who.lvedv_ml, who.lvesv_ml),
        ("rv", "edv_ml", "esv_ml", who.rvedv_ml, who.rvesv_ml),
        ("la", "v_max_ml", "v_min_ml", who.lav_max_ml, who.lav_min_ml),
        ("ra", "v_max_ml", "v_min_ml", who.rav_max_ml, who.rav_min_ml),
    ):
        out |= {
            chamber + most: full,
            chamber + least: empty,
            f"{chamber}sv_ml": full - empty,
            f"{chamber}ef_pct": 100 * (full - empty) / full,
        }
    diastole = heart(who, np.zeros(1))
    out["lvco_l_min"] = out["lvsv_ml"] * who.heart_rate / 1000
    out["lvm_g"] = who.lvm_g
    out["wall_thickness_mm"] = float(diastole.epi_radius[0] - diastole.endo_radius[0])
    out |= {"dcm": float(who.dcm), "hcm": float(who.hcm), "rv_disease": float(who.rv_disease)}
    return out


def _clip(z: float) -> float:
    """A standard normal number without tails that no heart has."""
    return min(max(z, -2.5), 2.5)


# ------------------------------------------------------------------------------------------------------ geometry


def contraction(who: Anatomy, phase: np.ndarray) -> np.ndarray:
    """How far the ventricles have emptied, in [0, 1]: 0 at end-diastole (phase 0), 1 from end-systole to filling.

    Ejection, isovolumic relaxation, early filling, diastasis, atrial kick, joined with half cosines.
    """
    knots = (0.0, who.es_phase, who.filling_phase, who.plateau_phase, who.kick_phase, 1.0)
    values = (0.0, 1.0, 1.0, who.kick, who.kick, 0.0)
    position = np.mod(phase, 1.0)
    step = np.clip(np.searchsorted(knots, position, side="right") - 1, 0, len(knots) - 2)
    start, stop = np.take(knots, step), np.take(knots, step + 1)
    ease = 0.5 - 0.5 * np.cos(np.pi * (position - start) / (stop - start))
    return np.take(values, step) + ease * (np.take(values, step + 1) - np.take(values, step))


def heart(who: Anatomy, phase: np.ndarray) -> Heart:
    """The shape at `phase` (``t``, fractions of the cycle), with exactly the volumes of `who`."""
    s = contraction(who, phase)
    base = who.length_mm - who.base_motion_mm * s
    lv, rv, la, ra = (
        1000 * (start + (stop - start) * s)
        for start, stop in (
            (who.lvedv_ml, who.lvesv_ml),
            (who.rvedv_ml, who.rvesv_ml),
            (who.lav_min_ml, who.lav_max_ml),
            (who.rav_min_ml, who.rav_max_ml),
        )
    )
    wall = _wall(lv, 1000 * who.lvm_g / MYOCARDIAL_DENSITY, base)
    endo_radius, endo_half, epi_half = _ventricle(lv, base, wall)
    epi_radius, centre = endo_radius + wall, epi_half
    rv_apex = RV_APEX * base
    atria = []
    for volume, least, side, v in ((la, who.lav_min_ml, -1, -8.0), (ra, who.rav_min_ml, 1, -3.0)):
        roof = who.length_mm + VALVE_MM + 41 * (least / 29) ** (1 / 3)  # of about 41 mm when it is emptiest
        half = (roof - base - VALVE_MM) / (1 + ATRIAL_TRUNCATION)
        radius = np.sqrt(volume / (math.pi * half * _fullness(ATRIAL_TRUNCATION)))
        # The septum between the atria stays where it is.
        atria += [radius, half, ATRIAL_SEPTUM_U_MM + side * (radius + 2), np.full_like(s, v), roof - half]
    return Heart(
        base,
        centre,
        endo_radius,
        endo_half,
        epi_radius,
        epi_half,
        -who.septal_shift * wall,
        rv_apex,
        _rv_width(rv, base, rv_apex, centre, epi_radius, epi_half),
        *atria,
    )


def _fullness(truncation: float) -> float:
    """Volume over (pi radius^2 half-axis) of a spheroid cut at `truncation` half-axes beyond its equator."""
    return 2 / 3 + truncation - truncation**3 / 3


def _ventricle(volume: np.ndarray, base: np.ndarray, wall: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cavity's radius and half-axis, epicardium's half-axis, for a volume (mm^3), a base plane and a wall (mm)."""
    endo_half = (base - APEX_TO_WALL * wall) / (1 + LV_TRUNCATION)
    radius = np.sqrt(volume / (math.pi * endo_half * _fullness(LV_TRUNCATION)))
    return radius, endo_half, endo_half + APEX_TO_WALL * wall


def _wall(volume: np.ndarray, myocardium: float, base: np.ndarray) -> np.ndarray:
    """The thickness (mm) at which the myocardium has its volume (mm^3), which grows with it: 32-fold bisection."""
    low, width = np.zeros_like(volume), 40.0
    for _ in range(5):  # to 1e-6 mm
        width /= 32
        wall = low + width * np.arange(32)[:, None]
        radius, endo_half, half = _ventricle(volume, base, wall)
        above = LV_TRUNCATION * endo_half  # of the base over the common equator
        epi = math.pi * (radius + wall) ** 2 * (half * 2 / 3 + above - above**3 / (3 * half**2))
        low = low + width * ((epi - volume <= myocardium).sum(0) - 1)
    return low + width / 2


def _rv_width(
    volume: np.ndarray, base: np.ndarray, apex: np.ndarray, centre: np.ndarray, radius: np.ndarray, half: np.ndarray
) -> np.ndarray:
    """k at the base plane for a volume (mm^3).

    The cross-section at w is the integral over the angle of ((1 + k p)^2 - 1) r_epi^2 / 2 = r_epi^2 (k P1 + k^2 P2 / 2)
    with p = 1 - (angle / half-angle)^4, so P1 = 2 half-angle 4/5 and P2 = 2 half-angle 32/45. With k and r_epi^2 both
    quadratic in w, four Gauss points integrate it exactly, and the volume is a quadratic in k at the base.
    """
    nodes, weights = np.polynomial.legendre.leggauss(4)
    height = (nodes[:, None] + 1) / 2
    area = radius**2 * (1 - ((apex + height * (base - apex) - centre) / half) ** 2)
    weight = weights[:, None] / 2 * (base - apex)
    rise = _rv_rise(height)
    linear = 2 * RV_HALF_ANGLE_RAD * 4 / 5 * (weight * area * rise).sum(0)
    square = 2 * RV_HALF_ANGLE_RAD * 32 / 45 / 2 * (weight * area * rise**2).sum(0)
    return (np.sqrt(linear**2 + 4 * square * volume) - linear) / (2 * square)


def _rv_rise(height: np.ndarray) -> np.ndarray:
    """k over k at the base plane, `height` from 0 at the RV's apex to 1 there."""
    return height * (1.5 - 0.5 * height)


def distances(shape: Heart, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> Distances:
    """Distances to the chambers' surfaces at points in heart coordinates.

    Args:
        u, v, w: float32, mm, one common shape ``...``.

    Returns:
        Distances, each ``t ...``.
    """
    s = _columns(shape, u.ndim)
    vv, ww = v * v, (w - s.centre) ** 2
    below = w - s.base
    rr = u * u + vv
    endo = np.maximum(_spheroid((u - s.endo_u) ** 2 + vv, ww, s.endo_radius, s.endo_half), below)
    epi = np.maximum(_spheroid(rr, ww, s.epi_radius, s.epi_half), below)
    # RV: the radial distance, shortened by a typical slant of its free wall.
    angle = _angle(u, v)
    profile = 1 - np.square(np.square(np.minimum(angle * np.float32(1 / RV_HALF_ANGLE_RAD), 1)))
    height = w - s.rv_apex
    width = _rv_rise(np.maximum(height, 0) * (1 / (s.base - s.rv_apex))) * s.rv_width
    width *= profile
    width += 1
    outer = np.sqrt(np.maximum(s.epi_radius**2 - ww * (s.epi_radius / s.epi_half) ** 2, 0))
    outer *= width
    radius = np.sqrt(rr)
    rv = radius - outer
    rv *= np.float32(0.85)
    np.maximum(rv, -epi, out=rv)
    np.maximum(rv, below, out=rv)
    # Where the crescent has no thickness its surfaces would meet at distance 0: beyond its tips and below its apex.
    rv += np.maximum(angle - np.float32(RV_HALF_ANGLE_RAD), 0) * radius
    np.maximum(rv, -height, out=rv)
    above = np.float32(VALVE_MM) - below
    atria = (
        np.maximum(_spheroid((u - cu) ** 2 + (v - cv) ** 2, (w - cw) ** 2, radius, half), above)
        for cu, cv, cw, radius, half in (
            (s.la_u, s.la_v, s.la_w, s.la_radius, s.la_half),
            (s.ra_u, s.ra_v, s.ra_w, s.ra_radius, s.ra_half),
        )
    )
    return Distances(endo, epi, rv, *atria)


def segment(d: Distances) -> np.ndarray:
    """Class of each point (types.SEGMENTATION_CLASSES), uint8 ``t ...``; chambers never overlap."""
    out = np.zeros(d.endo.shape, np.uint8)
    for value, inside in ((5, d.ra < 0), (4, d.la < 0), (3, d.rv < 0), (2, d.epi < 0), (1, d.endo < 0)):
        out[inside] = value
    return out


def _columns(shape: Heart, ndim: int) -> Heart:
    """The same heart in float32 arrays ``t 1 ...``, to go against `ndim` axes of points."""
    columns = (getattr(shape, field.name).astype(np.float32) for field in fields(shape))
    return Heart(*(column.reshape(-1, *[1] * ndim) for column in columns))


def _angle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Angle (rad) between a point and the RV's middle direction, about the LV axis, in [0, pi]."""
    cosine, sine = math.cos(RV_CENTRE_RAD), math.sin(RV_CENTRE_RAD)
    return np.arctan2(np.abs(cosine * v - sine * u), cosine * u + sine * v)


def _spheroid(rr: np.ndarray, ww: np.ndarray, radius: np.ndarray, half: np.ndarray) -> np.ndarray:
    """First-order distance to a spheroid: |q| (|q| - 1) / |grad|, q the point over the half-axes (exact sign)."""
    a, b = radius**-2, half**-2
    r, z = rr * a, ww * b
    square = r + z
    r *= a
    z *= b
    r += z
    r += np.float32(1e-12)
    gradient = np.sqrt(r, out=r)
    square -= np.sqrt(square)
    square /= gradient
    return square


# ------------------------------------------------------------------------------------------------------ rendering


@dataclass(frozen=True)
class Scene:
    """What is around the heart and how bright it all is; one per subject.

    Attributes:
        axes: rows u, v, w in patient coordinates (left, posterior, superior).
        position: of the heart's middle (u = v = 0, w = half the length) in the torso, mm.
        torso: half-axes to the left and to the back, mm; fat_mm: under the skin; sac_mm: around the heart.
        blood, muscle, fat, lung, liver: intensities; gain: change of log intensity per mm along patient axes.
    """

    axes: np.ndarray
    position: np.ndarray
    torso: tuple[float, float]
    fat_mm: float
    sac_mm: float
    blood: float
    muscle: float
    fat: float
    lung: float
    liver: float
    gain: np.ndarray


def subject_id(index: int, *, seed: int) -> str:
    """Pseudonym of a simulated subject."""
    return f"sim-{seed}-{index:07d}"


def simulate(
    index: int,
    *,
    seed: int,
    views: tuple[str, ...],
    sax_slices: int,
    frames: int,
    matrix: tuple[int, int],
    snr_db: float,
) -> Study:
    """Subject `index` of the cohort `seed`: k-space, segmentation and exact labels; a pure function of its arguments.

    Short-axis slices lie evenly in the LV's extent at end-diastole, the first nearest to the apex, and stay where they
    are while the heart moves; `spacing_mm` holds their true distance. Frames are evenly spaced from end-diastole.

    Args:
        views: of types.VIEWS; the study holds them in this order.
        matrix: pixels along y and x over a field of view of 240 mm for the longer side.
        snr_db: see noise.add_noise.

    Raises:
        InputError: an argument that makes no study.
    """
    _check(views, sax_slices, frames, matrix)
    who = anatomy(index, seed=seed)
    scene = _scene(who, seed=seed, index=index)
    shape = heart(who, np.arange(frames) / frames)
    pixel = FIELD_OF_VIEW_MM / max(matrix)
    frame_time = 60 / who.heart_rate / frames
    done: dict[str, View] = {}
    for view in views:
        count = sax_slices if view == "sax" else 1
        kspace = np.empty((count, 1, frames, *matrix), np.complex64)
        classes = np.empty((count, frames, *matrix), np.uint8)
        for n, points in enumerate(_planes(who, view, count, matrix, pixel, scene, seed=seed, index=index)):
            magnitude, classes[n] = _render(shape, scene, points, who.length_mm, pixel)
            # A slice's number is the same whatever other views are asked for.
            key = {"seed": seed, "subject": index, "slice_index": VIEWS.index(view) * 1024 + n}
            clean = fft2c(magnitude * np.exp(1j * phase_map(matrix, **key)))[None]
            kspace[n] = add_noise(clean, snr_db, **key)
        distance = who.length_mm / count if view == "sax" else 10.0
        done[view] = View(
            kspace=kspace, segmentation=classes, spacing_mm=(distance, pixel, pixel), frame_time_s=frame_time
        )
    return Study(subject_id=subject_id(index, seed=seed), views=done, labels=labels(who), source=SOURCE)


def _check(views: tuple[str, ...], sax_slices: int, frames: int, matrix: tuple[int, int]) -> None:
    if not views or len(set(views)) < len(views) or set(views) - set(VIEWS):
        raise InputError(
            f"views: expected one or more of {', '.join(VIEWS)}, each once, got {', '.join(views) or 'none'}"
        )
    for name, value, least, most in (
        ("sax_slices", sax_slices, 1, 1024),
        ("frames", frames, 2, 1024),
        ("matrix", min(matrix), 16, 4096),
    ):
        if not least <= value <= most:
            raise InputError(f"{name}: expected an integer from {least} to {most}, got {value}")


def _scene(who: Anatomy, *, seed: int, index: int) -> Scene:
    rng = generator(seed, index, Purpose.APPEARANCE)
    n = iter(np.clip(rng.standard_normal(24), -2.5, 2.5))
    to_base = _unit(np.array([-0.66, 0.55, 0.51]) + 0.06 * np.array([next(n), next(n), next(n)]))
    to_rv = np.array([-0.75, -0.6, 0.15])
    to_rv = _unit(to_rv - (to_rv @ to_base) * to_base)
    size = (who.bsa_m2 / 1.86) ** 0.5
    scale = math.exp(0.2 * next(n))

    def bright(value: float, spread: float) -> float:
        return float(scale * value * math.exp(spread * next(n)))

    return Scene(
        axes=np.stack([to_rv, np.cross(to_base, to_rv), to_base]),
        position=np.array([24.0, -30.0, 0.0]) + 4 * np.array([next(n), next(n), next(n)]),
        torso=(float(size * (165 + 6 * next(n))), float(size * (112 + 5 * next(n)))),
        fat_mm=float(16 + 5 * who.weight_z + next(n)),
        sac_mm=float(max(3.5 + who.weight_z + 0.5 * next(n), 0.5)),
        blood=bright(1.0, 0.05),
        muscle=bright(0.33, 0.08),
        fat=bright(0.7, 0.1),
        lung=bright(0.09, 0.2),
        liver=bright(0.38, 0.1),
        # The coil lies on the chest: brighter in front.
        gain=np.array([0.0, -0.003, 0.0]) + 0.0015 * np.array([next(n), next(n), next(n)]),
    )


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _planes(
    who: Anatomy,
    view: str,
    count: int,
    matrix: tuple[int, int],
    pixel: float,
    scene: Scene,
    *,
    seed: int,
    index: int,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Heart coordinates (u, v, w), float32 ``y x`` each, of every pixel of each slice of a view.

    Short axis: rows run from the anterior to the inferior wall, columns from the RV to the lateral wall. Long axis:
    rows run from apex to base, columns from the RV (4ch), the inferior (2ch) or the inferolateral (3ch) wall. Each
    view is shifted and rotated in its plane; each slice was taken in a breath-hold of its own.
    """
    rng = generator(seed, index, Purpose.PLANE, VIEWS.index(view))
    shift, turn = 6 * rng.standard_normal(2), math.radians(8) * rng.standard_normal()
    breath = rng.standard_normal(count)  # mm, of the organs along the patient's axis
    y, x = np.meshgrid(*((np.arange(n) - n // 2) * pixel for n in matrix), indexing="ij")
    y, x = y + shift[0], x + shift[1]
    y, x = math.cos(turn) * y + math.sin(turn) * x, math.cos(turn) * x - math.sin(turn) * y
    towards_rv = 16.0  # the middle of both ventricles
    planes = []
    for n in range(count):
        if view == "sax":
            u, v, w = towards_rv - x, -y, np.full_like(x, who.length_mm * (n + 0.5) / count)
        else:
            angle = math.radians(LAX_ANGLE_DEG[view])
            across = towards_rv - x if view == "lax_4ch" else x
            u, v, w = across * math.cos(angle), across * math.sin(angle), 0.72 * who.length_mm + y
        up = scene.axes[:, 2] * breath[n]
        planes.append(tuple((c + offset).astype(np.float32) for c, offset in zip((u, v, w), up, strict=True)))
    return planes


def _render(
    shape: Heart, scene: Scene, points: tuple[np.ndarray, np.ndarray, np.ndarray], length: float, pixel: float
) -> tuple[np.ndarray, np.ndarray]:
    """Magnitude (float32) and classes (uint8), ``t y x``: bodies painted over each other, from the back to the front.

    Each is a ramp over one pixel about its surface, close to the share of the pixel that it covers.
    """
    aorta = _aorta(*points, float(shape.base.min()))
    around, gain = _surroundings(scene, points, length, aorta, pixel)
    image = np.repeat(around[None], shape.base.size, 0)
    classes = np.zeros(image.shape, np.uint8)
    rows, columns = _window(shape, points, 2.5 + scene.sac_mm + pixel)
    d = distances(shape, *(c[rows, columns] for c in points))
    chambers = np.minimum(np.minimum(d.la, d.ra), d.rv)
    walls = np.minimum(d.epi, chambers - np.float32(2.5))
    for value, surface in (
        (scene.fat, np.maximum(walls - np.float32(scene.sac_mm), -aorta[rows, columns])),
        (scene.muscle, walls),
        (scene.blood, np.minimum(chambers, d.endo)),
    ):
        _paint(image[:, rows, columns], value, surface, pixel)
    image *= gain
    classes[:, rows, columns] = segment(d)
    return image, classes


def _window(shape: Heart, points: tuple[np.ndarray, np.ndarray, np.ndarray], margin: float) -> tuple[slice, slice]:
    """Rows and columns beyond which the heart, or anything within `margin` mm of it, never reaches: spares time."""
    u, v, w = points
    wide = float((shape.epi_radius * (1 + shape.rv_width)).max())
    right = max(wide, float((shape.ra_u + shape.ra_radius).max()))
    left = max(float(shape.epi_radius.max()), float((shape.la_radius - shape.la_u).max()))
    front = max(wide, float((np.maximum(shape.la_radius, shape.ra_radius) + np.abs(shape.la_v)).max()))
    roof = float(np.maximum(shape.la_w + shape.la_half, shape.ra_w + shape.ra_half).max())
    near = (u > -left - margin) & (u < right + margin) & (np.abs(v) < front + margin)
    near &= (w > -margin) & (w < roof + margin)
    rows, columns = (np.flatnonzero(near.any(axis)) for axis in (1, 0))
    return (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)) if rows.size else (slice(0), slice(0))


def _paint(image: np.ndarray, value: float, surface: np.ndarray, pixel: float) -> None:
    """Blend `value` into `image` where `surface` (mm, negative inside) says so."""
    cover = surface * np.float32(-1 / pixel)
    cover += np.float32(0.5)
    np.clip(cover, 0, 1, out=cover)
    cover *= np.float32(value) - image
    image += cover


def _aorta(u: np.ndarray, v: np.ndarray, w: np.ndarray, base: float) -> np.ndarray:
    """Distance to the aortic root: a tube that leaves the base beside the mitral valve, leaning to the right."""
    rise = w - np.float32(base)
    angle = math.radians(LAX_ANGLE_DEG["lax_3ch"])
    axis = np.float32(0.22) * rise + 14
    tube = np.hypot(u - axis * np.float32(math.cos(angle)), v - axis * np.float32(math.sin(angle))) - 13
    return np.maximum(tube, -rise)


def _surroundings(
    scene: Scene, points: tuple[np.ndarray, np.ndarray, np.ndarray], length: float, aorta: np.ndarray, pixel: float
) -> tuple[np.ndarray, np.ndarray]:
    """Intensity of all that does not beat and the coil's gain, float32 ``y x`` each."""
    u, v, w = points
    middle = w - np.float32(length / 2)
    x, y, z = (
        u * a + v * b + middle * c + start
        for start, (a, b, c) in zip(scene.position.astype(np.float32), scene.axes.T.astype(np.float32), strict=True)
    )

    def body(centre: tuple[float, ...], half: tuple[float, ...]) -> np.ndarray:
        """Distance to an ellipsoid, or to a cylinder along z where only x and y are given, to first order."""
        square = slope = np.float32(1e-9)
        for c, m, h in zip((x, y, z), centre, half, strict=False):
            part = (c - np.float32(m)) ** 2 * np.float32(h**-2)
            square, slope = square + part, slope + part * np.float32(h**-2)
        return (square - np.sqrt(square)) / np.sqrt(slope)

    left, back = scene.torso
    torso = body((0.0, 0.0), (left, back))
    inside = torso + np.float32(scene.fat_mm + 14)  # within the ribs
    image = np.zeros_like(x)
    for value, surface in (
        (scene.fat, torso),
        (scene.muscle, torso + np.float32(scene.fat_mm)),
        (scene.lung, inside),
        (0.6 * scene.fat, np.maximum(inside, body((5.0, 25.0, 60.0), (42.0, 60.0, 75.0)))),  # mediastinum
        (scene.muscle, body((0.0, 0.75 * back - 12), (22.0, 24.0))),  # spine
        (scene.blood, body((24.0, 0.45 * back), (11.0, 11.0))),  # descending aorta
        (scene.liver, np.maximum(inside, body((-42.0, 0.0, -122.0), (105.0, 85.0, 85.0)))),
        (scene.blood, aorta),
        (0.9 * scene.liver, np.maximum(inside, body((75.0, 10.0, -122.0), (60.0, 65.0, 70.0)))),  # spleen and stomach
    ):
        _paint(image, value, surface, pixel)
    a, b, c = scene.gain.astype(np.float32)
    return image, np.exp(a * x + b * y + c * z)
