"""Brightness of tissues in a balanced SSFP cine, and variation between subjects that no label knows of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kmtr.physics.noise import Purpose, generator
from kmtr.types import InputError


@dataclass(frozen=True)
class Difficulty:
    """Nuisance between k-space and labels; standard deviations unless said otherwise.

    Attributes:
        shift_mm, turn_deg: of a view in its plane; tilt_deg: of its plane about each of its two directions.
        planning_mm: of a plane along its normal; breath_mm: of the organs between two breath-holds, along the patient.
        body: of the torso's, lungs' and abdomen's size and place, and of fat, over that of the easy level.
        contrast: of relaxation times and flip angle, likewise; shading: of the coil's, likewise.
        texture: strength of what is small and at no fixed place (vessels, fat lobules, stomach), 1 as in people.
        wraps: greatest number of full turns of the phase over the image.
    """

    shift_mm: float
    turn_deg: float
    tilt_deg: float
    planning_mm: float
    breath_mm: float
    body: float
    contrast: float
    shading: float
    texture: float
    wraps: float


LEVELS = {
    "easy": Difficulty(6.0, 8.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.5, 1.0),
    "medium": Difficulty(10.0, 14.0, 3.0, 2.0, 2.0, 1.6, 1.6, 1.8, 1.0, 1.5),
    "hard": Difficulty(14.0, 20.0, 5.0, 3.0, 3.0, 2.2, 2.4, 2.6, 1.5, 2.0),
}


def level(name: str) -> Difficulty:
    """The level of that name.

    Raises:
        InputError: there is none.
    """
    if name not in LEVELS:
        raise InputError(f"difficulty: expected one of {', '.join(LEVELS)}, got {name!r}")
    return LEVELS[name]


TISSUES = {
    "blood": (1550.0, 240.0, 0.95),
    "myocardium": (980.0, 50.0, 0.8),
    "fat": (340.0, 58.0, 0.9),
    "muscle": (900.0, 30.0, 0.8),
    "lung": (1100.0, 35.0, 0.2),
    "liver": (586.0, 46.0, 0.75),
    "spleen": (1057.0, 79.0, 0.8),
    "marrow": (549.0, 49.0, 0.65),
    "fluid": (2500.0, 800.0, 1.0),
}
"""T1 and T2 (ms) at 1.5 T and proton density over that of water.

Abdomen, fat, marrow and skeletal muscle: de Bazelaire et al., Radiology 2004;230:652. Myocardium and blood: of the
order of the native values that the mapping consensus reports (Messroghli et al., J Cardiovasc Magn Reson 2017;19:75).
Lung and fluid, and all densities: plausible.
"""

REPETITION_MS, FLIP_DEG = 2.7, 60.0
"""Repetition time and flip angle of a cine at 1.5 T; the echo is in the middle of the repetition time."""


def balanced_ssfp(t1: float, t2: float, density: float, flip_deg: float, repetition_ms: float = REPETITION_MS) -> float:
    """Signal of the steady state on resonance, echo at half the repetition time, over that of all magnetisation.

    density sin a (1 - E1) / (1 - (E1 - E2) cos a - E1 E2) exp(-TE / T2), E = exp(-TR / T): Freeman and Hill, J Magn
    Reson 1971;4:366; in this form Scheffler and Lehnhardt, Eur Radiol 2003;13:2409, eq. 2.

    Args:
        t1, t2: ms; density: of protons, over water's.
    """
    e1, e2 = math.exp(-repetition_ms / t1), math.exp(-repetition_ms / t2)
    angle = math.radians(flip_deg)
    steady = math.sin(angle) * (1 - e1) / (1 - (e1 - e2) * math.cos(angle) - e1 * e2)
    return density * steady * math.exp(-repetition_ms / 2 / t2)


@dataclass(frozen=True)
class Look:
    """Intensities of one subject and how they vary in space.

    Attributes:
        signal: tissue -> intensity; blood is about 1, that of the right heart "venous".
        inflow: how much brighter blood is that enters the slice at full speed.
        gain: change of log intensity per mm along patient axes (left, posterior, superior), and per mm^2.
        waves: wave vectors (rad per mm, patient axes) and phases ``wave 4`` of the texture; see `textures`.
        texture: its strength.
        trabeculae: two phases, rad.
    """

    signal: dict[str, float]
    inflow: float
    gain: np.ndarray
    waves: np.ndarray
    texture: float
    trabeculae: tuple[float, float]


_VESSEL_WAVES, _GRAIN_WAVES = 4, 10


def look(difficulty: Difficulty, *, seed: int, subject: int) -> Look:
    """A subject's, drawn independently of the anatomy; levels differ in spread, not in what is drawn."""
    rng = generator(seed, subject, Purpose.APPEARANCE)
    n = iter(np.clip(rng.standard_normal(64), -2.5, 2.5).tolist())
    spread = difficulty.contrast
    flip = min(max(FLIP_DEG + 4 * spread * next(n), 30.0), 85.0)
    scale = math.exp(0.2 * spread * next(n))
    reference = balanced_ssfp(*TISSUES["blood"], FLIP_DEG)
    signal = {}
    for tissue, (t1, t2, density) in TISSUES.items():
        changes = [math.exp(0.05 * spread * next(n)) for _ in range(3)]
        value = balanced_ssfp(t1 * changes[0], t2 * changes[1], density * changes[2], flip)
        signal[tissue] = scale * value / reference
    inflow = 0.1 * math.exp(0.3 * spread * next(n))
    signal["blood"] *= 1.15
    signal["venous"] = signal["blood"] * (0.93 + 0.03 * spread * next(n))
    signal["lung"] *= math.exp(0.15 * spread * next(n))
    # The coil lies on the chest: brighter in front.
    shading = difficulty.shading
    linear = np.array([0.0, -0.004, 0.0]) + 0.0012 * shading * np.array([next(n), next(n), next(n)])
    square = 6e-6 * shading * np.array([next(n), next(n), next(n)])
    count = 2 * _VESSEL_WAVES + _GRAIN_WAVES
    direction = rng.standard_normal((count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    length = np.exp(rng.uniform(math.log(28), math.log(60), count))
    length[2 * _VESSEL_WAVES :] = np.exp(rng.uniform(math.log(7), math.log(25), _GRAIN_WAVES))
    waves = np.column_stack([direction * (2 * math.pi / length[:, None]), 2 * math.pi * rng.random(count)])
    return Look(
        signal=signal,
        inflow=inflow,
        gain=np.stack([linear, square]).astype(np.float32),
        waves=waves.astype(np.float32),
        texture=difficulty.texture,
        trabeculae=tuple((2 * math.pi * rng.random(2)).tolist()),
    )


def textures(looks: Look, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vessels (1 in the middle of one, 0 outside) and grain (mean 0, SD 1) at points in patient coordinates, mm.

    Vessels are where two smooth random fields both vanish: branching lines in space, cut as dots and streaks.
    """
    place = np.stack([x, y, z, np.ones_like(x)]).reshape(4, -1)
    values = np.cos(looks.waves @ place)
    first, second = values[:_VESSEL_WAVES].sum(0), values[_VESSEL_WAVES : 2 * _VESSEL_WAVES].sum(0)
    vessels = np.exp(-6 * (first * first + second * second))
    grain = values[2 * _VESSEL_WAVES :].sum(0) * np.float32(math.sqrt(2 / _GRAIN_WAVES))
    return vessels.reshape(x.shape), grain.reshape(x.shape)


def shading(looks: Look, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The coil's gain at points in patient coordinates, mm."""
    log = np.zeros_like(x)
    for axis, c in enumerate((x, y, z)):
        log += looks.gain[0, axis] * c + looks.gain[1, axis] * c * c
    return np.exp(np.clip(log, -2.0, 2.0))


def paint(image: np.ndarray, value: float | np.ndarray, surface: np.ndarray, pixel: float) -> None:
    """Blend `value` into `image` where `surface` (mm, negative inside) says so: a ramp of one pixel about the surface,
    close to the share of the pixel that it covers."""
    blend(image, value, cover(surface, pixel))


def cover(surface: np.ndarray, pixel: float) -> np.ndarray:
    """About the share of a pixel that lies inside of a surface (mm, negative inside), 0 to 1."""
    share = surface * np.float32(-1 / pixel)
    share += np.float32(0.5)
    return np.clip(share, 0, 1, out=share)


def blend(image: np.ndarray, value: float | np.ndarray, share: np.ndarray) -> None:
    """``image += share (value - image)``; `share` is overwritten."""
    share *= (np.float32(value) if isinstance(value, float) else value) - image
    image += share
