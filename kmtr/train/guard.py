"""The guard of alignment: it must not cost what masked reconstruction had learnt.

Low InfoNCE and perfect retrieval say nothing about value: static anatomy identifies a subject, so alignment can throw
the motion away (in a pilot LVEF's R2 fell from .83 to .08 while retrieval rose to 1.00). What counts is the probe.
"""

from __future__ import annotations


def probes(metrics: dict[str, float]) -> dict[str, float]:
    """The probe's R2 of each phenotype and their mean, out of a validation's metrics."""
    return {name: value for name, value in metrics.items() if name.startswith("val/") and name.endswith("_r2")}


def fallen(reference: dict[str, float], metrics: dict[str, float], tolerance: float) -> dict[str, float]:
    """Probes that lost more than `tolerance` of R2 against `reference` -> what they lost; empty: nothing was lost."""
    lost = {name: before - metrics[name] for name, before in probes(reference).items() if name in metrics}
    return {name: loss for name, loss in lost.items() if loss > tolerance}
