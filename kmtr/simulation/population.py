"""The simulated population: (seed, index) -> Anatomy, all that shape, motion and labels follow from.

Healthy hearts follow the reference values of UK Biobank by sex (`REFERENCE`), drawn together with a table of
correlations. Six processes of disease then change the anatomy by a severity that most people have none of. Whether
somebody *has* a disease is not said here: labels.py draws it from a risk model of the finished anatomy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from kmtr.physics.noise import Purpose, generator

Spread = tuple[float, float]
"""Mean and standard deviation."""

REFERENCE: dict[str, dict[str, Spread]] = {
    "lvedv_ml": {"male": (166.0, 32.0), "female": (124.0, 21.0)},
    "lvesv_ml": {"male": (69.0, 16.0), "female": (49.0, 11.0)},
    "lvsv_ml": {"male": (96.0, 20.0), "female": (75.0, 14.0)},
    "lvef_pct": {"male": (58.0, 5.0), "female": (61.0, 5.0)},
    "lvm_g": {"male": (103.0, 21.0), "female": (70.0, 13.0)},
    "rvedv_ml": {"male": (182.0, 36.0), "female": (130.0, 24.0)},
    "rvesv_ml": {"male": (85.0, 22.0), "female": (55.0, 15.0)},
    "rvsv_ml": {"male": (97.0, 20.0), "female": (75.0, 14.0)},
    "rvef_pct": {"male": (54.0, 6.0), "female": (58.0, 6.0)},
    "lav_max_ml": {"male": (71.0, 19.0), "female": (62.0, 17.0)},
    "laef_pct": {"male": (60.0, 8.0), "female": (61.0, 8.0)},
    "rav_max_ml": {"male": (93.0, 27.0), "female": (69.0, 17.0)},
    "raef_pct": {"male": (46.0, 9.0), "female": (49.0, 9.0)},
}
"""Healthy adults of 45 to 74 years by sex: label -> sex -> mean, standard deviation.

Petersen et al., J Cardiovasc Magn Reson 2017;19:18 (804 healthy participants of UK Biobank; papillary muscles count as
volume). LVEF and LV mass per body surface (53 +- 9 and 42 +- 7 g/m2) stand in its abstract. The other ventricular
values are those of its tables as commonly quoted; the women's agree with the 95 % ranges of table 3 (LVEDV 88 to 161,
LVESV 31 to 68, LVSV 49 to 100, RVEDV 85 to 166, RVESV 27 to 77 mL, LVEF 51 to 70, RVEF 47 to 68 %). The spreads of the
atria's ejection fractions are rounded: check them at the source before resting a claim on them.
"""

BSA_M2: dict[str, Spread] = {"male": (1.95, 0.16), "female": (1.68, 0.14)}
"""Body surface: what the reference's LV mass is with and without it."""
HEART_RATE: dict[str, Spread] = {"male": (61.0, 9.0), "female": (64.0, 9.0)}
"""Plausible at rest in that age; not in the reference."""

_CHOSEN = 1.03
"""LVEDV and LV mass as drawn, over the reference: the larger hearts are at risk, the healthy are what remains."""

LATENT = ("bsa", "lvedv", "lvef", "lvm", "rvef", "lav", "laef", "rav", "raef", "heart_rate", "age")
_CORRELATED = {
    ("bsa", "lvedv"): 0.55,
    ("bsa", "lvm"): 0.6,
    ("bsa", "lav"): 0.35,
    ("bsa", "rav"): 0.4,
    ("lvedv", "lvef"): -0.15,
    ("lvedv", "lvm"): 0.65,
    ("lvedv", "rvef"): -0.1,
    ("lvedv", "lav"): 0.4,
    ("lvedv", "rav"): 0.45,
    ("lvedv", "heart_rate"): -0.3,
    ("lvedv", "age"): -0.2,
    ("lvef", "rvef"): 0.5,
    ("lvef", "laef"): 0.2,
    ("lvm", "lav"): 0.3,
    ("lvm", "rav"): 0.3,
    ("lav", "laef"): -0.3,
    ("lav", "rav"): 0.45,
    ("lav", "heart_rate"): -0.15,
    ("laef", "raef"): 0.3,
    ("laef", "age"): -0.15,
    ("rav", "raef"): -0.3,
    ("rav", "heart_rate"): -0.2,
}
"""Correlations of the healthy within a sex; others are 0. Plausible sizes (body size drives volumes and mass, chambers
go together, larger chambers beat slower and eject a smaller part), no estimates of a study."""

PROCESSES = {"dcm": 0.09, "hcm": 0.09, "infarct": 0.12, "rv": 0.09, "load": 0.4, "atria": 0.12}
"""Processes of disease and the share of people that they touch at all, mostly mildly."""

LV_TERRITORIES = {"lad": (35.0, 0.35), "rca": (-95.0, 0.7), "lcx": (-165.0, 0.6)}
"""Middle of the walls that each coronary artery feeds: angle from the septum towards the anterior wall (degrees), and
height over the LV's length; after the segments of Cerqueira et al., Circulation 2002;105:539."""


@dataclass(frozen=True)
class Region:
    """A part of the LV's wall that is unlike the rest: a bump in angle and height, whose mean over the angle is taken
    off, so that no volume changes.

    Attributes:
        angle: of its middle, rad, from the septum (u) towards the anterior wall (v), of the wall at end-diastole.
        focus: concentration of the von Mises bump in angle; height, extent: middle and SD of the Gaussian along the
            axis, over the LV's length.
        muscle: how much more muscle the wall has in the middle of it, over the mean of the circumference.
        shape, motion: how much larger the cavity's squared radius is there, at any time, and in addition at
            end-systole: motion > 0 moves inwards less.
    """

    angle: float
    focus: float
    height: float
    extent: float
    muscle: float = 0.0
    shape: float = 0.0
    motion: float = 0.0


@dataclass(frozen=True)
class Anatomy:
    """Who the subject is and how the heart fills and empties; all that labels and shape follow from.

    Attributes:
        male: sex; age_y: years; bsa_m2: body surface; weight_z: how heavy for the size, in standard deviations.
        heart_rate: beats per minute.
        lvedv_ml, lvesv_ml, rvedv_ml, rvesv_ml: ventricles at end-diastole (phase 0) and end-systole.
        lav_max_ml, lav_min_ml, rav_max_ml, rav_min_ml: atria when the ventricles begin to fill and at end-diastole.
        lvm_g: mass of the LV myocardium.
        length_mm: LV from epicardial apex to base plane at end-diastole.
        base_motion_mm: descent of the base plane at end-systole.
        twist_rad: by how much the apex and the base turn at end-systole, towards the anterior wall.
        regions: of the LV's wall.
        rv_centre, rv_half: middle and half-width of the RV's attachment, rad; rv_skew: how much wider it is at its
            anterior end; rv_apex: its lowest point over the LV's length.
        atrial_aspect: depth over width of LA and RA.
        papillary_mm, papillary_rad: radius of the papillary muscles and their angles; trabeculation: of the walls, 1 on
            average. No label depends on them.
        es_phase, filling_phase, plateau_phase, kick_phase: end-systole, begin of early filling, begin of diastasis,
            begin of the atrial kick; fractions of the cycle.
        kick: part of the stroke volume that the kick adds.
        chance: uniform numbers that decide on the diseases of labels.PREVALENCE, given their risks.
    """

    male: bool
    age_y: float
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
    twist_rad: tuple[float, float]
    regions: tuple[Region, ...]
    rv_centre: float
    rv_half: float
    rv_skew: float
    rv_apex: float
    atrial_aspect: tuple[float, float]
    papillary_mm: float
    papillary_rad: tuple[float, float]
    trabeculation: float
    es_phase: float
    filling_phase: float
    plateau_phase: float
    kick_phase: float
    kick: float
    chance: tuple[float, ...]


def anatomy(index: int, *, seed: int) -> Anatomy:
    """Subject `index` of the population `seed`: a pure function of both.

    Without regurgitation both ventricles eject the same volume, to a few per cent.
    """
    rng = generator(seed, index, Purpose.ANATOMY)
    male = bool(rng.random() < 0.5)
    sex = "male" if male else "female"
    z = dict(zip(LATENT, np.clip(_MIXING @ rng.standard_normal(len(LATENT)), -2.6, 2.6).tolist(), strict=True))
    burden = _burdens(rng)
    n = iter(np.clip(rng.standard_normal(40), -2.5, 2.5).tolist())
    # One draw per line and none that depends on another's outcome: a change of one number moves no other.
    territory = list(LV_TERRITORIES.values())[int(3 * rng.random())]
    chance = tuple(rng.random(8).tolist())

    age = 60 + 8 * z["age"]
    burden["load"] *= math.exp(0.03 * (age - 60))  # of pressure: grows with age
    dcm, hcm, scar, right, stretch, load = (burden[k] for k in ("dcm", "hcm", "infarct", "rv", "atria", "load"))
    lvef = _normal(REFERENCE["lvef_pct"][sex], z["lvef"]) - 14 * dcm + 2.5 * hcm - 7 * scar + 0.5 * load
    lvef = min(max(lvef, 15.0), 78.0)
    volumes = _ventricles(sex, z, burden, lvef, math.exp(0.03 * next(n))) | _atria(sex, z, burden)
    lvedv = volumes["lvedv_ml"]
    heart_rate = min(max(_normal(HEART_RATE[sex], z["heart_rate"]) + 5 * dcm + 2 * stretch, 42.0), 110.0)
    # Systole lasts about a third of a second at rest, whatever the rate.
    es_phase = min(max(0.335 * heart_rate / 60, 0.28), 0.45) + 0.01 * next(n)
    length = 95 * (lvedv / 145) ** (1 / 3) * math.exp(0.04 * next(n) - 0.03 * dcm)
    descent = 0.162 * (lvef / 59) * math.exp(0.1 * next(n) - 0.08 * (load + hcm))
    slack = (1 - descent) / (1 - lvef / 100) - 1  # by how much the cavity's squared radius shrinks, over what is left
    return Anatomy(
        male=male,
        age_y=age,
        bsa_m2=_positive(BSA_M2[sex], z["bsa"]),
        weight_z=next(n),
        heart_rate=heart_rate,
        **volumes,
        length_mm=length,
        base_motion_mm=length * descent,
        twist_rad=(
            math.radians(9) * lvef / 59 * math.exp(0.25 * next(n)),
            math.radians(-4) * lvef / 59 * math.exp(0.25 * next(n)),
        ),
        regions=_regions(n, hcm, right, scar, slack, territory),
        rv_centre=math.radians(5 + 3 * next(n)),
        rv_half=math.radians(83 + 1.5 * next(n)),
        rv_skew=-0.25 + 0.2 * next(n),
        rv_apex=0.12 + 0.025 * next(n),
        atrial_aspect=(0.85 * math.exp(0.08 * next(n)), 0.95 * math.exp(0.08 * next(n))),
        papillary_mm=4.3 * (lvedv / 145) ** (1 / 3) * math.exp(0.1 * next(n)),
        papillary_rad=(2.2 + 0.15 * next(n), -1.75 + 0.15 * next(n)),
        trabeculation=math.exp(0.25 * next(n)),
        es_phase=es_phase,
        filling_phase=es_phase + 0.05,
        plateau_phase=es_phase + 0.24 + 0.015 * next(n),
        kick_phase=0.84,
        kick=min(max(0.24 + 0.04 * next(n) + 0.04 * load + 0.002 * (age - 60), 0.1), 0.5),
        chance=chance,
    )


def _ventricles(
    sex: str, z: dict[str, float], burden: dict[str, float], lvef: float, right_share: float
) -> dict[str, float]:
    """Volumes of both ventricles and mass of the LV, by their names in `Anatomy`.

    Args:
        z: standard normal numbers of `LATENT`.
        burden: severity of each process.
        right_share: stroke volume of the right ventricle over that of the left.
    """
    dcm, hcm, scar, right, load = (burden[k] for k in ("dcm", "hcm", "infarct", "rv", "load"))
    lvedv = (
        _CHOSEN * _positive(REFERENCE["lvedv_ml"][sex], z["lvedv"]) * math.exp(0.26 * dcm - 0.05 * hcm + 0.07 * scar)
    )
    lvm = (
        _CHOSEN
        * _positive(REFERENCE["lvm_g"][sex], z["lvm"])
        * math.exp(0.14 * dcm + 0.27 * hcm + 0.03 * scar + 0.15 * load)
    )
    stroke = lvedv * lvef / 100
    rv_stroke = stroke * right_share
    rvef = _normal(REFERENCE["rvef_pct"][sex], z["rvef"]) - 8 * right - 5 * dcm - 1.5 * scar
    rvedv = rv_stroke / min(max(rvef, 20.0), 75.0) * 100
    return {
        "lvedv_ml": lvedv,
        "lvesv_ml": lvedv - stroke,
        "rvedv_ml": rvedv,
        "rvesv_ml": rvedv - rv_stroke,
        "lvm_g": lvm,
    }


def _atria(sex: str, z: dict[str, float], burden: dict[str, float]) -> dict[str, float]:
    """Volumes of both atria, by their names in `Anatomy`; arguments as those of `_ventricles`."""
    dcm, hcm, scar, right, stretch, load = (burden[k] for k in ("dcm", "hcm", "infarct", "rv", "atria", "load"))
    # A stiff or failing ventricle fills its atrium more and is emptied into less.
    strain = 0.14 * (dcm + hcm) + 0.06 * (scar + load)
    lav_max = _positive(REFERENCE["lav_max_ml"][sex], z["lav"]) * math.exp(strain + 0.27 * stretch)
    laef = _normal(REFERENCE["laef_pct"][sex], z["laef"]) - 40 * strain - 9 * stretch
    rav_max = _positive(REFERENCE["rav_max_ml"][sex], z["rav"]) * math.exp(0.16 * right + 0.22 * stretch)
    raef = _normal(REFERENCE["raef_pct"][sex], z["raef"]) - 6 * right - 7 * stretch
    return {
        "lav_max_ml": lav_max,
        "lav_min_ml": lav_max * (1 - min(max(laef, 10.0), 80.0) / 100),
        "rav_max_ml": rav_max,
        "rav_min_ml": rav_max * (1 - min(max(raef, 10.0), 72.0) / 100),
    }


def _regions(
    n: Iterator[float], hypertrophy: float, right: float, scar: float, slack: float, territory: tuple[float, float]
) -> tuple[Region, ...]:
    """Regions of the LV's wall: septum, anterolateral and inferolateral wall differ in everybody; a scar in a coronary
    artery's territory is thin and stands still. `slack` is the motion at which the squared radius stays as at
    end-diastole."""
    muscle = 0.3 + 0.5 * hypertrophy  # the septum is the thickest part, the more so in HCM
    septum = Region(0.15 * next(n), 1.6, 0.6, 0.35, muscle + 0.22 * next(n), 0.08 * next(n), 0.28 * next(n))
    # A loaded right ventricle flattens it.
    septum = replace(septum, shape=septum.shape - 0.1 * right, motion=septum.motion + 0.1 * right)
    lateral = [
        Region(side + 0.3 * next(n), 1.2, height, 0.4, 0.28 * next(n), 0.1 * next(n), 0.28 * next(n))
        for side, height in ((2.1, 0.5), (-2.1, 0.55))
    ]
    angle, height = math.radians(territory[0] + 12 * next(n)), territory[1] + 0.07 * next(n)
    infarct = Region(angle, 2.5, height, 0.24, -0.3 * min(scar, 1.5), 0.0, slack * min(0.9 * scar, 1.2))
    return _bounded((septum, *lateral, infarct))


def _burdens(rng: np.random.Generator) -> dict[str, float]:
    """Severity of each process: exponential (mean 0.75, at most 2) in the share of people it touches, else 0."""
    return {
        name: min(-0.75 * math.log(max(u, 1e-9) / share), 2.0) if u < share else 0.0
        for (name, share), u in zip(PROCESSES.items(), rng.random(len(PROCESSES)).tolist(), strict=True)
    }


def _bounded(regions: tuple[Region, ...], most: float = 0.65) -> tuple[Region, ...]:
    """The regions scaled down where all together could leave a wall or a cavity less than 1 - `most` of its mean."""

    def depth(amplitude: float, region: Region) -> float:
        flat = bump_mean(region.focus)
        return max(amplitude * flat, -amplitude * (1 - flat))

    muscle = min(1.0, most / max(sum(depth(r.muscle, r) for r in regions), 1e-9))
    cavity = min(1.0, most / max(sum(depth(r.shape, r) + depth(r.motion, r) for r in regions), 1e-9))
    return tuple(
        replace(r, muscle=r.muscle * muscle, shape=r.shape * cavity, motion=r.motion * cavity) for r in regions
    )


@lru_cache(256)
def bump_mean(focus: float) -> float:
    """Mean over the angle of exp(focus (cos angle - 1)): exp(-focus) I0(focus)."""
    return float(np.i0(focus)) * math.exp(-focus)


def _normal(spread: Spread, z: float) -> float:
    return spread[0] + spread[1] * z


def _positive(spread: Spread, z: float) -> float:
    """Lognormal with that mean and standard deviation."""
    mean, deviation = spread
    sigma = math.sqrt(math.log1p((deviation / mean) ** 2))
    return mean * math.exp(sigma * z - sigma**2 / 2)


def _mixing() -> np.ndarray:
    correlation = np.eye(len(LATENT))
    for (a, b), value in _CORRELATED.items():
        i, j = LATENT.index(a), LATENT.index(b)
        correlation[i, j] = correlation[j, i] = value
    return np.linalg.cholesky(correlation)


_MIXING = _mixing()
