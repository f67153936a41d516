"""Logistic regression with a fixed penalty, by Newton's method."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import expit

ITERATIONS = 100
PRECISION = 1e-12
"""Newton's decrement per subject (gradient times step), below which one more step is the last."""


@dataclass(frozen=True)
class Logistic:
    """A fitted logistic regression on standardised features.

    Attributes:
        mean, scale: taken off the features and dividing them, ``feature``.
        weights: ``feature``; bias: log odds at the mean.
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: float

    def __call__(self, features: Float[np.ndarray, "subject feature"]) -> Float[np.ndarray, " subject"]:
        """Probabilities; a feature that is NaN counts as its mean."""
        found: np.ndarray = expit(_standardised(features, self.mean, self.scale) @ self.weights + self.bias)
        return found


def fit_logistic(
    features: Float[np.ndarray, "subject feature"], target: Float[np.ndarray, " subject"], penalty: float = 1.0
) -> Logistic:
    """Minimum of the log loss, summed over subjects, and penalty / 2 times the squared weights of standardised
    features, the bias free: scikit-learn's LogisticRegression with C = 1 / penalty. With a penalty it exists also where
    a feature tells both classes apart without error.

    Args:
        features: NaN counts as the mean; each is known of at least one subject.
        target: 0 or 1.

    Raises:
        ValueError: one class only.
    """
    if not 0 < target.sum() < len(target):
        raise ValueError(f"logistic regression: expected both classes, got {target.sum():g} of {len(target)} subjects")
    mean, sd = np.nanmean(features, axis=0), np.nanstd(features, axis=0)
    scale = np.where(sd > 1e-8 * np.maximum(np.abs(mean), 1e-30), sd, 1.0)
    x = np.column_stack([_standardised(features, mean, scale), np.ones(len(target))])
    free = np.append(np.full(features.shape[1], penalty), 0.0)
    weights = np.append(np.zeros(features.shape[1]), np.log(target.mean() / (1 - target.mean())))

    def loss(at: np.ndarray) -> float:
        score = x @ at
        return float((np.logaddexp(0, score) - target * score).sum() + 0.5 * (free * at**2).sum())

    for _ in range(ITERATIONS):
        p = expit(x @ weights)
        gradient = x.T @ (p - target) + free * weights
        step = np.linalg.solve((x.T * (p * (1 - p))) @ x + np.diag(free), gradient)
        decrement, length = float(gradient @ step), 1.0
        if decrement < PRECISION * len(target):  # the last step squares what is left of the error
            weights = weights - step
            break
        while loss(weights - length * step) > loss(weights) - 0.25 * length * decrement and length > 1e-6:
            length /= 2
        weights = weights - length * step
    return Logistic(mean, scale, weights[:-1], float(weights[-1]))


def _standardised(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(features), (features - mean) / scale, 0.0)
