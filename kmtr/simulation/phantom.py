"""The simulated cohort: (seed, index) -> Study. A beating heart (heart.py) of a person (population.py) in a body
(torso.py), cut along the planes of a cardiac examination and painted (appearance.py), with exact labels (labels.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kmtr.physics.fourier import crop_or_pad
from kmtr.physics.noise import Purpose, generator
from kmtr.simulation.acquisition import acquire
from kmtr.simulation.appearance import Difficulty, Look, blend, cover, level, look, paint
from kmtr.simulation.heart import VALVE_MM, Distances, Heart, distances, heart, reach, segment
from kmtr.simulation.labels import labels
from kmtr.simulation.population import Anatomy, anatomy
from kmtr.simulation.torso import Points, Torso, patient, render, torso
from kmtr.types import VIEWS, InputError, Study, View

SOURCE = "kmtr-phantom-2"
FIELD_OF_VIEW_MM = 240.0
"""Field of view along the longer side of the image."""
THICKNESS_MM = {"sax": 8.0, "lax_2ch": 6.0, "lax_3ch": 6.0, "lax_4ch": 6.0}
"""Thickness of a slice, as in UK Biobank's protocol (Petersen et al., J Cardiovasc Magn Reson 2016;18:8)."""
LAYERS = 3
"""Planes that a slice's thickness is averaged over."""
LAX_ANGLE_DEG = {"lax_4ch": 0.0, "lax_3ch": 50.0, "lax_2ch": 92.0}
"""Angle from u to the plane's second direction, about the LV axis; 2ch passes beside the RV's tips."""
TOWARDS_RV_MM = 16.0
"""From the LV's axis to the middle of both ventricles, where a view is centred."""
RV_WALL_MM, ATRIAL_WALL_MM = 2.5, 1.2
TRUNK_V_MM = 36.0
"""Place of the pulmonary trunk where it leaves the base."""
FRAMES_AT_ONCE = 5
"""So that all arrays of a block stay in a core's cache."""


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
    difficulty: str = "medium",
    coils: int = 1,
    oversampling: float = 1.0,
) -> Study:
    """Subject `index` of the cohort `seed`: k-space, segmentation and exact labels; a pure function of its arguments.

    Short-axis slices lie evenly in the LV's extent at end-diastole, the first nearest to the apex, and stay where they
    are while the heart moves; `spacing_mm` holds their true distance. Frames are evenly spaced from end-diastole.
    Anatomy and labels do not depend on `difficulty`, nor one view on which others are asked for.

    Args:
        views: of types.VIEWS; the study holds them in this order.
        matrix: pixels along y and x over a field of view of 240 mm for the longer side.
        difficulty: of appearance.LEVELS.
        snr_db, coils, oversampling: see acquisition.acquire.

    Raises:
        InputError: an argument that makes no study.
    """
    _check(views, sax_slices, frames, matrix)
    who = anatomy(index, seed=seed)
    hard = level(difficulty)
    shape = heart(who, np.arange(frames) / frames)
    scene = Scene(
        body=torso(who, hard, seed=seed, subject=index),
        looks=look(hard, seed=seed, subject=index),
        pixel=FIELD_OF_VIEW_MM / max(matrix),
        reach=reach(shape),
    )
    frame_time = 60 / who.heart_rate / frames
    done: dict[str, View] = {}
    for view in views:
        count = sax_slices if view == "sax" else 1
        classes = np.empty((count, frames, *matrix), np.uint8)
        kspace = []
        for n, plane in enumerate(_planes(who, view, count, hard, scene.body, seed=seed, index=index)):
            magnitude, classes[n] = _render(shape, scene, plane, THICKNESS_MM[view], matrix)
            # A slice's number is the same whatever other views are asked for.
            measured = acquire(
                magnitude,
                coils=coils,
                snr_db=snr_db,
                oversampling=oversampling,
                seed=seed,
                subject=index,
                slice_index=VIEWS.index(view) * 1024 + n,
                wraps=hard.wraps,
            )
            kspace.append(measured)
        distance = who.length_mm / count if view == "sax" else 10.0
        done[view] = View(
            kspace=np.stack(kspace),
            segmentation=crop_or_pad(classes, kspace[0].shape[-1:], (-1,)),
            spacing_mm=(distance, scene.pixel, scene.pixel),
            frame_time_s=frame_time,
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


# ------------------------------------------------------------------------------------------------------------ planes


@dataclass(frozen=True)
class Plane:
    """A slice in heart coordinates: the place of the image's centre and the directions of y, x and of its normal."""

    centre: np.ndarray
    down: np.ndarray
    right: np.ndarray
    normal: np.ndarray

    def points(self, matrix: tuple[int, int], pixel: float, offset: float) -> Points:
        """(u, v, w) of every pixel, float32 ``y x`` each, of the parallel plane at `offset` mm."""
        y, x = np.meshgrid(*((np.arange(n) - n // 2) * pixel for n in matrix), indexing="ij")
        origin = self.centre + offset * self.normal
        u, v, w = ((origin[i] + y * self.down[i] + x * self.right[i]).astype(np.float32) for i in range(3))
        return u, v, w


def _planes(
    who: Anatomy, view: str, count: int, difficulty: Difficulty, body: Torso, *, seed: int, index: int
) -> list[Plane]:
    """The slices of a view.

    Short axis: rows run from the anterior to the inferior wall, columns from the RV to the lateral wall. Long axis:
    rows run from apex to base, columns from the RV (4ch), the inferior (2ch) or the inferolateral (3ch) wall. Each
    view is planned, shifted and rotated with errors of its own; each slice was taken in a breath-hold of its own.
    """
    rng = generator(seed, index, Purpose.PLANE, VIEWS.index(view))
    shift = difficulty.shift_mm * np.clip(rng.standard_normal(2), -2.5, 2.5)
    turn, tilt_y, tilt_x = np.radians(
        np.clip(rng.standard_normal(3), -2.5, 2.5) * (difficulty.turn_deg, difficulty.tilt_deg, difficulty.tilt_deg)
    )
    along = difficulty.planning_mm * float(np.clip(rng.standard_normal(), -2, 2))
    breath = difficulty.breath_mm * np.clip(rng.standard_normal(count), -2.5, 2.5)
    if view == "sax":
        down, right = np.array([0.0, -1.0, 0.0]), np.array([-1.0, 0.0, 0.0])
    else:
        angle = math.radians(LAX_ANGLE_DEG[view])
        down, right = np.array([0.0, 0.0, 1.0]), np.array([math.cos(angle), math.sin(angle), 0.0])
        right = -right if view == "lax_4ch" else right
    normal = np.cross(down, right)
    if view == "sax":
        normal = np.array([0.0, 0.0, 1.0])
    turned = _rotation(normal, turn) @ _rotation(down, tilt_y) @ _rotation(right, tilt_x)
    down, right, normal = turned @ down, turned @ right, turned @ normal
    planes = []
    for n in range(count):
        if view == "sax":
            centre = np.array([TOWARDS_RV_MM, 0.0, 0.0])
            anchor = np.array([0.0, 0.0, who.length_mm * (n + 0.5) / count])
        else:
            centre = np.array([TOWARDS_RV_MM if view == "lax_4ch" else 0.0, 0.0, 0.0])
            anchor = np.array([0.0, 0.0, 0.72 * who.length_mm])
        if view == "sax":  # a stack of parallel planes that turns about the middle of the LV
            middle = np.array([0.0, 0.0, who.length_mm / 2])
            anchor = middle + (anchor - middle)[2] * normal
        centre = anchor + turned @ centre + along * normal + shift[0] * down + shift[1] * right
        planes.append(Plane(centre + body.axes[:, 2] * breath[n], down, right, normal))
    return planes


def _rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rodrigues' rotation about a unit vector."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


# --------------------------------------------------------------------------------------------------------- rendering


@dataclass(frozen=True)
class Scene:
    """All that an image shows beside the heart's shape; `pixel` in mm, `reach` as of heart.reach."""

    body: Torso
    looks: Look
    pixel: float
    reach: tuple[float, float, float, float]


def _render(
    shape: Heart, scene: Scene, plane: Plane, thickness: float, matrix: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Magnitude (float32) and classes (uint8), ``t y x``: bodies painted over each other, from the back to the front,
    in a few planes through the slice's thickness. Classes are those of the pixels' centres."""
    frames = shape.base.size
    image = np.zeros((frames, *matrix), np.float32)
    classes = np.zeros((frames, *matrix), np.uint8)
    for layer in range(LAYERS):
        offset = thickness * ((layer + 0.5) / LAYERS - 0.5)
        points = plane.points(matrix, scene.pixel, offset)
        around, gain = render(scene.body, scene.looks, patient(scene.body, points, shape.who.length_mm), scene.pixel)
        gain *= np.float32(1 / LAYERS)
        rows, columns = _window(shape, scene.reach, points, RV_WALL_MM + 2.3 * scene.body.sac_mm + 4 + scene.pixel)
        still = around * gain
        image += still
        if rows.start == rows.stop:
            continue
        u, v, w = (np.ascontiguousarray(c[rows, columns]) for c in points)
        inner = (u, v, w)
        fat_mm = _fat_mm(scene.body.sac_mm, u, v, w, shape.who)
        for start in range(0, frames, FRAMES_AT_ONCE):
            block = slice(start, start + FRAMES_AT_ONCE)
            moving = shape.frames(block)
            d = distances(moving, *inner)
            drawn = np.repeat(around[rows, columns][None], moving.base.size, 0)
            _beating(drawn, moving, d, scene, inner, fat_mm)
            drawn *= gain[rows, columns]
            drawn -= still[rows, columns]
            image[block, rows, columns] += drawn
            if layer == LAYERS // 2:
                classes[block, rows, columns] = segment(d)
    return image, classes


def _beating(image: np.ndarray, shape: Heart, d: Distances, scene: Scene, points: Points, fat_mm: np.ndarray) -> None:
    """Paint the heart into `image` (``t y x``): fat, great vessels, muscle, blood, papillary muscles."""
    u, v, w = points
    s = shape.frames(slice(None), 2)
    signal, pixel, who = scene.looks.signal, scene.pixel, shape.who
    above = w - s.base
    aorta, trunk = _great_vessels(u, v, above, s)
    walls = np.minimum(d.epi, d.rv - np.float32(RV_WALL_MM))
    np.minimum(walls, np.minimum(d.la, d.ra) - np.float32(ATRIAL_WALL_MM), out=walls)
    paint(image, signal["fat"], walls - fat_mm, pixel)
    vessels = np.minimum(aorta, trunk)
    paint(image, signal["muscle"], vessels - np.float32(1.5), pixel)
    paint(image, signal["myocardium"], walls, pixel)
    # Blood that flows fast through the slice is fresh, hence brighter.
    fresh = 1 + np.float32(scene.looks.inflow) * s.flow
    left, right = signal["blood"] * fresh, signal["venous"] * fresh
    blend(image, left, cover(aorta, pixel))
    blend(image, right, cover(trunk, pixel))
    # An open valve: its atrium reaches down to the base plane.
    gap = np.float32(VALVE_MM + 1) * s.opening
    at_valve = (above > -1) & (above < np.float32(VALVE_MM + 0.5))
    blend(image, left, cover(d.la - gap * at_valve, pixel))
    blend(image, right, cover(d.ra - gap * at_valve, pixel))
    ridges = _trabeculae(scene.looks, d)
    depth = np.float32(who.trabeculation) * ridges
    depth *= np.clip(np.float32(2.5) * (1 - d.height), 0, 1)
    blend(image, right, cover(d.rv + np.float32(4.5) * depth, pixel))
    lumen = cover(d.endo + np.float32(3.5) * depth, pixel)
    lumen *= 1 - cover(_papillary(s, d, u, v), pixel)
    blend(image, left * (np.float32(0.88) + np.float32(0.14) * np.clip(d.height, 0, 1)), lumen)


def _fat_mm(sac_mm: float, u: np.ndarray, v: np.ndarray, w: np.ndarray, who: Anatomy) -> np.ndarray:
    """Thickness of the fat on the heart, ``y x``: most in the grooves between the ventricles, and between them and the
    atria, and at the apex; little elsewhere."""
    angle = np.arctan2(v, u)
    fat = np.exp(np.float32(-1 / 120) * (w - np.float32(who.length_mm - who.base_motion_mm / 2)) ** 2)
    for tip in (who.rv_centre + 0.85 * who.rv_half, who.rv_centre - 0.85 * who.rv_half):
        fat += np.exp(np.float32(7) * (np.cos(angle - np.float32(tip)) - 1))
    fat += np.float32(0.35) + np.float32(0.8) * np.exp(np.float32(-1 / 20) * np.maximum(w, 0))
    return np.float32(1.6 * sac_mm) * np.minimum(fat, np.float32(1.4))


def _trabeculae(looks: Look, d: Distances) -> np.ndarray:
    """Ridges along the walls, 0 to 1."""
    first, second = looks.trabeculae
    ridges = np.cos(5 * d.angle + np.float32(first + second) + 9 * d.height)
    ridges += np.cos(8 * d.angle + np.float32(first) - 14 * d.height)
    ridges += np.cos(13 * d.angle + np.float32(second) + 22 * d.height)
    ridges *= np.float32(0.4)
    return np.clip(ridges, 0, 1, out=ridges)


def _papillary(s: Heart, d: Distances, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance to the two papillary muscles: rods beside the wall in the lower half of the cavity, which turn with it
    and keep their size while the cavity shrinks around them."""
    thick = np.float32(s.who.papillary_mm)
    along = (d.height - np.float32(0.45)) * np.float32(1 / 0.25)
    radius = thick * (1 - along * along)
    place = np.sqrt(np.maximum(d.cavity, 1)) * np.float32(0.97) - thick
    np.maximum(place, thick * np.float32(0.6), out=place)
    cosine, sine = d.turn
    gaps = []
    for angle in s.who.papillary_rad:
        c, n = np.float32(math.cos(angle)), np.float32(math.sin(angle))
        gaps.append(_length(u - place * (c * cosine - n * sine), v - place * (n * cosine + c * sine)))
    nearest = np.minimum(*gaps)
    nearest -= radius
    return nearest


def _great_vessels(u: np.ndarray, v: np.ndarray, above: np.ndarray, s: Heart) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the aortic root, a tube that leaves the base beside the mitral valve and leans to the right, and to
    the pulmonary trunk in front of it."""
    angle = math.radians(LAX_ANGLE_DEG["lax_3ch"])
    out, aside = np.float32(0.22) * above + 14, np.float32(1 / 150) * above * above
    root = _length(
        u - out * np.float32(math.cos(angle)) + aside * np.float32(math.sin(angle)),
        v - out * np.float32(math.sin(angle)) - aside * np.float32(math.cos(angle)),
    )
    root -= 13
    trunk = _length(u - (20 - np.float32(0.35) * above), v - (np.float32(TRUNK_V_MM) + np.float32(0.1) * above)) - 11
    return np.maximum(root, -above - 1), np.maximum(trunk, -above - 1)


def _length(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Length of vectors; numpy's hypot, which can't overflow, costs several times as much."""
    square = x * x
    square += y * y
    return np.sqrt(square, out=square)


def _window(
    shape: Heart, sides: tuple[float, float, float, float], points: Points, margin: float
) -> tuple[slice, slice]:
    """Rows and columns beyond which the heart, or anything within `margin` mm of it, never reaches: spares time."""
    u, v, w = points
    left, right, back, front = sides
    if w.max() > shape.base.min() - margin:
        front = max(front, TRUNK_V_MM + 20)
    roof = float(np.maximum(shape.la[2] + shape.la[5], shape.ra[2] + shape.ra[5]).max())
    near = (u > -left - margin) & (u < right + margin) & (v > -back - margin) & (v < front + margin)
    near &= (w > -margin) & (w < roof + margin)
    rows, columns = (np.flatnonzero(near.any(axis)) for axis in (1, 0))
    return (
        (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)) if rows.size else (slice(0, 0), slice(0, 0))
    )
