"""Logistic regression: closed form, scikit-learn's weights, unknown features, classes that are apart."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit

from kmtr.metrics import fit_logistic


def drawn(subjects: int = 120) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    features = rng.normal([150.0, 60.0, 5.0], [30.0, 8.0, 0.5], (subjects, 3))
    features[:, 2] = features[:, 0] - features[:, 1]  # as stroke volumes are
    return features, (rng.random(subjects) < expit((features[:, 0] - 160) / 15)).astype(float)


@pytest.mark.parametrize("penalty", [0.1, 1.0, 30.0])
def test_weights_are_those_of_scikit_learn(penalty: float) -> None:
    from sklearn.linear_model import LogisticRegression

    features, target = drawn()
    found = fit_logistic(features, target, penalty)
    standard = (features - features.mean(0)) / features.std(0)
    other = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000).fit(standard, target)
    np.testing.assert_allclose(found.weights, other.coef_[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found(features), other.predict_proba(standard)[:, 1], rtol=1e-4)


def test_a_feature_of_two_values_in_closed_form() -> None:
    """Of 4 subjects with -1 one is diseased, of 4 with +1 three are; without a penalty these are the probabilities."""
    features = np.repeat([-1.0, 1.0], 4)[:, None]
    found = fit_logistic(features, np.array([1, 0, 0, 0, 1, 1, 1, 0.0]), penalty=0.0)
    np.testing.assert_allclose(found(np.array([[-1.0], [1.0], [np.nan]])), [0.25, 0.75, 0.5])
    assert found.weights[0] == pytest.approx(logit(0.75))


def test_features_that_say_nothing_leave_the_prevalence() -> None:
    target = np.array([1, 0, 0, 0, 1.0])
    np.testing.assert_allclose(fit_logistic(np.full((5, 2), 7.0), target)(np.full((2, 2), 9.0)), 0.4)


def test_classes_that_are_apart_have_finite_weights_and_one_class_is_refused() -> None:
    features = np.arange(40.0)[:, None]
    found = fit_logistic(features, (features[:, 0] > 19).astype(float))
    assert np.isfinite(found.weights).all()
    assert np.all(np.diff(found(features)) > 0)
    with pytest.raises(ValueError, match="expected both classes, got 0 of 40 subjects"):
        fit_logistic(features, np.zeros(40))
