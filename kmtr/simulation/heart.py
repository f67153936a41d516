"""A beating heart in three dimensions whose volumes are known in closed form.

Heart coordinates (mm): w runs along the LV's long axis from the apex (epicardium at w = 0) to the base, u points from
the LV to the RV, v = w x u to the anterior wall; r and the angle are those of (u, v), the angle 0 towards the RV.

    LV cavity    r^2 < A(w) (1 + a)          A: a spheroid's, cut off by the base plane
    myocardium   r^2 < A(w) (1 + a) + M(w) m    M: what a larger spheroid encloses beyond A
    RV           beyond the myocardium, r^2 < ... + K(w) q(angle)
    LA, RA       ellipsoids cut off above the base plane; they fill while the base moves to the apex

a and m say how the wall differs from region to region. They are bumps over the angle, a with mean 0 and m with mean 1
at every w, and an area is the integral of r^2 / 2 over the angle: so every cross-section, hence every volume, is that
of the plain spheroids, whatever the regions do. Each sector keeps its muscle, hence a wall that moves inwards less
thickens less. The regions turn with the wall's twist. The wall's thickness is solved so that the myocardium's volume
never changes, and labels are exact: no pixel is ever counted.

What is left out: valves' leaflets, an oblique base, the outflow tracts' own shape, appendages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from kmtr.simulation.population import Anatomy, Region, bump_mean
from kmtr.types import MYOCARDIAL_DENSITY_G_ML

LV_TRUNCATION = 0.3
"""Extent of the LV's spheroid beyond its equator to the base, in polar half-axes."""
ATRIAL_TRUNCATION = 0.6
APEX_TO_WALL = 0.7
"""Thickness of the apex over that of the wall at the equator."""
VALVE_MM = 2.0
"""Between the base plane and an atrium."""
ATRIAL_SEPTUM_U_MM = 19.0

FASTEST = 7.0
"""Stroke volumes per cycle at which blood flows about as fast as it ever does."""

RINGS = ((0.75, 0.85, 0.95), (0.42, 0.5, 0.58), (0.15, 0.22, 0.29))
"""Heights over the cavity's length at which the basal, middle and apical segments are measured."""
SEGMENTS = (6, 6, 4)
"""Per ring: the 16 of Cerqueira et al., Circulation 2002;105:539 (without the apex)."""


@dataclass(frozen=True)
class Heart:
    """The shape at some phases of the cycle; arrays ``t`` in mm unless said otherwise.

    Attributes:
        squeeze: how far the ventricles have emptied; flow: how fast their volume changes; opening: how far the valves
            to them are open; each 0 to 1.
        base: w of the base plane; centre: w of the LV's equator.
        endo_radius, endo_half: equatorial radius and polar half-axis of the LV cavity's spheroid.
        epi_radius, epi_half: of the epicardium's, same centre.
        rv_apex: w; rv_square: K's unit, mm^2; see _rv_rise.
        la, ra: (centre u, v, w, half-axes u, v, w), each an array ``t``.
        twist: angle of the apex and of the base, rad.
        who: whose it is.
    """

    squeeze: np.ndarray
    flow: np.ndarray
    opening: np.ndarray
    base: np.ndarray
    centre: np.ndarray
    endo_radius: np.ndarray
    endo_half: np.ndarray
    epi_radius: np.ndarray
    epi_half: np.ndarray
    rv_apex: np.ndarray
    rv_square: np.ndarray
    la: np.ndarray
    ra: np.ndarray
    twist: np.ndarray
    who: Anatomy

    def frames(self, part: slice, ndim: int = 0) -> Heart:
        """Some of the phases, in float32 arrays ``t 1 ...`` to go against `ndim` axes of points."""
        values = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value = value[..., part].astype(np.float32)
                value = value.reshape(*value.shape, *[1] * ndim)
            values[field.name] = value
        return Heart(**values)


@dataclass(frozen=True)
class Distances:
    """Distance to each surface, mm, negative inside; float32 ``t ...``. The sign is exact, the size to first order.

    The place on the LV's wall: `angle` (rad) turned back with the twist, `height` over the LV's length. `turn` is the
    twist there, its cosine and sine; `cavity` the squared radius of the cavity's surface.
    """

    endo: np.ndarray
    epi: np.ndarray
    rv: np.ndarray
    la: np.ndarray
    ra: np.ndarray
    angle: np.ndarray
    height: np.ndarray
    turn: tuple[np.ndarray, np.ndarray]
    cavity: np.ndarray


def cycle(phase: np.ndarray, knots: tuple[float, ...], values: tuple[float, ...]) -> np.ndarray:
    """Values at `knots` (fractions of the cycle from 0 to 1), joined with half cosines."""
    position = np.mod(phase, 1.0)
    step = np.clip(np.searchsorted(knots, position, side="right") - 1, 0, len(knots) - 2)
    start, stop = np.take(knots, step), np.take(knots, step + 1)
    ease = 0.5 - 0.5 * np.cos(np.pi * (position - start) / (stop - start))
    return np.take(values, step) + ease * (np.take(values, step + 1) - np.take(values, step))


def contraction(who: Anatomy, phase: np.ndarray) -> np.ndarray:
    """Emptying of the ventricles, in [0, 1]: 0 at end-diastole (phase 0), 1 from end-systole to filling.

    Ejection, isovolumic relaxation, early filling, diastasis, atrial kick.
    """
    knots = (0.0, who.es_phase, who.filling_phase, who.plateau_phase, who.kick_phase, 1.0)
    return cycle(phase, knots, (0.0, 1.0, 1.0, who.kick, who.kick, 0.0))


def atrial_filling(who: Anatomy, phase: np.ndarray) -> np.ndarray:
    """Filling of the atria, in [0, 1]: 0 at end-diastole, 1 when the ventricles begin to fill.

    Reservoir, conduit (which gives more than the ventricle's early filling takes from them alone), diastasis, kick.
    """
    knots = (0.0, who.filling_phase, who.plateau_phase, who.kick_phase, 1.0)
    return cycle(phase, knots, (0.0, 1.0, 1.3 * who.kick, 1.5 * who.kick, 0.0))


def heart(who: Anatomy, phase: np.ndarray) -> Heart:
    """The shape at `phase` (``t``, fractions of the cycle), with exactly the volumes of `who`."""
    s, filled = contraction(who, phase), atrial_filling(who, phase)
    base = who.length_mm - who.base_motion_mm * s
    lv = 1000 * (who.lvedv_ml + (who.lvesv_ml - who.lvedv_ml) * s)
    rv = 1000 * (who.rvedv_ml + (who.rvesv_ml - who.rvedv_ml) * s)
    wall = _wall(lv, 1000 * who.lvm_g / MYOCARDIAL_DENSITY_G_ML, base)
    endo_radius, endo_half, epi_half = _ventricle(lv, base, wall)
    rv_apex = who.rv_apex * base
    # Volume of the RV: the integral over w of K(w) times half the integral of q over the angle, 16/15 rv_half.
    rv_square = rv / (who.rv_half * 8 / 15 * _RV_RISE_MEAN * (base - rv_apex))
    atria = []
    for least, most, side, v, aspect in (
        (who.lav_min_ml, who.lav_max_ml, -1, -6.0, who.atrial_aspect[0]),
        (who.rav_min_ml, who.rav_max_ml, 1, -3.0, who.atrial_aspect[1]),
    ):
        volume = 1000 * (least + (most - least) * filled)
        roof = who.length_mm + VALVE_MM + 41 * (least / 29) ** (1 / 3)  # of about 41 mm when it is emptiest
        half = (roof - base - VALVE_MM) / (1 + ATRIAL_TRUNCATION)
        wide = np.sqrt(volume / (math.pi * aspect * half * _fullness(ATRIAL_TRUNCATION)))
        # The septum between the atria stays where it is.
        centre_u = ATRIAL_SEPTUM_U_MM + side * (wide + 2)
        atria.append(np.stack([centre_u, np.full_like(s, v), roof - half, wide, aspect * wide, half]))
    opening = cycle(
        phase,
        (0.0, 0.02, who.filling_phase, who.filling_phase + 0.03, 0.99, 1.0),
        (0.4, 0.0, 0.0, 1.0, 1.0, 0.4),
    )
    flow = np.minimum(np.abs(contraction(who, phase + 0.01) - contraction(who, phase - 0.01)) / 0.02 / FASTEST, 1)
    twist = np.stack([angle * s for angle in who.twist_rad])
    return Heart(
        squeeze=s,
        flow=flow,
        opening=opening,
        base=base,
        centre=epi_half,
        endo_radius=endo_radius,
        endo_half=endo_half,
        epi_radius=endo_radius + wall,
        epi_half=epi_half,
        rv_apex=rv_apex,
        rv_square=rv_square,
        la=atria[0],
        ra=atria[1],
        twist=twist,
        who=who,
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


def _rv_rise(height: np.ndarray) -> np.ndarray:
    """K over its unit, `height` from 0 at the RV's apex to 1 at the base plane; widest at three quarters."""
    return height * (np.float32(2.2) - np.float32(1.45) * height)


_RV_RISE_MEAN, _RV_RISE_MOST = 2.2 / 2 - 1.45 / 3, 2.2**2 / (4 * 1.45)


# ---------------------------------------------------------------------------------------------------------- surfaces


@dataclass(frozen=True)
class Walls:
    """Squared radii (mm^2) of the LV's two surfaces and their derivatives along w (mm); ``t ...``."""

    endo: np.ndarray
    epi: np.ndarray
    endo_slope: np.ndarray
    epi_slope: np.ndarray


def walls(shape: Heart, cosine: np.ndarray, sine: np.ndarray, w: np.ndarray) -> Walls:
    """The LV's surfaces towards the wall's place of angle (cosine, sine) at height w; all broadcast against `shape`."""
    x = w - shape.centre
    inner, outer = (shape.endo_radius / shape.endo_half) ** 2, (shape.epi_radius / shape.epi_half) ** 2
    hollow, bulk = shape.endo_radius**2 - inner * x * x, shape.epi_radius**2 - outer * x * x
    hollow_slope, bulk_slope = -2 * inner * x, -2 * outer * x
    swell, share = _regions(shape, cosine, sine, w / shape.base)
    endo = hollow * swell
    # Below the cavity's apex all is muscle.
    some = hollow > 0
    epi = (bulk - hollow * some) * share + endo * some
    endo_slope = hollow_slope * swell
    epi_slope = (bulk_slope - hollow_slope * some) * share + endo_slope * some
    return Walls(endo, epi, endo_slope, epi_slope)


def _regions(shape: Heart, cosine: np.ndarray, sine: np.ndarray, height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 + a and m, float as the inputs."""
    swell: np.ndarray = np.ones(1, np.float32)
    share = swell
    for region in shape.who.regions:
        if not (region.muscle or region.shape or region.motion):
            continue
        bump = _bump(region, cosine, sine, height)
        share = share + bump * np.float32(region.muscle)
        bump *= np.float32(region.shape) + np.float32(region.motion) * shape.squeeze
        swell = swell + bump
    return swell, share


def _bump(region: Region, cosine: np.ndarray, sine: np.ndarray, height: np.ndarray) -> np.ndarray:
    focus = np.float32(region.focus)
    bump: np.ndarray = cosine * (focus * np.float32(math.cos(region.angle)))
    bump = bump + sine * (focus * np.float32(math.sin(region.angle)))
    bump -= focus
    np.exp(bump, out=bump)
    bump -= np.float32(bump_mean(region.focus))
    along = (height - np.float32(region.height)) * np.float32(1 / region.extent)
    return bump * np.exp(np.float32(-0.5) * along * along)


def distances(shape: Heart, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> Distances:
    """Distances to the chambers' surfaces at points in heart coordinates.

    A surface f = 0 is at the distance f / |grad f| to first order; its gradient is that along r and w (the RV's also
    along the angle).

    Args:
        u, v, w: float32, mm, one common shape ``...``.

    Returns:
        Distances, each ``t ...``.
    """
    s = shape.frames(slice(None), u.ndim)
    square = u * u + v * v
    radius = np.sqrt(square) + np.float32(1e-3)
    angle = np.arctan2(v, u)
    height = w / s.base
    twist = s.twist[0] + (s.twist[1] - s.twist[0]) * height
    turn = np.cos(twist), np.sin(twist)
    along, across = u / radius, v / radius
    wall = walls(s, along * turn[0] + across * turn[1], across * turn[0] - along * turn[1], w)
    below = w - s.base
    steep = 4 * square + np.float32(1e-2)
    endo = _first_order(square - wall.endo, steep, wall.endo_slope)
    np.maximum(endo, below, out=endo)
    epi = _first_order(square - wall.epi, steep, wall.epi_slope)
    np.maximum(epi, below, out=epi)
    rv = _right_ventricle(s, wall, square, radius, angle, w)
    np.maximum(rv, -epi, out=rv)
    np.maximum(rv, below, out=rv)
    above = np.float32(VALVE_MM) - below
    la, ra = (np.maximum(_ellipsoid(u, v, w, atrium), above) for atrium in (s.la, s.ra))
    return Distances(endo, epi, rv, la, ra, angle - twist, height, turn, wall.endo)


def _first_order(f: np.ndarray, steep: np.ndarray, slope: np.ndarray) -> np.ndarray:
    gradient = slope * slope
    gradient += steep
    np.sqrt(gradient, out=gradient)
    f /= gradient
    return f


def _rv_profile(who: Anatomy, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Angle beyond the RV's attachment (rad), q there, and q's derivative.

    q = (1 - x^2)^2 (1 + skew x) with x the angle over the half-width: its integral does not depend on the skew, and the
    free wall leaves the LV tangentially.
    """
    turn = angle - np.float32(who.rv_centre)
    turn -= np.float32(2 * math.pi) * np.round(turn * np.float32(1 / (2 * math.pi)))
    x = np.clip(turn * np.float32(1 / who.rv_half), -1, 1)
    lean = 1 + np.float32(who.rv_skew) * x
    flat = 1 - x * x
    bend = (np.float32(who.rv_skew) * flat - 4 * x * lean) * flat * np.float32(1 / who.rv_half)
    return np.maximum(np.abs(turn) - np.float32(who.rv_half), 0), flat * flat * lean, bend


def _right_ventricle(
    s: Heart, wall: Walls, square: np.ndarray, radius: np.ndarray, angle: np.ndarray, w: np.ndarray
) -> np.ndarray:
    """Distance to the RV's free wall."""
    beyond, profile, bend = _rv_profile(s.who, angle)
    bend /= radius
    span = 1 / (s.base - s.rv_apex)
    height = (w - s.rv_apex) * span
    kept = np.maximum(height, 0)
    rise = _rv_rise(kept) * s.rv_square
    slope = (np.float32(2.2) - np.float32(2.9) * kept) * (s.rv_square * span)
    slope *= profile
    slope += wall.epi_slope
    rv = square - wall.epi
    rv -= rise * profile
    rise *= bend
    rise *= rise
    rise += 4 * square
    rv = _first_order(rv, rise, slope)
    # Where the crescent has no thickness its surfaces would meet at distance 0: beyond its tips and below its apex.
    rv += beyond * radius
    np.maximum(rv, height * (s.rv_apex - s.base), out=rv)
    return rv


def _ellipsoid(u: np.ndarray, v: np.ndarray, w: np.ndarray, body: np.ndarray) -> np.ndarray:
    """First-order distance to an ellipsoid: |q| (|q| - 1) / |grad|, q the point over the half-axes (exact sign)."""
    square = slope = np.full(1, 1e-9, np.float32)
    for c, middle, half in zip((u, v, w), body[:3], body[3:], strict=True):
        inverse = half**-2
        part = c - middle
        part *= part
        part *= inverse
        square = square + part
        part *= inverse
        slope = slope + part
    square -= np.sqrt(square)
    square /= np.sqrt(slope, out=slope)
    return square


def reach(shape: Heart) -> tuple[float, float, float, float]:
    """Largest extent of ventricles and atria along -u, u, -v and v, mm."""
    angle = np.linspace(-math.pi, math.pi, 64, endpoint=False)
    columns = shape.frames(slice(None), 2)
    wall = walls(columns, np.cos(angle), np.sin(angle), columns.base * np.array([[0.3], [0.5], [0.7], [0.85], [1.0]]))
    epi = wall.epi.max((0, 1)) * np.ones(angle.size)
    epi = np.max([np.roll(epi, shift) for shift in range(-2, 3)], 0)  # whatever the twist
    radius = np.sqrt(epi + shape.rv_square.max() * _RV_RISE_MOST * _rv_profile(shape.who, angle)[1])
    u, v = radius * np.cos(angle), radius * np.sin(angle)
    sides = []
    for low, high, axis in ((-u.min(), u.max(), 0), (-v.min(), v.max(), 1)):
        atria = [(body[axis], body[axis + 3]) for body in (shape.la, shape.ra)]
        sides += [
            max(low, *(float((half - middle).max()) for middle, half in atria)),
            max(high, *(float((half + middle).max()) for middle, half in atria)),
        ]
    return sides[0], sides[1], sides[2], sides[3]


def segment(d: Distances) -> np.ndarray:
    """Class of each point (types.SEGMENTATION_CLASSES), uint8 ``t ...``; chambers never overlap."""
    out = np.zeros(d.endo.shape, np.uint8)
    for value, inside in ((5, d.ra < 0), (4, d.la < 0), (3, d.rv < 0), (2, d.epi < 0), (1, d.endo < 0)):
        out[inside] = value
    return out


# ---------------------------------------------------------------------------------------------------------- measures


def wall_measures(who: Anatomy) -> dict[str, float]:
    """Labels of the LV's wall (see types.PHENOTYPES), by quadrature over the 16 segments of the geometry.

    Thickness is perpendicular to the wall's middle, to first order. Strain is that of the line in the wall which keeps
    half of the muscle inside: its length over that at end-diastole, mean over the segments.
    """
    shape = heart(who, np.array([0.0, who.es_phase]))
    shape = shape.frames(slice(None), 2)
    fraction = np.array(RINGS, np.float32).reshape(-1, 1)
    apex = shape.base - (1 + LV_TRUNCATION) * shape.endo_half
    w = apex + fraction * (shape.base - apex)
    angle = (np.arange(48, dtype=np.float32) + 0.5) * np.float32(2 * math.pi / 48)
    wall = walls(shape, np.cos(angle), np.sin(angle), w)
    middle = np.sqrt((wall.endo + wall.epi) / 2)
    slope = (wall.endo_slope + wall.epi_slope) / (4 * middle)
    thickness = _by_segment((np.sqrt(wall.epi) - np.sqrt(wall.endo)) / np.sqrt(1 + slope**2))
    ring = _by_segment(middle)
    return {
        "wall_thickness_mm": float(thickness[0].mean()),
        "wall_thickness_max_mm": float(thickness[0].max()),
        "thickening_min_pct": float(100 * (thickness[1] / thickness[0] - 1).min()),
        "gcs_pct": float(100 * (ring[1] / ring[0] - 1).mean()),
    }


def _by_segment(values: np.ndarray) -> np.ndarray:
    """``t height angle`` (heights of RINGS in order, 48 angles from the septum on) -> means ``t segment``."""
    means, angles = [], 48
    for ring, (heights, count) in enumerate(zip(RINGS, SEGMENTS, strict=True)):
        start = len(heights) * ring
        part = np.broadcast_to(values[:, start : start + len(heights)].mean(1), (len(values), angles))
        # Six segments begin in the middle of the septum, four a quarter of the circle around it.
        part = np.roll(part, 6, 1) if count == 4 else part
        means.append(part.reshape(len(part), count, -1).mean(2))
    return np.concatenate(means, 1)
