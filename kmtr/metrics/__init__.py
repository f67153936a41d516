"""Metrics: pure functions of numpy arrays, by what they judge. Formulas and conventions: README.md beside this."""

from kmtr.metrics.bootstrap import bootstrap_r2, paired_bootstrap
from kmtr.metrics.diseases import (
    Detection,
    best_f1_threshold,
    detection,
    roc,
    weighted_auroc,
    weighted_average_precision,
    weighted_f1,
    weighted_sensitivity,
)
from kmtr.metrics.embeddings import effective_rank, embedding_deviation
from kmtr.metrics.images import ImageScores, heart_box, image_scores, nmse, psnr_db, ssim
from kmtr.metrics.logistic import Logistic, fit_logistic
from kmtr.metrics.phenotypes import MIN_LABELLED, Agreement, agreement, r2, weighted_mae, weighted_pearson, weighted_r2
from kmtr.metrics.resampling import (
    Difference,
    Estimate,
    difference,
    estimate,
    holm,
    resample,
    weighted_mean,
)
from kmtr.metrics.ridge import RIDGE_PENALTIES, Kernel, Probe, Ridge, fit_ridge, fit_ridges, probe
from kmtr.metrics.segmentation import ContourDistance, contour_distance, dice, dice_at, extreme_frames, hd95
from kmtr.metrics.tables import Cell, Comparison, Score, compare, compare_pairs, score_table
from kmtr.metrics.volumes import Masks, area_length_ml, length_mm, mask_phenotypes, simpson_ml, volume_curves

__all__ = [
    "MIN_LABELLED",
    "RIDGE_PENALTIES",
    "Agreement",
    "Cell",
    "Comparison",
    "ContourDistance",
    "Detection",
    "Difference",
    "Estimate",
    "ImageScores",
    "Kernel",
    "Logistic",
    "Masks",
    "Probe",
    "Ridge",
    "Score",
    "agreement",
    "area_length_ml",
    "best_f1_threshold",
    "bootstrap_r2",
    "compare",
    "compare_pairs",
    "contour_distance",
    "detection",
    "dice",
    "dice_at",
    "difference",
    "effective_rank",
    "embedding_deviation",
    "estimate",
    "extreme_frames",
    "fit_logistic",
    "fit_ridge",
    "fit_ridges",
    "hd95",
    "heart_box",
    "holm",
    "image_scores",
    "length_mm",
    "mask_phenotypes",
    "nmse",
    "paired_bootstrap",
    "probe",
    "psnr_db",
    "r2",
    "resample",
    "roc",
    "score_table",
    "simpson_ml",
    "ssim",
    "volume_curves",
    "weighted_auroc",
    "weighted_average_precision",
    "weighted_f1",
    "weighted_mae",
    "weighted_mean",
    "weighted_pearson",
    "weighted_r2",
    "weighted_sensitivity",
]
