"""Labels of a simulated subject: exact phenotypes, diseases drawn from a risk model, covariates."""

from __future__ import annotations

import math

from kmtr.simulation.heart import wall_measures
from kmtr.simulation.population import REFERENCE, Anatomy, Spread

PREVALENCE = {
    "dcm": 0.06,
    "hcm": 0.06,
    "infarct": 0.08,
    "hypertension": 0.25,
    "rv_disease": 0.06,
    "dilated_atria": 0.08,
}
"""Share of the simulated population with each disease: more than in UK Biobank, so that there is something to learn."""

RISK: dict[str, tuple[float, dict[str, float]]] = {
    "dcm": (-5.3, {"lvedv_ml": 1.2, "lvef_pct": -1.2}),
    "hcm": (-5.96, {"wall_thickness_max_mm": 1.6, "lvedv_ml": -0.4}),
    "infarct": (-4.25, {"thickening_min_pct": -1.6, "lvef_pct": -0.4, "age_y": 0.3}),
    "hypertension": (-2.78, {"lvm_g": 0.9, "wall_thickness_mm": 0.7, "age_y": 0.5}),
    "rv_disease": (-4.95, {"rvedv_ml": 0.8, "rvef_pct": -1.6}),
    "dilated_atria": (-4.56, {"lav_max_ml": 1.1, "rav_max_ml": 0.9, "laef_pct": -0.5}),
}
"""Log odds of each disease: a constant, found so that `PREVALENCE` holds, and a weight for each label's deviation from
the healthy of the same sex, in standard deviations. Plausible choices, no epidemiology."""

_OWN: dict[str, dict[str, Spread]] = {
    "wall_thickness_mm": {"male": (5.9, 0.8), "female": (4.9, 0.6)},
    "wall_thickness_max_mm": {"male": (7.1, 1.0), "female": (5.9, 0.8)},
    "thickening_min_pct": {"male": (41.0, 9.0), "female": (47.0, 9.0)},
    "age_y": {"male": (60.0, 8.0), "female": (60.0, 8.0)},
}
"""Values as in `REFERENCE`, of the simulated healthy themselves."""


def labels(who: Anatomy) -> dict[str, float]:
    """Exact phenotypes, of the continuous cycle (not of its nearest sampled frames), diseases and covariates.

    Volumes are the geometry's, by construction; measures of the wall are heart.wall_measures.
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
    out["lvco_l_min"] = out["lvsv_ml"] * who.heart_rate / 1000
    out["lvm_g"] = who.lvm_g
    out |= wall_measures(who)
    out |= {
        "male": float(who.male),
        "age_y": who.age_y,
        "bsa_m2": who.bsa_m2,
        "heart_rate_bpm": who.heart_rate,
    }
    return out | {
        disease: float(chance < risk(disease, out)) for disease, chance in zip(PREVALENCE, who.chance, strict=False)
    }


def risk(disease: str, known: dict[str, float]) -> float:
    """Probability of a disease for a subject with these labels: the logistic function of `RISK`'s log odds."""
    sex = "male" if known["male"] else "female"
    log_odds, weights = RISK[disease]
    for label, weight in weights.items():
        mean, deviation = (_OWN.get(label) or REFERENCE[label])[sex]
        # Far beyond what is healthy nothing more is learnt.
        log_odds += weight * min(max((known[label] - mean) / deviation, -3.0), 4.0)
    return 1 / (1 + math.exp(-log_odds))
