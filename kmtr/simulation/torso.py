"""Tissue around the heart that does not beat: chest wall, lungs, spine, diaphragm, liver, stomach, spleen, vessels.

Simple smooth bodies in patient coordinates (mm: left, posterior, superior; the origin in the middle of the chest, at
the height of the heart).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kmtr.physics.noise import Purpose, generator
from kmtr.simulation.appearance import Difficulty, Look, paint, shading, textures
from kmtr.simulation.population import Anatomy

Points = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Three coordinates, arrays of one shape."""


@dataclass(frozen=True)
class Torso:
    """One subject's.

    Attributes:
        axes: rows u, v, w of heart coordinates; position: of the heart's middle (u = v = 0, w = half the length).
        half: half-axes of the chest to the left and to the back; fat_mm, wall_mm: under the skin, and of ribs and
            muscles; sac_mm: fat around the heart.
        diaphragm: height of the dome below the heart; liver, stomach, spleen: centre and half-axes ``6``.
        gas: the stomach's content, from 0 (gas) to 1 (fluid); ribs: phase of their pattern, rad.
    """

    axes: np.ndarray
    position: np.ndarray
    half: tuple[float, float]
    fat_mm: float
    wall_mm: float
    sac_mm: float
    diaphragm: float
    liver: tuple[float, ...]
    stomach: tuple[float, ...]
    spleen: tuple[float, ...]
    gas: float
    ribs: float


def torso(who: Anatomy, difficulty: Difficulty, *, seed: int, subject: int) -> Torso:
    """The body around a heart: its size follows the person's, the rest is drawn."""
    rng = generator(seed, subject, Purpose.APPEARANCE, 1)
    n = iter(np.clip(rng.standard_normal(64), -2.5, 2.5).tolist())
    spread = difficulty.body

    def around(*middle: float, by: float) -> tuple[float, ...]:
        return tuple(m + by * spread * next(n) for m in middle)

    to_base = _unit(np.array([-0.66, 0.55, 0.51]) + 0.06 * spread * np.array([next(n), next(n), next(n)]))
    to_rv = np.array([-0.75, -0.6, 0.15]) + 0.05 * spread * np.array([next(n), next(n), next(n)])
    to_rv = _unit(to_rv - (to_rv @ to_base) * to_base)
    size = (who.bsa_m2 / 1.82) ** 0.5 * math.exp(0.02 * spread * next(n))
    return Torso(
        axes=np.stack([to_rv, np.cross(to_base, to_rv), to_base]),
        position=np.array(around(24.0, -34.0, 0.0, by=4.0)),
        half=(size * (162 + 5 * spread * next(n)), size * (108 + 4 * spread * next(n))),
        fat_mm=max(14 + 5 * who.weight_z + 2 * spread * next(n), 4.0),
        wall_mm=max(13 + 1.5 * spread * next(n), 8.0),
        sac_mm=max(2.5 + who.weight_z + 0.7 * spread * next(n), 0.3),
        diaphragm=-33 + 5 * spread * next(n),
        liver=(*around(-48.0, -4.0, -94.0, by=7.0), *around(105.0, 88.0, 66.0, by=4.0)),
        stomach=(*around(62.0, -14.0, -86.0, by=8.0), *around(42.0, 40.0, 34.0, by=5.0)),
        spleen=(*around(100.0, 52.0, -78.0, by=7.0), *around(32.0, 40.0, 32.0, by=3.0)),
        gas=float(rng.random()),
        ribs=float(2 * math.pi * rng.random()),
    )


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def patient(body: Torso, points: Points, length_mm: float) -> Points:
    """Heart coordinates u, v, w (of a heart of that length) to patient coordinates x, y, z; mm."""
    u, v, w = points
    w = w - np.float32(length_mm / 2)
    axes, start = body.axes.astype(np.float32), body.position.astype(np.float32)
    x, y, z = (u * axes[0, i] + v * axes[1, i] + w * axes[2, i] + start[i] for i in range(3))
    return x, y, z


def render(body: Torso, looks: Look, place: Points, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    """Intensity of all that does not beat, and the coil's gain; float32, at `place` in patient coordinates."""
    x, y, z = place
    signal = looks.signal
    vessels, grain = textures(looks, x, y, z)
    grain *= np.float32(looks.texture)
    vessels *= np.float32(min(looks.texture, 1.2))
    left, back = body.half
    skin = _ellipsoid((x, y), (0.0, 0.0), (left, back))
    inside = skin + np.float32(body.fat_mm + body.wall_mm)  # within the ribs
    # Ribs run obliquely: marrow in a dark shell, muscle between.
    rib = np.cos((z + 0.35 * np.abs(x) - 0.25 * y) * np.float32(2 * math.pi / 27) + np.float32(body.ribs))
    bone = signal["muscle"] + (signal["marrow"] - signal["muscle"]) * np.clip(2 * rib - 0.6, 0, 1)
    dome = body.diaphragm - ((x - 55) ** 2 * (x > 55) + (x + 60) ** 2 * (x < -60) + (y + 5) ** 2) * np.float32(1 / 220)
    belly = np.maximum(inside, (z - dome) * np.float32(0.85))
    fat = signal["fat"] * (1 + np.float32(0.07) * grain)
    lung = signal["lung"] * (1 + np.float32(0.2) * grain) + np.float32(0.4 * signal["blood"]) * vessels
    liver = signal["liver"] * (1 + np.float32(0.05) * grain) + np.float32(0.35 * signal["blood"]) * vessels
    stomach = signal["muscle"] * body.gas * (1 + np.float32(0.5) * grain)
    gut = signal["fat"] * (np.float32(0.55) + np.float32(0.12) * np.clip(grain, -2, 2))
    image = np.zeros_like(x)
    organ = [np.maximum(belly, _ellipsoid((x, y, z), b[:3], b[3:])) for b in (body.liver, body.spleen, body.stomach)]
    for value, surface in (
        (fat, skin),
        (bone, skin + np.float32(body.fat_mm)),
        (fat, inside),
        (lung, inside + np.float32(1.5)),
        (0.8 * fat, np.maximum(inside, _ellipsoid((x, y, z), (2.0, 18.0, 55.0), (38.0, 52.0, 80.0)))),  # mediastinum
        (signal["muscle"], _ellipsoid((x, y), (0.0, 0.75 * back - 12), (34.0, 27.0))),
        (signal["marrow"], _ellipsoid((x, y), (0.0, 0.75 * back - 22), (19.0, 15.0))),  # a vertebra
        (signal["fluid"] * 0.8, _ellipsoid((x, y), (0.0, 0.75 * back + 2), (7.0, 6.0))),  # the spinal canal
        (signal["muscle"], belly),  # the diaphragm
        (gut, belly + np.float32(2.5)),
        (0.5 * signal["muscle"], organ[2]),
        (stomach, organ[2] + np.float32(4.0)),
        (signal["spleen"], organ[1] + np.float32(2.0)),
        (liver, organ[0] + np.float32(2.5)),
        (signal["muscle"], _ellipsoid((x, y), (20.0, 0.5 * back), (13.5, 13.5))),
        (0.95 * signal["blood"], _ellipsoid((x, y), (20.0, 0.5 * back), (12.0, 12.0))),  # descending aorta
        (
            0.9 * signal["venous"],
            np.maximum(_ellipsoid((x, y), (-28.0, 8.0), (11.0, 9.0)), np.abs(z + 25) - 75),
        ),  # cava
    ):
        paint(image, value, surface, pixel)
    return image, shading(looks, x, y, z)


def _ellipsoid(point: tuple[np.ndarray, ...], centre: tuple[float, ...], half: tuple[float, ...]) -> np.ndarray:
    """Distance (mm) to an ellipsoid, or to a cylinder where only two coordinates are given, to first order."""
    square = slope = np.full(1, 1e-9, np.float32)
    for c, m, h in zip(point, centre, half, strict=True):
        part = (c - np.float32(m)) ** 2 * np.float32(h**-2)
        square, slope = square + part, slope + part * np.float32(h**-2)
    return (square - np.sqrt(square)) / np.sqrt(slope)
