"""k-t undersampling of Cartesian cine along ky, and what masked pretraining hides of it.

Every pattern is a pure function of uniform numbers (`random.uniform`), so of (seed, visit, subject, slice): the same
for any number of workers, after a restart, in any trial. In batches, on the device, without asking it anything back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kmtr.physics import random
from kmtr.physics.random import HIDDEN_LINES, HIDDEN_PATCHES, PATTERN, VALIDATION
from kmtr.types import InputError

__all__ = [
    "HIDDEN_LINES",
    "HIDDEN_PATCHES",
    "PATTERN",
    "VALIDATION",
    "check",
    "draw_acceleration",
    "gaussian",
    "hide",
    "line_density",
    "subject_key",
    "true_acceleration",
]


def subject_key(subject_id: str) -> int:
    """Stable 64-bit key of a pseudonym; never a row number, which changes with the shards."""
    return int.from_bytes(hashlib.blake2b(subject_id.encode(), digest_size=8).digest(), "little")


def check(lines: int, acceleration: int, acs_lines: int) -> None:
    """Whether `gaussian` can draw a pattern of `lines` at this R: to be asked for every matrix size before training.

    Raises:
        InputError: nothing but ACS lines would be sampled.
    """
    count = lines // acceleration
    if acceleration > 1 and count <= acs_lines:
        raise InputError(
            f"sampling: R = {acceleration} leaves {count} of {lines} lines, expected more than {acs_lines} ACS; "
            "lower R or sampling.acs_lines"
        )


def draw_acceleration(
    accelerations: Sequence[int], seed: int, visit: Int[Tensor, " batch"], key: Int[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """The nominal R of each subject in this visit, uniform over the configured set."""
    u = random.uniform(seed, visit, key, random.ACCELERATION, ())
    place = (u.double() * len(accelerations)).long()  # in fp32 the largest u would round up to the end
    drawn = torch.zeros_like(key)
    for i, acceleration in enumerate(accelerations):  # a table would have to be copied to the device
        drawn.masked_fill_(place == i, acceleration)
    return drawn


def line_density(
    acceleration: Int[Tensor, " batch"], lines: Int[Tensor, " batch"], size: int
) -> Float[Tensor, "batch ky"]:
    """Weights of the ``gaussian`` family over ky: SD = lines / 5 and a floor of 1 / (2 R) (METHOD: family a).

    Args:
        lines: each subject's own, in the middle of `size`.

    Returns:
        fp64, largest at the centre ``size // 2``, zero outside the subject's lines.
    """
    offset = torch.arange(size, device=lines.device) - size // 2
    own = (offset >= -(lines // 2)[:, None]) & (offset < (lines - lines // 2)[:, None])
    weight = torch.exp(-0.5 * (offset / (lines.double() / 5)[:, None]).square())
    return (weight + 1 / (2 * acceleration.double())[:, None]).where(own, 0.0)


def gaussian(
    u: Float[Tensor, "batch slice t ky"],
    acceleration: Int[Tensor, " batch"],
    lines: Int[Tensor, " batch"],
    acs_lines: int = 4,
) -> Bool[Tensor, "batch slice t ky"]:
    """Pattern of family ``gaussian``: the ACS lines, and others drawn without replacement by `line_density`.

    Exactly ``floor(lines / R)`` lines in every frame, the ACS lines among them; R = 1 samples all of a subject's
    lines. Taking the largest of log(u) / w is weighted sampling without replacement (Efraimidis and Spirakis 2006).

    Args:
        u: uniform numbers in (0, 1). Drawn with ky counted from the centre (`random.uniform`, ``origin``), a subject
            has the same pattern in an array of any size.
        acceleration: nominal R of each subject.
        lines: each subject's own, in the middle of the ky axis; none beyond them is sampled. `check` says whether they
            are enough, since nothing is raised here.

    Returns:
        True = sampled.
    """
    size = u.shape[-1]
    density = line_density(acceleration, lines, size)
    # fp64, so that the last bit of a device's logarithm practically never decides.
    order = u.double().log_().div_(density[:, None, None, :])  # minus infinity where the weight is zero
    first = size // 2 - acs_lines // 2
    order[..., first : first + acs_lines] = torch.inf
    return _first(order.neg_(), (lines // acceleration)[:, None, None])


def hide(
    u: Float[Tensor, "batch slice *rest"], candidates: Bool[Tensor, "batch slice *rest"], ratio: float
) -> Bool[Tensor, "batch slice *rest"]:
    """Withhold a share of the candidates of every slice, uniformly.

    Args:
        u: uniform numbers in (0, 1).
        candidates: what may be hidden (acquired lines, image patches, coils).
        ratio: share hidden; rounded to a whole number per slice, and at least one candidate stays visible.

    Returns:
        True = hidden; a subset of `candidates`.
    """
    flat = candidates.flatten(2)
    available = flat.sum(-1)
    count = (available.double() * ratio).round().minimum((available - 1).clamp(min=0))
    order = u.flatten(2).masked_fill(~flat, torch.inf)
    return _first(order, count).unflatten(-1, candidates.shape[2:])


def true_acceleration(
    sampled: Bool[Tensor, "batch slice t ky"], existing: Bool[Tensor, "batch slice t ky"]
) -> Float[Tensor, ""]:
    """Lines that exist over those acquired: what was really kept, ACS lines and rounding included, padding not."""
    return existing.sum() / sampled.sum()


def _first(order: Float[Tensor, "*rest n"], count: Tensor) -> Bool[Tensor, "*rest n"]:
    """True at the `count` (``*rest``) smallest along the last axis: exactly as many, equal ones by their index."""
    index = order.sort(dim=-1, stable=True).indices
    chosen = torch.arange(order.shape[-1], device=order.device) < count[..., None]
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, index, chosen.expand(index.shape))
