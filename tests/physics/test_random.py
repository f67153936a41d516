"""Draws are uniform, independent of one another, and functions of their key and index alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmtr.physics.random import NOISE, PATTERN, SHIFT, _hash, complex_normal, normal, uniform

I64 = st.integers(-(2**63), 2**63 - 1)
MASK = 2**64 - 1


def of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def many(count: int) -> Tensor:
    """Keys as they come: consecutive numbers are the hardest case."""
    return torch.arange(count)


def splitmix(state: int, place: int) -> int:
    """Output number `place` (from 0) of the published generator, in Python's integers."""
    z = (state + (place + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_stream_gives_the_published_numbers() -> None:
    # The first outputs of SplitMix64 seeded with 1234567, as in the test vectors of its public implementations.
    assert [splitmix(1234567, i) for i in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(st.integers(-(2**70), 2**70), I64, I64, st.integers(-5, 300), st.integers(-300, 300))
def test_the_tensor_arithmetic_is_that_of_integers(seed: int, epoch: int, key: int, i: int, j: int) -> None:
    bits = _hash(seed, of(epoch), of(key), NOISE, (1, 1), (-i, -j))
    state = seed & MASK
    for place in (NOISE, key, epoch, i, j):
        state = splitmix(state, place)
    assert bits.item() & MASK == state
    u = uniform(seed, of(epoch), of(key), NOISE, (1, 1), (-i, -j)).item()
    assert u == ((state >> 40) | 1) / 2**24
    assert 0 < u < 1


def test_a_draw_depends_on_neither_the_company_nor_the_extents_of_the_array() -> None:
    epoch, key = of(3, 0, 3, 7), of(5, -1, 2**62, 5)
    whole = uniform(1, epoch, key, PATTERN, (3, 4, 32), (0, 0, 16))
    order = torch.tensor([2, 0, 3])
    assert whole[order].equal(uniform(1, epoch[order], key[order], PATTERN, (3, 4, 32), (0, 0, 16)))
    assert whole[:, :2, :3].equal(uniform(1, epoch, key, PATTERN, (2, 3, 32), (0, 0, 16)))
    assert whole[:, :, :, 4:-4].equal(uniform(1, epoch, key, PATTERN, (3, 4, 24), (0, 0, 12)))
    assert uniform(1, epoch, key, PATTERN, ()).shape == (4,)


def test_every_part_of_the_key_draws_anew() -> None:
    def draw(seed: int = 0, epoch: int = 0, key: int = 9, purpose: int = PATTERN) -> Tensor:
        return uniform(seed, of(epoch), of(key), purpose, (64,)).flatten()

    drawn = [draw(), draw(seed=1), draw(epoch=1), draw(key=8), draw(purpose=SHIFT), draw(seed=1, key=8)]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert (a == b).sum() == 0


# 1e6 draws, arranged along a different axis each time: indices, keys, epochs, seeds.
ARRANGED = {
    "index": lambda: uniform(0, of(0), of(1), PATTERN, (1_000_000,)),
    "table": lambda: uniform(0, of(0), of(1), PATTERN, (1000, 1000)),
    "key": lambda: uniform(0, torch.zeros_like(many(10**6)), many(10**6), PATTERN, ()),
    "epoch": lambda: uniform(0, many(10**6), torch.zeros_like(many(10**6)), PATTERN, ()),
    "seed": lambda: torch.cat([uniform(seed, many(1000), many(1000), PATTERN, ()) for seed in range(1000)]),
}


@pytest.mark.parametrize("along", ARRANGED)
def test_a_million_draws_are_uniform_and_uncorrelated(along: str) -> None:
    u = ARRANGED[along]().flatten().double().numpy()
    assert len(u) == 10**6
    # Kolmogorov and Smirnov: the 0.1 % point of sqrt(n) D is 1.95.
    ordered = np.sort(u)
    grid = np.arange(len(u) + 1) / len(u)
    assert math.sqrt(len(u)) * max((grid[1:] - ordered).max(), (ordered - grid[:-1]).max()) < 1.95
    # Chi square of 4096 bins, and of pairs of neighbours in 64 x 64: mean 4095, SD 90.5; four SD.
    pairs = (u[::2] * 64).astype(int) * 64 + (u[1::2] * 64).astype(int)
    for cells in ((u * 4096).astype(int), pairs):
        seen = np.bincount(cells, minlength=4096)
        expected = len(cells) / 4096
        assert abs(((seen - expected) ** 2 / expected).sum() - 4095) < 4 * math.sqrt(2 * 4095)
    # The correlation of n independent pairs has an SD of 1 / sqrt(n).
    for lag in (1, 2, 3, 64, 1000):
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 4.5e-3
    assert u.min() > 0
    assert u.max() < 1


def test_neighbouring_subjects_and_axes_are_uncorrelated() -> None:
    u = uniform(0, of(*[0] * 64), many(64), PATTERN, (4, 4, 512)).double()
    for axis in range(4):
        a, b = u.narrow(axis, 0, u.shape[axis] - 1), u.narrow(axis, 1, u.shape[axis] - 1)
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.01


def test_every_bit_of_the_key_changes_half_of_the_bits() -> None:
    key, zero = of(0x1234_5678_9ABC_DEF), of(0)
    shape = (256,)
    for bit in range(0, 64, 7):
        other = key ^ (1 << bit if bit < 63 else -(2**63))
        changed = _hash(0, zero, key, PATTERN, shape, ()) ^ _hash(0, zero, other, PATTERN, shape, ())
        share = sum((x & MASK).bit_count() for x in changed.flatten().tolist()) / (64 * 256)
        assert share == pytest.approx(0.5, abs=0.02)  # five standard deviations


def test_normal_numbers_have_their_moments() -> None:
    x = normal(0, of(0), of(0), NOISE, (1000, 1000)).double()
    assert x.mean() == pytest.approx(0, abs=4e-3)
    assert x.std() == pytest.approx(1, abs=3e-3)
    assert (x**4).mean() == pytest.approx(3, abs=0.05)
    assert (x.abs() > 2).double().mean() == pytest.approx(0.0455, abs=1e-3)
    z = complex_normal(0, of(0), of(0), NOISE, (1000, 1000))
    assert z.dtype == torch.complex64
    assert z.abs().square().mean() == pytest.approx(1, abs=5e-3)
    assert z.square().mean().abs() < 5e-3  # circular: parts of the same size, uncorrelated
    assert torch.corrcoef(torch.stack([z.abs().flatten()[1:], z.abs().flatten()[:-1]]))[0, 1].abs() < 5e-3
    # One number of SplitMix64 serves both halves: magnitude and angle must not know of each other.
    assert torch.corrcoef(torch.stack([z.abs().flatten(), z.angle().flatten()]))[0, 1].abs() < 5e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_bitwise_the_same() -> None:
    epoch, key = many(32), many(32) * 0x9E3779B97F4A7
    cpu = uniform(5, epoch, key, PATTERN, (3, 4, 64), (0, 0, 32))
    assert uniform(5, epoch.cuda(), key.cuda(), PATTERN, (3, 4, 64), (0, 0, 32)).cpu().equal(cpu)
