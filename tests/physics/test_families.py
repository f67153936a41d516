"""Every family of patterns: line counts, densities, purity, and what is measured of a pattern."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmtr.config import drawn_lines, most_lines
from kmtr.physics import random, sampling
from kmtr.physics.sampling import FAMILIES, kt_density, line_density, wide_density
from kmtr.types import InputError

KEYS = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 1000), st.integers(-(2**63), 2**63 - 1))


def of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def pattern(
    family: str,
    lines: int,
    acceleration: int,
    acs: int,
    key: tuple[int, int, int] = (0, 0, 0),
    shape: tuple[int, int] = (2, 3),
    size: int = 0,
) -> Tensor:
    """``slice t ky`` of one subject, in an array of `size` lines; drawn as training does."""
    size = size or lines
    u = random.uniform(key[0], of(key[1]), of(key[2]), random.PATTERN, (*shape, size), (0, 0, size // 2))
    return sampling.pattern(u, of(acceleration), of(lines), acs, family)[0]


@given(KEYS, st.sampled_from(list(FAMILIES)), st.integers(1, 12), st.integers(16, 160), st.integers(0, 7))
def test_exact_counts_the_acs_lines_and_nothing_beyond(
    key: tuple[int, int, int], family: str, acceleration: int, lines: int, acs: int
) -> None:
    try:
        sampling.check(lines, acceleration, acs, family)
    except InputError:
        assert acceleration > 1
        assert lines // acceleration <= acs
        assert family in ("gaussian", "equispaced")
        return
    size = lines + key[1] % 22
    sampled = pattern(family, lines, acceleration, acs, key, size=size)
    counts = sampled.sum(-1)
    most, first = most_lines(lines, acceleration, acs, family), size // 2 - acs // 2
    central = sampled[..., first : first + acs]
    if family == "kt-gaussian-acs":
        drawn = math.floor(lines / acceleration + 0.5)
        assert (counts <= most).all()
        assert (counts >= max(drawn, acs)).all()
    else:
        assert (counts == lines // acceleration).all()
        assert most == lines // acceleration
    if family != "gaussian-wide":
        assert central.all()
    if acceleration == 1:
        assert counts.min() == lines
    start = size // 2 - lines // 2
    assert not sampled[..., :start].any()
    assert not sampled[..., start + lines :].any()
    # The same subject in an array of its own size, alone and among others.
    own = sampled[..., start : start + lines]
    assert own.equal(pattern(family, lines, acceleration, acs, key))
    u = random.uniform(key[0], of(5, key[1]), of(7, key[2]), random.PATTERN, (2, 3, size), (0, 0, size // 2))
    assert sampling.pattern(u, of(1, acceleration), of(size, lines), acs, family)[1].equal(sampled)


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_slices_visits_and_subjects_differ(family: str) -> None:
    drawn = {pattern(family, 128, 8, 4, key, (1, 1)).numpy().tobytes() for key in ((0, 0, n) for n in range(40))}
    assert len(drawn) > 8  # equispaced has few starts
    one, other = pattern(family, 128, 8, 4, (0, 0, 1), (4, 25)), pattern(family, 128, 8, 4, (0, 1, 1), (4, 25))
    assert not one.equal(other)
    assert not one[0].equal(one[1])
    assert not one[:, 0].equal(one[:, 1])
    assert one.equal(pattern(family, 128, 8, 4, (0, 0, 1), (4, 25)))


# Densities


def chi_square(counts: Tensor, law: Tensor) -> float:
    """Over its expectation under `law`, in standard deviations of that distribution (about normal for many lines)."""
    seen = law > 0
    assert not counts[~seen].any()
    expected = law[seen] / law.sum() * counts.sum()
    assert expected.min() > 5
    degrees = len(expected) - 1
    statistic = ((counts[seen] - expected).square() / expected).sum()
    return float((statistic - degrees) / math.sqrt(2 * degrees))


@pytest.mark.parametrize("family", ["gaussian", "gaussian-wide", "kt-gaussian-acs"])
def test_one_line_is_drawn_exactly_by_the_familys_law(family: str) -> None:
    """A single line, which R = lines leaves, is drawn in proportion to its weight: METHOD's formulas, written anew."""
    lines = 40
    counts = pattern(family, lines, lines, 0, shape=(200, 1000)).sum((0, 1)).double()
    ky = torch.arange(lines, dtype=torch.float64) - lines // 2
    law = {
        "gaussian": torch.exp(-ky.square() / (2 * (lines / 5) ** 2)) + 1 / (2 * lines),
        "gaussian-wide": torch.exp(-ky.square() / (2 * lines / 0.3)),
        "kt-gaussian-acs": 0.1 + 0.2 / 0.8 * torch.exp(-ky.square() / (lines / 5) ** 2),
    }[family]
    assert counts.sum() == 200_000
    assert abs(chi_square(counts, law)) < 4


def inclusion(weight: Tensor, count: int) -> Tensor:
    """Chance of each line to be among `count` drawn without replacement, by integration.

    Line i comes up at an exponential time of rate w_i, the first `count` are drawn: i is in if, when its time comes,
    fewer than `count` others have.
    """
    grid = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    chance = []
    for i, w in enumerate(weight):
        others = torch.cat([weight[:i], weight[i + 1 :]])
        come = 1 - (1 - grid[:, None]) ** (others / w)  # by the time at which a share `grid` of lines like i has come
        number = torch.zeros(len(grid), count, dtype=torch.float64)
        number[:, 0] = 1
        for p in come.T:  # Poisson-binomial: how many others have come, all of `count` or more being left out
            moved = number * p[:, None]
            number = number * (1 - p[:, None])
            number[:, 1:] += moved[:, :-1]
        chance.append(number.sum(1).mean())
    return torch.stack(chance)


@pytest.mark.parametrize("family", ["gaussian", "gaussian-wide", "kt-gaussian-acs"])
def test_several_lines_are_drawn_without_replacement_by_the_same_law(family: str) -> None:
    lines, acceleration, frames = 32, 4, 20_000
    weight = {
        "gaussian": line_density(of(acceleration), of(lines), lines),
        "gaussian-wide": wide_density(of(lines), lines),
        "kt-gaussian-acs": kt_density(of(lines), lines),
    }[family][0]
    expected = inclusion(weight, 8)
    assert expected.sum() == pytest.approx(8, rel=1e-3)
    often = pattern(family, lines, acceleration, 0, shape=(20, 1000)).double().mean((0, 1))
    deviation = (often - expected) / (expected * (1 - expected) / frames).sqrt()
    # Each square has mean 1; lines exclude each other a little, so that the sum is about chi-square of 31 degrees.
    assert deviation.square().sum() < 31 + 4 * math.sqrt(62)
    assert deviation.abs().max() < 4.5


@pytest.mark.parametrize(("acceleration", "share"), [(8, 0.29), (16, 0.15)])
def test_gaussian_wide_has_the_centre_that_the_method_says(acceleration: int, share: float) -> None:
    sampled = pattern("gaussian-wide", 128, acceleration, 4, shape=(40, 100)).double()
    assert sampled[..., 60:68].mean() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("acceleration", [2, 4, 8, 16])
def test_equispaced_lines_are_r_apart_from_a_uniform_start(acceleration: int) -> None:
    sampled = pattern("equispaced", 128, acceleration, 0, shape=(40, 100)).flatten(0, 1)
    places = sampled.nonzero()[:, 1].view(4000, -1)
    assert (places.diff(dim=1) == acceleration).all()
    starts = torch.bincount(places[:, 0], minlength=acceleration).double()
    assert len(starts) == acceleration
    assert ((starts - 4000 / acceleration).square() / (4000 / acceleration)).sum() < acceleration - 1 + 4 * math.sqrt(
        2 * acceleration
    )


def test_equispaced_lines_beside_the_acs_are_equally_often_and_evenly_sampled() -> None:
    sampled = pattern("equispaced", 100, 8, 4, shape=(40, 250)).flatten(0, 1)
    others = torch.cat([sampled[:, :48], sampled[:, 52:]], 1)
    gaps = others.nonzero()[:, 1].view(10_000, 8).diff(dim=1)  # 8 of 96: 12 apart
    assert (gaps == 12).all()
    sampled = pattern("equispaced", 128, 8, 4, shape=(40, 250)).flatten(0, 1)
    others = torch.cat([sampled[:, :62], sampled[:, 66:]], 1)
    gaps = others.nonzero()[:, 1].view(10_000, 12).diff(dim=1)  # 12 of 124: 10 1/3 apart
    assert set(gaps.unique().tolist()) == {10, 11}
    share = 12 / 124
    deviation = (others.double().mean(0) - share) / math.sqrt(share * (1 - share) / 10_000)
    assert deviation.abs().max() < 4.5


def test_challenge_lines_are_drawn_and_acs_lines_added_on_top() -> None:
    """246 lines at R = 8 with 16 ACS lines: 31 drawn, so 31 to 47 in all and a true R below the nominal one."""
    sampled = pattern("kt-gaussian-acs", 246, 8, 16, shape=(20, 100))
    plain = pattern("kt-gaussian-acs", 246, 8, 0, shape=(20, 100))
    assert (plain.sum(-1) == 31).all()
    plain[..., 115:131] = True
    assert sampled.equal(plain)
    assert 246 / 47 < float(sampling.true_acceleration(sampled)) < 246 / 37
    assert sampling.measured_acs_lines(sampled) == 16
    assert drawn_lines(20, 8, "kt-gaussian-acs") == 3  # halves up, as MATLAB rounds


# What is refused and what is measured


@pytest.mark.parametrize(
    ("lines", "acceleration", "acs", "family", "message"),
    [
        (32, 8, 4, "equispaced", "R = 8 leaves 4 of 32 lines, expected more than 4 ACS"),
        (32, 33, 0, "gaussian", "R = 33 leaves 0 of 32 lines, expected some; lower R"),
        (32, 33, 4, "gaussian-wide", "leaves 0 of 32"),
        (32, 65, 4, "kt-gaussian-acs", "leaves 0 of 32"),
        (32, 2, 4, "radial", "expected one of gaussian, gaussian-wide, equispaced, kt-gaussian-acs, got 'radial'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(
    lines: int, acceleration: int, acs: int, family: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        sampling.check(lines, acceleration, acs, family)
    assert "\n" not in str(error.value)


def test_families_without_acs_lines_in_the_budget_go_further() -> None:
    for family in ("gaussian-wide", "kt-gaussian-acs"):
        sampling.check(32, 16, 4, family)


def test_acs_lines_are_those_that_no_frame_lacks() -> None:
    sampled = torch.zeros(2, 3, 16, dtype=torch.bool)
    assert sampling.measured_acs_lines(sampled) == 0
    sampled[..., 6:9] = True
    sampled[..., 12] = True
    assert sampling.measured_acs_lines(sampled) == 3
    sampled[1, 2, 7] = False
    assert sampling.measured_acs_lines(sampled) == 1
    sampled[1, 2, 8] = False
    assert sampling.measured_acs_lines(sampled) == 0
    assert sampling.measured_acs_lines(torch.ones(1, 1, 9, dtype=torch.bool)) == 9


def test_a_given_pattern_is_repeated_over_frames_and_sits_in_the_middle() -> None:
    table = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    drawn = sampling.repeat(table, (2, 4, 7, 16))
    assert drawn.shape == (2, 4, 7, 16)
    assert drawn[1, 3, :, 2:14].equal(table[[0, 1, 2, 0, 1, 2, 0]])
    assert not drawn[..., :2].any()
    assert not drawn[..., 14:].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_draws_the_same_patterns(family: str) -> None:
    key = torch.arange(64)
    u = random.uniform(0, key, key, random.PATTERN, (3, 8, 96), (0, 0, 48))
    r, lines = 2 + key % 7, 60 + key % 36
    gpu = sampling.pattern(u.cuda(), r.cuda(), lines.cuda(), 4, family)
    assert gpu.cpu().equal(sampling.pattern(u, r, lines, 4, family))
