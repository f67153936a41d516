"""Patterns: exact counts, pure functions of their key, METHOD's density; hiding leaves something."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmtr.physics.sampling import (
    HIDDEN_LINES,
    PATTERN,
    draw_acceleration,
    gaussian,
    generator,
    hide,
    line_density,
    subject_key,
    true_acceleration,
)
from kmtr.types import InputError

KEYS = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 1000), st.integers(0, 2**64 - 1))


@given(KEYS, st.integers(2, 12), st.integers(8, 80).map(lambda n: 2 * n), st.integers(0, 6))
def test_exactly_the_budget_of_lines_and_always_the_acs(
    key: tuple[int, int, int], acceleration: int, lines: int, acs: int
) -> None:
    if lines // acceleration <= acs:
        with pytest.raises(InputError, match="ACS"):
            gaussian(generator(*key, PATTERN), 2, 3, lines, acceleration, acs)
        return
    sampled = gaussian(generator(*key, PATTERN), 2, 3, lines, acceleration, acs)
    assert sampled.shape == (2, 3, lines)
    assert (sampled.sum(-1) == lines // acceleration).all()
    first = lines // 2 - acs // 2
    assert sampled[..., first : first + acs].all()
    assert true_acceleration(sampled) == pytest.approx(lines / (lines // acceleration))


@given(KEYS)
def test_a_pattern_is_a_pure_function_of_its_key(key: tuple[int, int, int]) -> None:
    def draw(seed: int, epoch: int, subject: int, purpose: int = PATTERN) -> bytes:
        return gaussian(generator(seed, epoch, subject, purpose), 3, 4, 64, 4).tobytes()

    seed, epoch, subject = key
    assert draw(*key) == draw(*key)
    others = {draw(seed + 1, epoch, subject), draw(seed, epoch + 1, subject), draw(*key, purpose=HIDDEN_LINES)}
    others.add(draw(seed, epoch, subject ^ 1))
    assert draw(*key) not in others
    assert len(others) == 4


@given(KEYS, st.integers(1, 5), st.integers(1, 5))
def test_a_slice_does_not_depend_on_how_many_follow(key: tuple[int, int, int], few: int, more: int) -> None:
    def draw(slices: int) -> np.ndarray:
        return gaussian(generator(*key, PATTERN), slices, 3, 32, 4)

    np.testing.assert_array_equal(draw(few + more)[:few], draw(few))
    candidates = draw(few + more)
    np.testing.assert_array_equal(
        hide(generator(*key, HIDDEN_LINES), candidates, 0.5)[:few],
        hide(generator(*key, HIDDEN_LINES), candidates[:few], 0.5),
    )


@pytest.mark.parametrize(("acceleration", "share"), [(8, 0.59), (16, 0.53)])
def test_the_centre_is_sampled_as_often_as_the_method_says(acceleration: int, share: float) -> None:
    sampled = gaussian(generator(0, 0, 1, PATTERN), 40, 100, 128, acceleration)
    assert sampled[..., 60:68].mean() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("acceleration", [4, 8, 16])
def test_lines_are_the_rarer_the_farther_from_the_centre(acceleration: int) -> None:
    sampled = gaussian(generator(0, 0, 2, PATTERN), 40, 100, 128, acceleration)
    often = sampled.mean((0, 1))
    folded = (often[65:] + often[63:0:-1]) / 2  # |ky| = 1 .. 63
    bands = folded[2:62].reshape(6, 10).mean(1)
    assert (np.diff(bands) < 0).all()
    assert often.min() > 0  # the floor: every line is seen sometimes
    density = line_density(128, acceleration)
    assert density.argmax() == 64
    np.testing.assert_allclose(density[65:], density[63:0:-1])
    assert density.min() > 1 / (2 * acceleration)


def test_an_acceleration_of_one_samples_everything_and_too_high_a_one_is_refused() -> None:
    assert gaussian(generator(0, 0, 0, PATTERN), 1, 2, 16, 1).all()
    with pytest.raises(InputError, match="R = 8 leaves 4 of 32 lines, expected more than 4 ACS"):
        gaussian(generator(0, 0, 0, PATTERN), 1, 2, 32, 8)


@given(KEYS, st.floats(0.01, 0.99), st.floats(0, 1))
def test_hiding_takes_a_rounded_share_and_leaves_one(key: tuple[int, int, int], ratio: float, share: float) -> None:
    candidates = generator(*key, PATTERN).random((4, 3, 16)) < share
    candidates[0] = False
    candidates[1] = False
    candidates[1, 0, 5] = True
    hidden = hide(generator(*key, HIDDEN_LINES), candidates, ratio)
    assert hidden.shape == candidates.shape
    assert not (hidden & ~candidates).any()
    available, taken = candidates.sum((1, 2)), hidden.sum((1, 2))
    np.testing.assert_array_equal(taken, np.clip(np.rint(available * ratio), 0, np.maximum(available - 1, 0)))
    assert ((available - taken)[available > 0] >= 1).all()


def test_hiding_is_uniform_over_the_candidates() -> None:
    candidates = np.zeros((4000, 10), bool)
    candidates[:, 2:8] = True
    often = hide(generator(0, 0, 0, HIDDEN_LINES), candidates, 0.5).mean(0)
    np.testing.assert_allclose(often[2:8], 0.5, atol=0.04)  # five standard deviations


def test_accelerations_are_drawn_uniformly_and_purely() -> None:
    drawn = [draw_acceleration((4, 8, 16), 0, 0, key) for key in range(600)]
    assert drawn == [draw_acceleration((4, 8, 16), 0, 0, key) for key in range(600)]
    assert min(drawn.count(r) for r in (4, 8, 16)) > 150


def test_keys_are_stable_across_machines() -> None:
    assert subject_key("sim-0-0000007") == 25189825807342417
    assert len({subject_key(f"sim-0-{i:07d}") for i in range(1000)}) == 1000


def test_true_acceleration_counts_what_was_kept() -> None:
    sampled = np.zeros((2, 3, 32), bool)
    sampled[..., ::4] = True
    sampled[..., 15] = True
    assert true_acceleration(sampled) == pytest.approx(32 / 9)
