"""k-t undersampling of Cartesian cine along ky, and what masked pretraining hides of it.

Every draw is a pure function of (seed, epoch, subject, slice): the same for any number of workers, after a restart, in
any trial. Patterns are drawn on the CPU by a counter-based generator and travel to the device as bool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from kmtr.types import InputError

# What a draw is for: each purpose has a stream of its own, so that adding one changes no other.
ACCELERATION, PATTERN, HIDDEN_LINES, HIDDEN_PATCHES, VALIDATION = range(5)


def subject_key(subject_id: str) -> int:
    """Stable 64-bit key of a pseudonym; never a row number, which changes with the shards."""
    return int.from_bytes(hashlib.blake2b(subject_id.encode(), digest_size=8).digest(), "little")


def generator(seed: int, epoch: int, key: int, purpose: int) -> np.random.Generator:
    """Counter-based stream of one subject in one epoch. Slices are its leading axis, so each slice has
    its own numbers.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, key, purpose])))


def line_density(lines: int, acceleration: int) -> np.ndarray:
    """Weights of the ``gaussian`` family over ky: SD = lines / 5 and a floor of 1 / (2 R) (METHOD: family a).

    Returns:
        float64 ``ky``, largest at the centre ``lines // 2``.
    """
    offset = np.arange(lines) - lines // 2
    return np.exp(-0.5 * (offset / (lines / 5)) ** 2) + 1 / (2 * acceleration)


def gaussian(
    rng: np.random.Generator, slices: int, frames: int, lines: int, acceleration: int, acs_lines: int = 4
) -> np.ndarray:
    """Pattern of family ``gaussian``: the ACS lines, and others drawn without replacement by `line_density`.

    Exactly ``floor(lines / acceleration)`` lines in every frame, the ACS lines among them. Drawing the n largest of
    log(u) / w is weighted sampling without replacement (Efraimidis and Spirakis 2006).

    Returns:
        bool ``slice t ky``, True = sampled.

    Raises:
        InputError: fewer lines than the ACS lines would be sampled.
    """
    if acceleration == 1:
        return np.ones((slices, frames, lines), bool)
    count = lines // acceleration
    if count <= acs_lines:
        raise InputError(
            f"sampling: R = {acceleration} leaves {count} of {lines} lines, expected more than {acs_lines} ACS"
        )
    order = np.log(rng.random((slices, frames, lines))) / line_density(lines, acceleration)
    first = lines // 2 - acs_lines // 2
    order[..., first : first + acs_lines] = np.inf
    chosen = np.argpartition(order, lines - count, axis=-1)[..., lines - count :]
    sampled = np.zeros(order.shape, bool)
    np.put_along_axis(sampled, chosen, True, axis=-1)
    return sampled


def draw_acceleration(accelerations: Sequence[int], seed: int, epoch: int, key: int) -> int:
    """The nominal R of one subject in one epoch, uniform over the configured set."""
    return int(generator(seed, epoch, key, ACCELERATION).choice(np.asarray(accelerations)))


def hide(rng: np.random.Generator, candidates: np.ndarray, ratio: float) -> np.ndarray:
    """Withhold a share of the candidates of every slice, uniformly.

    Args:
        candidates: bool ``slice ...``; what may be hidden (acquired lines, image patches).
        ratio: share hidden; rounded to a whole number per slice, and at least one candidate stays visible.

    Returns:
        bool of the same shape, True = hidden; a subset of `candidates`.
    """
    flat = candidates.reshape(len(candidates), -1)
    available = flat.sum(axis=1, keepdims=True)
    count = np.clip(np.rint(available * ratio), 0, np.maximum(available - 1, 0))
    order = np.where(flat, rng.random(flat.shape), np.inf)
    rank = order.argsort(axis=1).argsort(axis=1)
    return (rank < count).reshape(candidates.shape)


def true_acceleration(sampled: np.ndarray) -> float:
    """All samples over acquired samples: what was really kept, ACS lines and rounding included."""
    return sampled.size / int(sampled.sum())
