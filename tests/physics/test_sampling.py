"""Patterns: exact counts, pure functions of their key, METHOD's density; hiding leaves something."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmtr.physics import random
from kmtr.physics.sampling import (
    HIDDEN_LINES,
    PATTERN,
    check,
    draw_acceleration,
    gaussian,
    hide,
    line_density,
    subject_key,
    true_acceleration,
)
from kmtr.types import InputError

KEYS = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 1000), st.integers(-(2**63), 2**63 - 1))


def of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def numbers(seed: int, epoch: Tensor, key: Tensor, *shape: int, purpose: int = PATTERN) -> Tensor:
    """As training draws them: ky counts from the centre."""
    return random.uniform(seed, epoch, key, purpose, shape, (0, 0, shape[-1] // 2))


def pattern(
    key: tuple[int, int, int], slices: int, frames: int, lines: int, acceleration: int, acs: int = 4, size: int = 0
) -> Tensor:
    """The pattern of one subject, ``slice t ky``, in an array of `size` lines."""
    u = numbers(key[0], of(key[1]), of(key[2]), slices, frames, size or lines)
    return gaussian(u, of(acceleration), of(lines), acs)[0]


def enough(lines: int, acceleration: int, acs: int) -> bool:
    return acceleration == 1 or lines // acceleration > acs


@given(KEYS, st.integers(1, 12), st.integers(16, 160), st.integers(0, 6), st.integers(0, 21))
def test_exactly_the_budget_of_lines_always_the_acs_and_nothing_beyond(
    key: tuple[int, int, int], acceleration: int, lines: int, acs: int, more: int
) -> None:
    if not enough(lines, acceleration, acs):
        with pytest.raises(InputError, match="ACS"):
            check(lines, acceleration, acs)
        return
    check(lines, acceleration, acs)
    size = lines + more
    sampled = pattern(key, 2, 3, lines, acceleration, acs, size)
    assert sampled.shape == (2, 3, size)
    assert (sampled.sum(-1) == lines // acceleration).all()
    first = size // 2 - acs // 2
    assert sampled[..., first : first + acs].all()
    start = size // 2 - lines // 2
    assert not sampled[..., :start].any()
    assert not sampled[..., start + lines :].any()
    # The same subject in an array of its own size.
    assert sampled[..., start : start + lines].equal(pattern(key, 2, 3, lines, acceleration, acs))


@given(st.integers(0, 2**32 - 1), st.lists(st.tuples(KEYS, st.integers(1, 8), st.integers(20, 48)), min_size=1))
def test_a_pattern_does_not_depend_on_the_company(seed: int, subjects: list[tuple]) -> None:
    subjects = [s for s in subjects if enough(s[2], s[1], 2)] or [((0, 0, 0), 2, 20)]
    epochs, keys = zip(*((epoch, key) for (_, epoch, key), _, _ in subjects), strict=True)
    accelerations, lines = zip(*((r, n) for _, r, n in subjects), strict=True)
    u = numbers(seed, of(*epochs), of(*keys), 2, 3, 48)
    together = gaussian(u, of(*accelerations), of(*lines), 2)
    for row, ((_, epoch, key), r, n) in enumerate(subjects):
        start = 24 - n // 2
        assert together[row, ..., start : start + n].equal(pattern((seed, epoch, key), 2, 3, n, r, 2))


@given(KEYS)
def test_a_pattern_is_a_pure_function_of_its_key(key: tuple[int, int, int]) -> None:
    def draw(seed: int, epoch: int, subject: int, purpose: int = PATTERN) -> bytes:
        u = numbers(seed, of(epoch), of(subject), 3, 4, 64, purpose=purpose)
        return gaussian(u, of(4), of(64)).numpy().tobytes()

    seed, epoch, subject = key
    assert draw(*key) == draw(*key)
    others = {draw(seed + 1, epoch, subject), draw(seed, epoch + 1, subject), draw(*key, purpose=HIDDEN_LINES)}
    others.add(draw(seed, epoch, subject ^ 1))
    assert draw(*key) not in others
    assert len(others) == 4
    slices = pattern(key, 6, 4, 64, 4)
    assert len({s.numpy().tobytes() for s in slices}) == 6


@given(KEYS, st.integers(1, 5), st.integers(1, 5))
def test_a_slice_does_not_depend_on_how_many_follow(key: tuple[int, int, int], few: int, more: int) -> None:
    def draw(slices: int) -> tuple[Tensor, Tensor]:
        sampled = pattern(key, slices, 3, 32, 4)[None]
        u = numbers(key[0], of(key[1]), of(key[2]), slices, 3, 32, purpose=HIDDEN_LINES)
        return sampled, hide(u, sampled, 0.5)

    for long, short in zip(draw(few + more), draw(few), strict=True):
        assert long[:, :few].equal(short)


@pytest.mark.parametrize(("acceleration", "share"), [(8, 0.59), (16, 0.53)])
def test_the_centre_is_sampled_as_often_as_the_method_says(acceleration: int, share: float) -> None:
    sampled = pattern((0, 0, 1), 40, 100, 128, acceleration).float()
    assert sampled[..., 60:68].mean() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("acceleration", [4, 8, 16])
def test_lines_are_the_rarer_the_farther_from_the_centre(acceleration: int) -> None:
    often = pattern((0, 0, 2), 40, 100, 128, acceleration).double().mean((0, 1))
    folded = (often[65:] + often[1:64].flip(0)) / 2  # |ky| = 1 .. 63
    bands = folded[2:62].reshape(6, 10).mean(1)
    assert (bands.diff() < 0).all()
    assert often.min() > 0  # the floor: every line is seen sometimes
    (density,) = line_density(of(acceleration), of(128), 128)
    assert density.argmax() == 64
    torch.testing.assert_close(density[65:], density[1:64].flip(0))
    assert density.min() > 1 / (2 * acceleration)


def test_lines_are_drawn_by_the_gaussian_law() -> None:
    # One line beside no ACS (R = lines) is drawn exactly in proportion to its weight.
    lines = 24
    sampled = pattern((0, 0, 3), 200, 1000, lines, lines, acs=0).double().sum((0, 1))
    offset = torch.arange(lines, dtype=torch.float64) - lines // 2
    law = torch.exp(-0.5 * (offset / (lines / 5)) ** 2) + 1 / (2 * lines)
    expected = law / law.sum() * 200_000
    chi = ((sampled - expected) ** 2 / expected).sum()
    assert chi < 49.7  # 23 degrees of freedom, the 0.1 % point


def test_an_acceleration_of_one_samples_all_own_lines_and_too_high_a_one_is_refused() -> None:
    assert pattern((0, 0, 0), 1, 2, 16, 1).all()
    assert pattern((0, 0, 0), 1, 2, 16, 1, size=20)[0, 0].nonzero().flatten().tolist() == list(range(2, 18))
    check(2, 1, 4)
    with pytest.raises(InputError, match="R = 8 leaves 4 of 32 lines, expected more than 4 ACS; lower"):
        check(32, 8, 4)


@given(KEYS, st.floats(0.01, 0.99), st.floats(0, 1))
def test_hiding_takes_a_rounded_share_and_leaves_one(key: tuple[int, int, int], ratio: float, share: float) -> None:
    seed, epoch, subject = key[0], of(key[1], 0), of(key[2], 0)
    candidates = numbers(seed, epoch, subject, 4, 3, 16) < share
    candidates[0, :2] = False
    candidates[0, 1, 0, 5] = True
    hidden = hide(numbers(seed, epoch, subject, 4, 3, 16, purpose=HIDDEN_LINES), candidates, ratio)
    assert hidden.shape == candidates.shape
    assert not (hidden & ~candidates).any()
    for available, taken in zip(
        candidates.sum((2, 3)).flatten().tolist(), hidden.sum((2, 3)).flatten().tolist(), strict=True
    ):
        assert taken == min(round(available * ratio), max(available - 1, 0))


def test_equal_numbers_still_hide_the_exact_count() -> None:
    candidates = torch.ones(2, 3, 10, dtype=torch.bool)
    assert (hide(torch.full((2, 3, 10), 0.5), candidates, 0.7).sum(-1) == 7).all()
    assert (gaussian(torch.full((1, 2, 3, 32), 0.5), of(4), of(32)).sum(-1) == 8).all()


def test_hiding_is_uniform_over_the_candidates() -> None:
    candidates = torch.zeros(1, 4000, 10, dtype=torch.bool)
    candidates[..., 2:8] = True
    u = random.uniform(0, of(0), of(0), HIDDEN_LINES, (4000, 10))
    often = hide(u, candidates, 0.5)[0].double().mean(0)
    assert (often[2:8] - 0.5).abs().max() < 0.04  # five standard deviations


def test_accelerations_are_drawn_uniformly_and_purely() -> None:
    key = torch.arange(6000)
    drawn = draw_acceleration((4, 8, 16), 0, torch.zeros_like(key), key)
    assert drawn[:100].equal(torch.cat([draw_acceleration((4, 8, 16), 0, of(0), key[i : i + 1]) for i in range(100)]))
    for r in (4, 8, 16):
        assert (drawn == r).sum().item() == pytest.approx(2000, abs=150)
    assert set(drawn.tolist()) == {4, 8, 16}
    assert not drawn.equal(draw_acceleration((4, 8, 16), 0, torch.ones_like(key), key))


def test_keys_are_stable_across_machines() -> None:
    assert subject_key("sim-0-0000007") == 25189825807342417
    assert len({subject_key(f"sim-0-{i:07d}") for i in range(1000)}) == 1000


def test_true_acceleration_counts_what_was_kept_of_what_exists() -> None:
    sampled = torch.zeros(1, 2, 3, 40, dtype=torch.bool)
    existing = torch.zeros_like(sampled)
    existing[:, :, :2, 4:36] = True  # 32 own lines of 40, the last frame padded
    sampled[..., 4:36:4] = True
    sampled[..., 19] = True
    sampled &= existing
    assert true_acceleration(sampled, existing).item() == pytest.approx(32 / 9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_patterns() -> None:
    key = torch.arange(64)
    u = numbers(0, key, key, 3, 8, 64)
    cpu = gaussian(u, of(4).expand(64), of(60).expand(64))
    gpu = gaussian(u.cuda(), of(4).expand(64).cuda(), of(60).expand(64).cuda())
    assert gpu.cpu().equal(cpu)
    assert hide(u.cuda(), gpu, 0.7).cpu().equal(hide(u, cpu, 0.7))
