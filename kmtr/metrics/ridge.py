"""The ridge probe that training, search and the report share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from kmtr.metrics.phenotypes import r2

LEAVE_ONE_OUT_OUTPUTS = 1000
RIDGE_PENALTIES = tuple(10.0**e for e in np.arange(-3, 5.1, 0.5))


@dataclass(frozen=True)
class Ridge:
    """A fitted ridge regression on scaled features.

    Attributes:
        mean, scale: taken off the features and dividing them, ``feature``.
        weights: ``feature``; bias: the mean of the target.
        penalty: chosen by leave-one-out error.
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: float
    penalty: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return (features - self.mean) / self.scale @ self.weights + self.bias


def fit_ridge(features: np.ndarray, target: np.ndarray) -> Ridge:
    """Ridge regression; penalty and scaling chosen by the exact leave-one-out error (Golub, Heath and Wahba 1979).

    Features count either standardised, each the same, or by their own variance, as an embedding whose directions of
    little variance are noise wants it. Which of the two is nothing that a source of features should win by.

    Args:
        features: ``subject feature``, or ``subject copy feature`` where each subject is there in several copies, as
            augmentation makes them: all copies of a subject are left out together, and the first one's error counts.
        target: ``subject``, finite; NaN must have been left out by the caller.

    Raises:
        ValueError: fewer than 3 subjects.
    """
    bias, copies = float(target.mean()), features.shape[1] if features.ndim == 3 else 1
    features = features.reshape(len(target) * copies, -1)
    y = np.repeat(target.astype(np.float64), copies)[:, None] - bias
    mean, scale, penalty, dual = _best(features, y, copies)
    x = ((features - mean) / scale).astype(np.float64)
    return Ridge(mean, scale, x.T @ dual[:, 0] / x.shape[1], bias, penalty)


class Kernel:
    """Ridge regression in its dual form: of many outputs, as every pixel of an image, with one penalty. Weights of
    features are never formed.

    Args:
        features: ``row feature``, float32; `copies` rows that follow each other are of one subject.
        targets: ``row output``, some of the outputs: the penalty is chosen for them as `fit_ridge` does.
    """

    def __init__(self, features: np.ndarray, targets: np.ndarray, copies: int = 1):
        self.mean, self.scale, self.penalty, _ = _best(features, targets - targets.mean(0), copies)
        self.rows = ((features - self.mean) / self.scale).astype(np.float32)
        gram = (self.rows @ self.rows.T / self.rows.shape[1]).astype(np.float64)
        values, vectors = np.linalg.eigh(gram)
        self.solve = ((vectors / (np.clip(values, 0, None) + self.penalty)) @ vectors.T).astype(np.float32)

    def weights(self, targets: Float[np.ndarray, "row output"]) -> tuple[np.ndarray, np.ndarray]:
        """Dual weights ``row output`` and bias ``output`` of some outputs, float32."""
        bias = targets.mean(0)
        return self.solve @ (targets - bias).astype(np.float32), bias.astype(np.float32)

    def __call__(self, features: Float[np.ndarray, "other feature"]) -> Float[np.ndarray, "other row"]:
        """What dual weights are multiplied by to predict these others."""
        seen = ((features - self.mean) / self.scale).astype(np.float32)
        found: np.ndarray = seen @ self.rows.T / self.rows.shape[1]
        return found


def _best(features: np.ndarray, y: np.ndarray, copies: int = 1) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Mean and scale of the features, penalty and dual weights with the least leave-one-out error.

    `copies` rows that follow each other are of one subject.
    """
    mean, sd = features.mean(0), features.std(0)
    own = np.where(sd > 1e-8 * max(float(sd.max(initial=0)), 1e-30), sd, np.ones_like(sd))
    common = np.full_like(own, max(float(np.sqrt((sd.astype(np.float64) ** 2).mean())), 1e-30))
    found = []
    for scale in (own, common):
        x = (features - mean) / scale
        found.append((scale, *_dual((x @ x.T / x.shape[1]).astype(np.float64), y, copies)))
    scale, _, penalty, dual = min(found, key=lambda one: one[1])
    return mean, scale, penalty, dual


def _dual(gram: np.ndarray, y: np.ndarray, copies: int) -> tuple[float, float, np.ndarray]:
    """The least leave-one-out error over (a part of) the outputs, its penalty, and dual weights ``row output``.

    The error of a subject that is left out is (I - H_gg)^-1 (y - H y)_g, with g its rows and H the smoother.

    Args:
        gram: ``row row`` over the number of features: it serves any number of them, and H = K (K + p I)^-1 in its
            eigenbasis, plus the mean.
        y: ``row output``, of mean zero.
    """
    n = len(y)
    if n < 3 * copies:
        raise ValueError(f"ridge: expected at least 3 subjects with this label, got {n // copies}")
    values, vectors = np.linalg.eigh(gram)
    values = np.clip(values, 0, None)
    rotated = vectors.T @ y
    some = rotated[:, :: -(-y.shape[1] // LEAVE_ONE_OUT_OUTPUTS)]  # of a mask's pixels enough to choose by
    of_subject = vectors.reshape(n // copies, copies, n)
    best: tuple[float, float] = (np.inf, 0.0)
    for penalty in RIDGE_PENALTIES:
        shrink = penalty / (values + penalty)
        residual = (vectors @ (shrink[:, None] * some)).reshape(n // copies, copies, -1)
        block = (of_subject * shrink) @ of_subject.swapaxes(1, 2) - 1 / n + 1e-6 * np.eye(copies)
        error = float(np.mean(np.linalg.solve(block, residual)[:, 0] ** 2))
        best = min(best, (error, penalty))
    return *best, vectors @ (rotated / (values + best[1])[:, None])


@dataclass(frozen=True)
class Probe:
    """One target on held-out subjects: truth and prediction ``subject`` in its unit, and the training mean."""

    truth: np.ndarray
    predicted: np.ndarray
    training_mean: float

    @property
    def r2(self) -> float:
        return r2(self.truth, self.predicted, self.training_mean)

    @property
    def mae(self) -> float:
        return float(np.mean(np.abs(self.truth - self.predicted)))


def probe(
    train_features: np.ndarray, train_target: np.ndarray, features: np.ndarray, target: np.ndarray
) -> Probe | None:
    """Ridge fitted on labelled training subjects, scored on held-out ones; None where fewer than 3 of either have the
    label.
    """
    known_train, known = np.isfinite(train_target), np.isfinite(target)
    if known_train.sum() < 3 or known.sum() < 3:
        return None
    ridge = fit_ridge(train_features[known_train], train_target[known_train])
    return Probe(target[known], ridge(features[known]), float(train_target[known_train].mean()))
