"""Random numbers as pure functions of what they are for: no state, the same on every device and in every batch.

A draw depends on (seed, epoch, subject key, purpose, index) alone. SplitMix64 (Steele, Lea and Flood 2014; finaliser:
Stafford's variant 13) is applied once to each of these in turn: every number seeds the stream from which the next one
picks its place, so that a value never depends on how large an array is, only on its own index in it. All in integers
that wrap around, hence bitwise alike on CPU and GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

# What a draw is for: each purpose has a stream of its own, so that adding one (at the end) changes no other.
ACCELERATION, PATTERN, HIDDEN_LINES, HIDDEN_PATCHES, VALIDATION = range(5)
SHIFT, ROTATION, FLIP, PHASE, COIL_DROPOUT, NOISE_LEVEL, NOISE = range(5, 12)
DEPTH, TARGET_LINES, FRAMES = 12, 13, 14

_STEP = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: the step of SplitMix64's counter."""
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


def uniform(
    seed: int,
    epoch: Int[Tensor, " batch"],
    key: Int[Tensor, " batch"],
    purpose: int,
    shape: Sequence[int],
    origin: Sequence[int] = (),
) -> Float[Tensor, " batch *shape"]:
    """Uniform numbers strictly inside (0, 1): odd multiples of 2^-24, mean 1/2, bitwise alike on every device.

    Args:
        seed: of the run, any integer (modulo 2^64).
        epoch: number of the epoch over the subject.
        key: of each subject (`sampling.subject_key`), as signed 64 bit.
        purpose: the stream, one of the constants of this module.
        shape: of one subject's draw. Element i depends on i and not on `shape`: a larger array only adds numbers.
        origin: index counted from, per axis of `shape`; all zero by default. Where a subject sits in the middle of an
            axis, as along ky, its numbers stay with it in a larger array if the axis counts from its centre n // 2.
    """
    return _unit(_hash(seed, epoch, key, purpose, shape, origin), 40)


def normal(
    seed: int,
    epoch: Int[Tensor, " batch"],
    key: Int[Tensor, " batch"],
    purpose: int,
    shape: Sequence[int],
    origin: Sequence[int] = (),
) -> Float[Tensor, " batch *shape"]:
    """Standard normal numbers, the real parts of `complex_normal` at unit variance."""
    radius, angle = _polar(_hash(seed, epoch, key, purpose, shape, origin))
    return angle.cos_().mul_(radius).mul_(math.sqrt(2))


def complex_normal(
    seed: int,
    epoch: Int[Tensor, " batch"],
    key: Int[Tensor, " batch"],
    purpose: int,
    shape: Sequence[int],
    origin: Sequence[int] = (),
) -> Complex[Tensor, " batch *shape"]:
    """Circular complex normal numbers, E|n|^2 = 1, by Box and Muller (1958); arguments as of `uniform`.

    Magnitudes end at 4.1 (2^-24 is the least uniform number); logarithm and cosine may differ between devices in the
    last bit.
    """
    return torch.polar(*_polar(_hash(seed, epoch, key, purpose, shape, origin)))


def _polar(bits: Int[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Magnitude (mean square 1) and angle of a complex normal number, from one 64-bit number."""
    angle = _unit(bits, 16).mul_(2 * math.pi)
    return _unit(bits, 40).log_().neg_().sqrt_(), angle


def _unit(bits: Int[Tensor, "*shape"], shift: int) -> Float[Tensor, "*shape"]:
    """24 bits from `shift` on as an odd multiple of 2^-24: exact in fp32, never 0 or 1."""
    return (bits >> shift).bitwise_and_(0xFFFFFF).bitwise_or_(1).to(torch.float32).mul_(2.0**-24)


def _hash(
    seed: int, epoch: Tensor, key: Tensor, purpose: int, shape: Sequence[int], origin: Sequence[int]
) -> Int[Tensor, " batch *shape"]:
    """64 random bits per element. Only the last axis is hashed at full size."""
    stream = torch.full_like(key, _signed(seed))
    for place in (torch.full_like(key, purpose), key, epoch):
        stream = _mix_(stream + (place + 1) * _signed(_STEP))
    for size, start in zip(shape, origin or (0,) * len(shape), strict=True):
        place = torch.arange(-start, size - start, device=key.device)
        stream = _mix_(stream[..., None] + (place + 1) * _signed(_STEP))
    return stream


def _mix_(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """SplitMix64's finaliser, in place: a bijection of 64-bit numbers in which every bit changes every other."""
    scratch = torch.empty_like(x)
    for shift, factor in _ROUNDS:
        _fold_(x, shift, scratch).mul_(_signed(factor))
    return _fold_(x, _LAST_SHIFT, scratch)


def _fold_(x: Tensor, shift: int, scratch: Tensor) -> Tensor:
    """``x ^= x >> shift``; torch's shift copies the sign in, so that the bits from above are masked."""
    torch.bitwise_right_shift(x, shift, out=scratch)
    return x.bitwise_xor_(scratch.bitwise_and_((1 << (64 - shift)) - 1))


def _signed(x: int) -> int:
    """The signed 64-bit number of the same bits."""
    return ((x + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)
