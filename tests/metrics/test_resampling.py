"""Bootstrap of several seeds and systems, paired differences, Holm's correction."""

from __future__ import annotations

import inspect
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kmtr.metrics import (
    Probe,
    bootstrap_r2,
    difference,
    estimate,
    holm,
    resample,
    weighted_auroc,
    weighted_average_precision,
    weighted_f1,
    weighted_mae,
    weighted_mean,
    weighted_pearson,
    weighted_r2,
    weighted_sensitivity,
)
from kmtr.types import InputError


def scored(*scores: np.ndarray, resamples: int = 500, seed: int = 0) -> np.ndarray:
    """Draws of mean scores, one per seed."""
    return resample([partial(weighted_mean, one) for one in scores], len(scores[0]), resamples, seed)


def systems(seed: int, *noises: float, subjects: int = 200) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal(subjects)
    return truth, [truth + noise * rng.standard_normal(subjects) for noise in noises]


def test_the_first_draw_is_the_cohort_and_the_others_are_draws_of_as_many_subjects() -> None:
    seen: list[np.ndarray] = []

    def count(weights: np.ndarray) -> np.ndarray:
        seen.append(weights)
        return weights.sum(1)

    drawn = resample([count], 7, 50)
    np.testing.assert_array_equal(drawn, np.full((51, 1), 7))
    np.testing.assert_array_equal(seen[0], np.ones((1, 7)))
    weights = np.concatenate(seen[1:])
    assert weights.shape == (50, 7)
    assert len(np.unique(weights, axis=0)) > 40
    assert weights.mean() == 1


def test_draws_follow_from_the_seed_and_not_from_how_many_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    score = np.random.default_rng(0).standard_normal(30)
    whole = scored(score)
    assert not np.array_equal(whole, scored(score, seed=1))
    monkeypatch.setattr("kmtr.metrics.resampling._CELLS", 200)
    np.testing.assert_allclose(scored(score), whole, rtol=1e-12)


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    score = 5 + 2 * np.random.default_rng(1).standard_normal(400)
    found = estimate(scored(score, resamples=4000))
    half = 1.96 * score.std() / math.sqrt(400)
    assert found.value == pytest.approx(score.mean())
    assert (found.low, found.high) == pytest.approx((score.mean() - half, score.mean() + half), abs=0.1 * half)
    assert math.isnan(found.seed_sd)
    assert (found.seeds, found.draws) == (1, 4000)


def test_r2_has_the_interval_of_the_probes_bootstrap() -> None:
    truth, (predicted,) = systems(2, 0.5, subjects=300)
    found = estimate(resample([partial(weighted_r2, truth, predicted, 0.0)], 300, 3000))
    probe = Probe(truth, predicted, 0.0)
    assert found.value == pytest.approx(probe.r2)
    assert (found.low, found.high) == pytest.approx(bootstrap_r2(probe, 3000), abs=0.01)


def test_seeds_are_averaged_for_each_subject_before_subjects_are_drawn() -> None:
    """Errors of opposite seeds cancel in every draw; predictions are not averaged, which would be an ensemble."""
    score = np.random.default_rng(3).standard_normal(50)
    found = estimate(scored(1 + score, 1 - score))
    assert (found.low, found.value, found.high) == pytest.approx((1, 1, 1))
    assert found.seed_sd == pytest.approx(np.std([1 + score.mean(), 1 - score.mean()], ddof=1))
    several = np.random.default_rng(4).standard_normal((3, 50))
    by_seed, by_subject = estimate(scored(*several)), estimate(scored(several.mean(0)))
    assert (by_seed.low, by_seed.value, by_seed.high) == pytest.approx(
        (by_subject.low, by_subject.value, by_subject.high)
    )

    truth, guesses = systems(5, 0.8, 0.8)
    each = [partial(weighted_mae, truth, guess) for guess in guesses]
    found, ensemble = estimate(resample(each, 200)), weighted_mae(truth, np.mean(guesses, 0), np.ones((1, 200)))[0]
    assert found.value == pytest.approx(np.mean([np.abs(guess - truth).mean() for guess in guesses]))
    assert found.value > 1.2 * ensemble


def test_scores_that_are_nan_are_left_out() -> None:
    score = np.random.default_rng(6).standard_normal(40)
    holes = np.append(score, [np.nan] * 5)
    assert estimate(scored(holes)).value == pytest.approx(score.mean())


@pytest.mark.parametrize("truth", [[], [np.nan] * 3, [1.0], [1.0, np.nan, np.nan, np.nan]])
def test_every_statistic_of_next_to_nothing_is_nan_and_no_exception(truth: list[float]) -> None:
    labels, guess = np.array(truth, float), np.arange(len(truth)) + 0.5
    statistics = [
        partial(weighted_r2, labels, guess, 0.0),
        partial(weighted_pearson, labels, guess),
        partial(weighted_auroc, labels, guess),
        partial(weighted_average_precision, labels, guess),
        partial(weighted_sensitivity, labels, guess),
        partial(weighted_f1, labels, guess, 0.5),
    ]
    assert np.isnan(resample(statistics, len(labels), 50)).all()
    mae = resample([partial(weighted_mae, labels, guess)], len(labels), 50)
    assert np.isnan(mae).all() == (not np.isfinite(labels).any())


@pytest.mark.parametrize("score", [np.zeros(0), np.full(4, np.nan)])
def test_nothing_known_is_nan(score: np.ndarray) -> None:
    found = estimate(scored(score))
    assert all(map(math.isnan, (found.value, found.low, found.high)))
    assert found.draws == 0
    assert math.isnan(difference(scored(score), scored(score)).p)


def test_draws_on_which_a_metric_is_undefined_are_counted() -> None:
    truth, score = np.array([1.0] + [0.0] * 9), np.arange(10.0)
    found = estimate(resample([partial(weighted_auroc, truth, score)], 10, 1000))
    assert 500 < found.draws < 750  # 1 - .9^10 of the draws hold the one diseased subject
    assert found.value == found.low == found.high == 0


def test_the_paired_interval_covers_a_known_difference() -> None:
    """R2 is 1 - noise^2: the true difference is .36 - .25. Nominal 95 % over 200 repeated studies."""
    covered, found_better = 0, 0
    for seed in range(200):
        truth, guesses = systems(seed, 0.5, 0.6)
        a, b = (resample([partial(weighted_r2, truth, guess, 0.0)], 200, 400, seed) for guess in guesses)
        found = difference(a, b)
        covered += found.low <= 0.36 - 0.25 <= found.high
        found_better += found.p < 0.05
    assert 180 <= covered <= 199
    assert found_better > 100


def test_p_values_under_no_difference_are_seldom_small() -> None:
    small = 0
    for seed in range(100):
        truth, guesses = systems(seed + 1000, 0.5, 0.5)
        small += difference(*(scored(np.abs(guess - truth), resamples=400, seed=seed) for guess in guesses)).p < 0.05
    assert small <= 12


def test_pairing_takes_away_what_subjects_have_in_common() -> None:
    rng = np.random.default_rng(7)
    hard = 5 * rng.standard_normal(100)
    a, b = scored(hard + 0.1 * rng.standard_normal(100) + 0.2), scored(hard + 0.1 * rng.standard_normal(100))
    found = difference(a, b)
    assert 0 < found.low < 0.2 < found.high < 0.3
    assert found.p == pytest.approx(2 / 501)  # the least that 500 draws can say, never 0
    assert estimate(a).low < 0 < estimate(a).high
    mirrored = difference(b, a)
    assert (mirrored.value, mirrored.low, mirrored.high, mirrored.p) == pytest.approx(
        (-found.value, -found.high, -found.low, found.p)
    )


def test_the_same_system_does_not_differ_from_itself() -> None:
    one = scored(np.random.default_rng(8).standard_normal(20))
    found = difference(one, one)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


@given(st.integers(0, 2**31))
def test_p_is_small_exactly_where_the_interval_leaves_out_zero(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = difference(scored(rng.standard_normal(30) + 0.35), scored(np.zeros(30)))
    if found.low > 0.02 or found.high < -0.02:
        assert found.p <= 0.06
    if found.low < -0.02 < 0.02 < found.high:
        assert found.p >= 0.05


def test_systems_on_other_draws_are_refused() -> None:
    score = np.ones(9)
    with pytest.raises(InputError, match="expected both systems on the same draws, got 501 and 401"):
        inspect.unwrap(difference)(scored(score), scored(score, resamples=400))  # without the test suite's type checks


def test_holm_by_hand() -> None:
    """Sorted .005, .01, .03, .04 times 4, 3, 2, 1 is .02, .03, .06, .04; none less than the one before."""
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.01, np.nan, 0.5, 0.6])), [0.03, np.nan, 1, 1])
    assert holm(np.zeros(0)).shape == (0,)


@given(arrays.arrays(np.float64, st.integers(1, 12), elements=st.floats(1e-4, 1)))
def test_holm_is_monotone_and_the_order_changes_nothing(p: np.ndarray) -> None:
    adjusted = holm(p)
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(1, p * len(p)) + 1e-12).all()  # never more than Bonferroni
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()
    shuffled = np.random.default_rng(len(p)).permutation(len(p))
    np.testing.assert_allclose(holm(p[shuffled]), adjusted[shuffled])
    ones = holm(np.append(p, 1.0))[:-1]
    assert (ones >= adjusted - 1e-12).all()  # more comparisons, less to claim
