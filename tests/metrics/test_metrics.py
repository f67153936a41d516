"""The ridge's leave-one-out error is what refitting would give; the probe and its intervals say what they claim."""

from __future__ import annotations

import numpy as np
import pytest

from kmtr.metrics import (
    RIDGE_PENALTIES,
    Kernel,
    Probe,
    bootstrap_r2,
    dice,
    effective_rank,
    embedding_deviation,
    fit_ridge,
    nmse,
    paired_bootstrap,
    probe,
    r2,
)
from kmtr.types import UNLABELLED


def problem(seed: int, subjects: int, features: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((subjects, features)) * rng.uniform(0.1, 10, features) + 5
    weights = rng.standard_normal(features) / x.std(0)
    return x, x @ weights + noise * rng.standard_normal(subjects) * np.sqrt(features) + 100


def solve(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Ridge with a free intercept by its normal equations: weights, intercept."""
    centred = x - x.mean(0)
    weights = np.linalg.solve(
        centred.T @ centred / x.shape[1] + penalty * np.eye(x.shape[1]), centred.T @ (y - y.mean()) / x.shape[1]
    )
    return weights, float(y.mean() - x.mean(0) @ weights)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
@pytest.mark.parametrize(("subjects", "features"), [(12, 5), (15, 30), (30, 8)])
def test_the_penalty_is_the_best_of_explicit_refits_without_each_subject(
    subjects: int, features: int, noise: float, copies: int
) -> None:
    """Without all its copies, that is, and judged by the first of them."""
    x, y = problem(subjects, subjects, features, noise)
    moved = x[:, None] + np.random.default_rng(9).standard_normal((subjects, copies, features))
    moved[:, 0] = x
    ridge = fit_ridge(x if copies == 1 else moved, y)
    x, y = moved.reshape(-1, features), np.repeat(y, copies)
    standard = (x - ridge.mean) / ridge.scale
    errors = []
    for penalty in RIDGE_PENALTIES:
        left_out = []
        for i in range(subjects):
            own = np.s_[i * copies : (i + 1) * copies]
            weights, intercept = solve(np.delete(standard, own, 0), np.delete(y, own), penalty)
            left_out.append((y[own][0] - standard[own][0] @ weights - intercept) ** 2)
        errors.append(np.mean(left_out))
    assert ridge.penalty == RIDGE_PENALTIES[int(np.argmin(errors))]
    weights, intercept = solve(standard, y, ridge.penalty)
    np.testing.assert_allclose(ridge.weights, weights, rtol=1e-6, atol=1e-9 * abs(weights).max())
    np.testing.assert_allclose(ridge(x), standard @ weights + intercept, rtol=1e-9)


def test_different_problems_choose_different_penalties() -> None:
    assert fit_ridge(*problem(0, 50, 5, 0.01)).penalty < fit_ridge(*problem(0, 50, 5, 30.0)).penalty


def test_a_constant_feature_is_harmless_and_scale_does_not_matter() -> None:
    x, y = problem(1, 40, 6, 0.5)
    plain = fit_ridge(x, y)(x)
    np.testing.assert_allclose(fit_ridge(np.c_[x, np.full(40, 7.0)], y)(np.c_[x, np.full(40, 7.0)]), plain, rtol=1e-2)
    np.testing.assert_allclose(fit_ridge(x * 1e4, y)(x * 1e4), plain, rtol=1e-6)
    np.testing.assert_allclose(fit_ridge(x.astype(np.float32), y)(x), plain, rtol=1e-4)


def test_a_linear_toy_is_learnt_and_noise_is_not() -> None:
    x, y = problem(2, 300, 10, 0.0)
    found = probe(x[:200], y[:200], x[200:], y[200:])
    assert found is not None
    assert found.r2 > 0.999
    assert found.mae < 0.05 * y.std()
    noise = np.random.default_rng(3).standard_normal(300)
    nothing = probe(x[:200], noise[:200], x[200:], noise[200:])
    assert nothing is not None
    assert abs(nothing.r2) < 0.15


def test_r2_of_the_training_mean_is_about_nothing() -> None:
    rng = np.random.default_rng(0)
    train, held_out = rng.standard_normal((2, 1000)) * 10 + 60
    assert abs(r2(held_out, np.full(1000, train.mean()), train.mean())) == 0
    assert abs(r2(held_out, np.full(1000, train.mean()), held_out.mean())) < 0.01
    assert r2(held_out, held_out, train.mean()) == 1
    assert r2(held_out, 2 * train.mean() - held_out, train.mean()) == pytest.approx(-3)


def test_unknown_labels_are_left_out() -> None:
    x, y = problem(4, 60, 4, 0.1)
    holes = y.copy()
    holes[[1, 5, 45]] = np.nan
    found = probe(x[:40], holes[:40], x[40:], holes[40:])
    keep, known = np.isfinite(holes[:40]), np.isfinite(holes[40:])
    expected = probe(x[:40][keep], y[:40][keep], x[40:][known], y[40:][known])
    assert found is not None
    assert expected is not None
    np.testing.assert_array_equal(found.predicted, expected.predicted)
    assert len(found.truth) == 19
    assert found.training_mean == pytest.approx(y[:40][keep].mean())
    few = np.full(60, np.nan)
    few[[0, 1, 50]] = 1.0
    assert probe(x[:40], few[:40], x[40:], y[40:]) is None
    assert probe(x[:40], y[:40], x[40:], few[40:]) is None
    with pytest.raises(ValueError, match="expected at least 3 subjects with this label, got 2"):
        fit_ridge(x[:2], y[:2])


def probes(seed: int, noise_a: float, noise_b: float, subjects: int = 200) -> tuple[Probe, Probe]:
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal(subjects)
    a = Probe(truth, truth + noise_a * rng.standard_normal(subjects), 0.0)
    return a, Probe(truth, truth + noise_b * rng.standard_normal(subjects), 0.0)


def test_the_paired_interval_has_the_sign_of_the_gain() -> None:
    better, worse = probes(0, 0.3, 0.6)
    low, high = paired_bootstrap(better, worse, 500)
    assert 0 < low < better.r2 - worse.r2 < high
    mirrored = paired_bootstrap(worse, better, 500)
    assert mirrored == pytest.approx((-high, -low))
    assert paired_bootstrap(better, better, 100) == (0, 0)
    assert paired_bootstrap(better, worse, 500) == (low, high)


def test_the_paired_interval_covers_the_true_gain() -> None:
    """R2 is 1 - noise^2, so the true gain is 0.36 - 0.25; 95 % nominal, over 200 repeated studies."""
    covered = 0
    for seed in range(200):
        low, high = paired_bootstrap(*probes(seed, 0.5, 0.6), 400, seed)
        covered += low <= 0.36 - 0.25 <= high
    assert covered >= 180


def test_the_interval_of_r2() -> None:
    a, _ = probes(1, 0.5, 0.5)
    low, high = bootstrap_r2(a, 500)
    assert low < a.r2 < high
    assert high - low < 0.3


def test_nmse_is_energy_over_energy() -> None:
    reference = np.array([3 + 4j, 0])
    assert nmse(reference, reference) == 0
    assert nmse(np.zeros(2), reference) == 1
    assert nmse(np.array([3 + 4j, 5j]), reference) == pytest.approx(1)


def test_many_targets_by_the_dual_are_the_ridge_of_each() -> None:
    x, y = problem(3, 30, 50, 1.0)
    others, _ = problem(4, 7, 50, 1.0)
    alone = fit_ridge(x, y)(others)
    targets = np.stack([y, 2 * y + 3], 1)
    kernel = Kernel(x, targets[:, :1])
    weights, bias = kernel.weights(targets)
    expected = np.stack([alone, 2 * alone + 3], 1)
    np.testing.assert_allclose(kernel(others) @ weights + bias, expected, rtol=1e-4, atol=1e-4)


def test_dice_in_closed_form_without_what_nobody_contoured() -> None:
    truth = np.array([[0, 1, 1, 2, UNLABELLED, UNLABELLED]], np.uint8)
    predicted = np.array([[1, 1, 1, 0, 1, 2]], np.uint8)
    scores = dice(truth, predicted, classes=4)
    np.testing.assert_allclose(scores[0, :2], [2 * 2 / (2 + 3), 0])
    assert np.isnan(scores[0, 2])
    assert dice(truth, truth, classes=3).tolist() == [[1.0, 1.0]]


def test_effective_rank_and_deviation_see_a_collapse() -> None:
    rng = np.random.default_rng(0)
    directions = np.eye(6)[:3]
    even = np.concatenate([directions, -directions]) + 5  # three directions, each as strong
    assert effective_rank(even) == pytest.approx(3)
    assert effective_rank(rng.standard_normal((50, 1)) * directions[:1]) == pytest.approx(1)
    assert effective_rank(np.full((9, 4), 2.5)) == 0
    sphere = rng.standard_normal((4000, 64))
    assert embedding_deviation(sphere) == pytest.approx(1, abs=0.02)
    assert embedding_deviation(3 * sphere) == pytest.approx(embedding_deviation(sphere))
    assert embedding_deviation(np.tile(sphere[:1], (9, 1))) == pytest.approx(0, abs=1e-12)
    assert embedding_deviation(sphere * 0.01 + 1) < 0.02
