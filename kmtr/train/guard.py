"""The guard of alignment: it must not cost what masked reconstruction had learnt.

Low InfoNCE and perfect retrieval say nothing about value: static anatomy identifies a subject, so alignment can throw
the motion away (in a pilot LVEF's R2 fell from .83 to .08 while retrieval rose to 1.00). What counts is the probe.
"""

from __future__ import annotations

from kmtr.types import PROBED

MEAN = "val/probe_r2"
"""Mean R2 of the probe over the phenotypes."""


def r2_of(target: str) -> str:
    """Metric of the probe's R2 of a phenotype: ``lvedv_ml`` -> ``val/lvedv_r2``."""
    return f"val/{target.rsplit('_', 1)[0]}_r2"


GUARDED = (MEAN, *map(r2_of, PROBED))
"""Metrics that the guard may stop for; no other, whatever its name."""


def probes(metrics: dict[str, float]) -> dict[str, float]:
    """The guarded ones out of a validation's metrics."""
    return {name: metrics[name] for name in GUARDED if name in metrics}


def fallen(reference: dict[str, float], metrics: dict[str, float], tolerance: float) -> dict[str, float]:
    """Probes that lost more than `tolerance` of R2 against `reference` -> what they lost; empty: nothing was lost."""
    lost = {name: before - metrics[name] for name, before in probes(reference).items() if name in metrics}
    return {name: loss for name, loss in lost.items() if loss > tolerance}
