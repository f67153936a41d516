"""Metrics: pure functions of numpy arrays, by what they judge."""

from kmtr.metrics.bootstrap import bootstrap_r2, paired_bootstrap
from kmtr.metrics.embeddings import effective_rank, embedding_deviation
from kmtr.metrics.images import nmse
from kmtr.metrics.phenotypes import r2
from kmtr.metrics.ridge import RIDGE_PENALTIES, Probe, Ridge, fit_ridge, probe, ridge_predictions
from kmtr.metrics.segmentation import dice

__all__ = [
    "RIDGE_PENALTIES",
    "Probe",
    "Ridge",
    "bootstrap_r2",
    "dice",
    "effective_rank",
    "embedding_deviation",
    "fit_ridge",
    "nmse",
    "paired_bootstrap",
    "probe",
    "r2",
    "ridge_predictions",
]
