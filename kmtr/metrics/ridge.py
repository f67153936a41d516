"""The ridge probe that training, search and the report share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from kmtr.metrics.phenotypes import MIN_LABELLED, r2

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


def fit_ridge(features: np.ndarray, target: Float[np.ndarray, " subject"]) -> Ridge:
    """Ridge regression; penalty and scaling are chosen by the exact leave-one-out error (Golub, Heath and Wahba 1979).

    Features count either standardised, each the same, or by their own variance, as an embedding whose directions of
    little variance are noise wants it. Which of the two is nothing that a source of features should win by.

    Args:
        features: ``subject feature``, or ``subject copy feature`` where each subject is there in several copies, as
            augmentation makes them: all copies of a subject are left out together, and the first one's error counts.
        target: finite; subjects with NaN must have been left out by the caller.

    Raises:
        ValueError: fewer than 3 subjects.
    """
    (found,) = _fit(features, target[:, None])
    return found


def fit_ridges(
    features: Float[np.ndarray, "subject *copies feature"],
    labels: Float[np.ndarray, "subject target"],
    targets: Sequence[str],
) -> dict[str, Ridge]:
    """`fit_ridge` of every target that at least MIN_LABELLED subjects have.

    Args:
        labels: NaN: unknown.
    """
    known = np.isfinite(labels)
    alike: dict[bytes, list[int]] = {}  # targets that the same subjects have share what takes long
    for column in np.flatnonzero(known.sum(0) >= MIN_LABELLED):
        alike.setdefault(known[:, column].tobytes(), []).append(int(column))
    found: dict[int, Ridge] = {}
    for columns in alike.values():
        rows = known[:, columns[0]]
        found |= dict(zip(columns, _fit(features[rows], labels[np.ix_(rows, columns)]), strict=True))
    return {target: found[column] for column, target in enumerate(targets) if column in found}


def _fit(features: np.ndarray, targets: Float[np.ndarray, "subject target"]) -> list[Ridge]:
    copies = features.shape[1] if features.ndim == 3 else 1
    features = features.reshape(len(targets) * copies, -1)
    mean, smoothers = _smoothers(features, copies)
    found, scaled = [], dict[int, np.ndarray]()
    for target in targets.T:
        bias = float(target.mean())
        y = np.repeat(target.astype(np.float64), copies)[:, None] - bias
        smoother, penalty = _chosen(smoothers, y)
        if id(smoother) not in scaled:
            scaled[id(smoother)] = ((features - mean) / smoother.scale).astype(np.float64, copy=False)
        x = scaled[id(smoother)]
        weights = x.T @ smoother.dual(y, penalty)[:, 0] / x.shape[1]
        found.append(Ridge(mean, smoother.scale, weights, bias, penalty))
    return found


class Kernel:
    """Ridge regression in its dual form: of many outputs, as every pixel of an image, with one penalty. Weights of
    features are never formed.

    Args:
        features: ``row feature``, float32; `copies` rows that follow each other are of one subject.
        targets: ``row output``, some of the outputs: the penalty is chosen for them as `fit_ridges` does.
    """

    def __init__(self, features: np.ndarray, targets: np.ndarray, copies: int = 1):
        self.mean, smoothers = _smoothers(features, copies)
        smoother, self.penalty = _chosen(smoothers, targets - targets.mean(0))
        self.scale = smoother.scale
        self.rows = ((features - self.mean) / self.scale).astype(np.float32)
        self.solve = ((smoother.vectors / (smoother.values + self.penalty)) @ smoother.vectors.T).astype(np.float32)

    def weights(self, targets: Float[np.ndarray, "row output"]) -> tuple[np.ndarray, np.ndarray]:
        """Dual weights ``row output`` and bias ``output`` of some outputs, float32."""
        bias = targets.mean(0)
        return self.solve @ (targets - bias).astype(np.float32), bias.astype(np.float32)

    def __call__(self, features: Float[np.ndarray, "other feature"]) -> Float[np.ndarray, "other row"]:
        """What dual weights are multiplied by to predict these others."""
        seen = ((features - self.mean) / self.scale).astype(np.float32)
        found: np.ndarray = seen @ self.rows.T / self.rows.shape[1]
        return found


@dataclass(frozen=True)
class _Smoother:
    """The part of a ridge regression that depends on no target, of features in one scaling.

    With the Gram matrix K of the rows (over the number of features, so that penalties mean the same for any number) the
    fitted values are H y, H = K (K + penalty I)^-1, plus the mean.

    Attributes:
        scale: ``feature``, that features are divided by.
        values, vectors: eigenvalues of K, none below 0, and its eigenvectors ``row direction``.
        blocks: for each of RIDGE_PENALTIES, I - H between the rows of the same subject, ``subject copy copy``.
    """

    scale: np.ndarray
    values: np.ndarray
    vectors: np.ndarray
    blocks: list[np.ndarray]

    @staticmethod
    def of(features: np.ndarray, mean: np.ndarray, scale: np.ndarray, copies: int) -> _Smoother:
        x = (features - mean) / scale
        values, vectors = np.linalg.eigh((x @ x.T / x.shape[1]).astype(np.float64))
        values = np.clip(values, 0, None)
        n = len(features)
        of_subject = vectors.reshape(n // copies, copies, n)
        blocks = [
            (of_subject * (penalty / (values + penalty))) @ of_subject.swapaxes(1, 2) - 1 / n + 1e-6 * np.eye(copies)
            for penalty in RIDGE_PENALTIES
        ]
        return _Smoother(scale, values, vectors, blocks)

    def left_out(self, y: np.ndarray) -> tuple[float, float]:
        """The least leave-one-out error over (a part of) the outputs, and its penalty.

        The error of a subject that is left out is (I - H_gg)^-1 (y - H y)_g, with g its rows.

        Args:
            y: ``row output``, of mean zero.
        """
        rotated = self.vectors.T @ y[:, :: -(-y.shape[1] // LEAVE_ONE_OUT_OUTPUTS)]  # of a mask's pixels enough
        found = []
        for penalty, block in zip(RIDGE_PENALTIES, self.blocks, strict=True):
            residual = self.vectors @ ((penalty / (self.values + penalty))[:, None] * rotated)
            errors = np.linalg.solve(block, residual.reshape(*block.shape[:2], -1))[:, 0]
            found.append((float(np.mean(errors**2)), penalty))
        return min(found)

    def dual(self, y: np.ndarray, penalty: float) -> np.ndarray:
        """Dual weights ``row output``."""
        found: np.ndarray = self.vectors @ (self.vectors.T @ y / (self.values + penalty)[:, None])
        return found


def _smoothers(features: np.ndarray, copies: int) -> tuple[np.ndarray, tuple[_Smoother, _Smoother]]:
    """Mean of the features, and what regressions on them share where each has its own scale, or all have one.

    Args:
        features: ``row feature``; `copies` rows that follow each other are of one subject.
    """
    if len(features) < MIN_LABELLED * copies:
        there = len(features) // copies
        raise ValueError(f"ridge: expected at least {MIN_LABELLED} subjects with this label, got {there}")
    mean, sd = features.mean(0), features.std(0)
    own = np.where(sd > 1e-8 * max(float(sd.max(initial=0)), 1e-30), sd, np.ones_like(sd))
    common = np.full_like(own, max(float(np.sqrt((sd.astype(np.float64) ** 2).mean())), 1e-30))
    return mean, (_Smoother.of(features, mean, own, copies), _Smoother.of(features, mean, common, copies))


def _chosen(smoothers: Sequence[_Smoother], y: np.ndarray) -> tuple[_Smoother, float]:
    """Scaling and penalty with the least leave-one-out error; of equal ones the first."""
    errors = [smoother.left_out(y) for smoother in smoothers]
    best = min(range(len(errors)), key=lambda i: errors[i][0])
    return smoothers[best], errors[best][1]


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
    if known_train.sum() < MIN_LABELLED or known.sum() < MIN_LABELLED:
        return None
    ridge = fit_ridge(train_features[known_train], train_target[known_train])
    return Probe(target[known], ridge(features[known]), float(train_target[known_train].mean()))
