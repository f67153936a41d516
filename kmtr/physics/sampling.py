"""k-t undersampling of Cartesian cine along ky, and what masked pretraining hides of it.

Every pattern is a pure function of uniform numbers (`random.uniform`), so of (seed, epoch, subject, slice): the same
for any number of workers, after a restart, in any trial. In batches, on the device, without asking it anything back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kmtr.config import check_lines, drawn_lines
from kmtr.physics import random
from kmtr.physics.fourier import centred, crop_or_pad
from kmtr.physics.random import HIDDEN_LINES, HIDDEN_PATCHES, PATTERN, TARGET_LINES, VALIDATION
from kmtr.types import InputError

__all__ = [
    "FAMILIES",
    "HIDDEN_LINES",
    "HIDDEN_PATCHES",
    "PATTERN",
    "TARGET_LINES",
    "VALIDATION",
    "check",
    "draw_acceleration",
    "equispaced",
    "gaussian",
    "gaussian_wide",
    "hide",
    "kt_density",
    "kt_gaussian_acs",
    "line_density",
    "measured_acs_lines",
    "pattern",
    "repeat",
    "subject_key",
    "true_acceleration",
    "wide_density",
]


def subject_key(subject_id: str) -> int:
    """Stable 64-bit key of a pseudonym; never a row number, which changes with the shards."""
    return int.from_bytes(hashlib.blake2b(subject_id.encode(), digest_size=8).digest(), "little")


def check(lines: int, acceleration: int, acs_lines: int, family: str = "gaussian") -> None:
    """Check that `pattern` can draw one of `lines` at this R: called for every matrix size before training.

    Raises:
        InputError: nothing but ACS lines would be sampled, or nothing at all.
    """
    if family not in FAMILIES:
        raise InputError(f"sampling.family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    check_lines(lines, acceleration, acs_lines, family)


def draw_acceleration(
    accelerations: Sequence[int], seed: int, epoch: Int[Tensor, " batch"], key: Int[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """The nominal R of each subject in this epoch, uniform over the configured set."""
    u = random.uniform(seed, epoch, key, random.ACCELERATION, ())
    place = (u.double() * len(accelerations)).long()  # in fp32 the largest u would round up to the end
    drawn = torch.zeros_like(key)
    for i, acceleration in enumerate(accelerations):  # a table would have to be copied to the device
        drawn.masked_fill_(place == i, acceleration)
    return drawn


def pattern(
    u: Float[Tensor, "batch slice t ky"],
    acceleration: Int[Tensor, " batch"],
    lines: Int[Tensor, " batch"],
    acs_lines: int = 4,
    family: str = "gaussian",
) -> Bool[Tensor, "batch slice t ky"]:
    """The pattern of every frame in one of FAMILIES, drawn anew for each.

    Args:
        u: uniform numbers in (0, 1). Drawn with ky counted from the centre (`random.uniform`, ``origin``), a subject
            has the same pattern in an array of any size.
        acceleration: nominal R of each subject; 1 samples all of its lines.
        lines: each subject's own, in the middle of the ky axis; none beyond them is sampled. `check` says whether they
            are enough, since nothing is raised here.
        acs_lines: central lines sampled in every frame; ``gaussian-wide`` has none.

    Returns:
        True = sampled.
    """
    return FAMILIES[family](u, acceleration, lines, acs_lines)


def gaussian(
    u: Float[Tensor, "batch slice t ky"],
    acceleration: Int[Tensor, " batch"],
    lines: Int[Tensor, " batch"],
    acs_lines: int = 4,
) -> Bool[Tensor, "batch slice t ky"]:
    """Family (a): the ACS lines, and others drawn without replacement by `line_density`; arguments as of `pattern`.

    Exactly ``floor(lines / R)`` lines in every frame, the ACS lines among them.
    """
    return _weighted(
        u, line_density(acceleration, lines, u.shape[-1]), drawn_lines(lines, acceleration, "gaussian"), acs_lines
    )


def gaussian_wide(
    u: Float[Tensor, "batch slice t ky"],
    acceleration: Int[Tensor, " batch"],
    lines: Int[Tensor, " batch"],
    acs_lines: int = 0,
) -> Bool[Tensor, "batch slice t ky"]:
    """Family (b): exactly ``floor(lines / R)`` lines drawn without replacement, Gaussian of variance lines / 0.3.

    No ACS lines, whatever is asked for. It is the narrower one where there are many lines (SD 21 of 128, where family
    (a) has 26 and a floor), the wider one below 84.
    """
    return _weighted(u, wide_density(lines, u.shape[-1]), drawn_lines(lines, acceleration, "gaussian-wide"), 0)


def equispaced(
    u: Float[Tensor, "batch slice t ky"],
    acceleration: Int[Tensor, " batch"],
    lines: Int[Tensor, " batch"],
    acs_lines: int = 4,
) -> Bool[Tensor, "batch slice t ky"]:
    """Family (c): the ACS lines, and of the others every s-th from a start that is drawn for each frame.

    Exactly ``floor(lines / R)`` lines in every frame, the ACS lines among them. So s, a real number, is what lines the
    ACS leave over lines that the budget leaves, as in fastMRI's equispaced masks (Zbontar 2018); without ACS lines and
    where R divides them it is R.
    """
    size = u.shape[-1]
    start = u[..., size // 2].double()[..., None]
    others, left = lines - acs_lines, drawn_lines(lines, acceleration, "equispaced") - acs_lines
    place = torch.arange(size + 1, device=u.device)
    acs = size // 2 - acs_lines // 2
    before = place - (size // 2 - lines // 2)[:, None] - (place - acs).clamp(0, acs_lines)
    before = before.clamp(min=0).minimum(others[:, None])  # lines before this place that are no ACS lines
    # The j-th line is floor((j + start) s): so many lie before each place.
    passed = ((before * left[:, None]).double() / others.clamp(min=1)[:, None])[:, None, None] - start
    sampled = passed.ceil_().diff(dim=-1) > 0
    sampled[..., acs : acs + acs_lines] = True
    return sampled


def kt_gaussian_acs(
    u: Float[Tensor, "batch slice t ky"],
    acceleration: Int[Tensor, " batch"],
    lines: Int[Tensor, " batch"],
    acs_lines: int = 4,
) -> Bool[Tensor, "batch slice t ky"]:
    """Family (d), as of the CMRxRecon challenges: ACS lines on top of ``round(lines / R)`` drawn by `kt_density`.

    Drawn lines may be ACS lines, so that the number differs between frames, and the true R is below the nominal one.
    The challenge draws with replacement and moves repeats to the next free line; here none is drawn twice.
    """
    sampled = _weighted(u, kt_density(lines, u.shape[-1]), drawn_lines(lines, acceleration, "kt-gaussian-acs"), 0)
    first = u.shape[-1] // 2 - acs_lines // 2
    sampled[..., first : first + acs_lines] = True
    return sampled


FAMILIES: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "gaussian": gaussian,
    "gaussian-wide": gaussian_wide,
    "equispaced": equispaced,
    "kt-gaussian-acs": kt_gaussian_acs,
}
"""Families that are drawn; patterns of the family ``file`` are `repeat` of those that a file holds."""


def line_density(
    acceleration: Int[Tensor, " batch"], lines: Int[Tensor, " batch"], size: int
) -> Float[Tensor, "batch ky"]:
    """Weights of the ``gaussian`` family over ky: SD = lines / 5 and a floor of 1 / (2 R).

    Args:
        lines: each subject's own, in the middle of `size`.

    Returns:
        fp64, largest at the centre ``size // 2``, zero outside the subject's lines.
    """
    offset, own = _own(lines, size)
    weight = torch.exp(-0.5 * (offset / (lines.double() / 5)[:, None]).square())
    return (weight + 1 / (2 * acceleration.double())[:, None]).where(own, 0.0)


def wide_density(lines: Int[Tensor, " batch"], size: int) -> Float[Tensor, "batch ky"]:
    """Weights of ``gaussian-wide``: variance lines / 0.3, no floor; as `line_density`."""
    offset, own = _own(lines, size)
    return torch.exp(-0.5 * offset.square() / (lines.double() / 0.3)[:, None]).where(own, 0.0)


def kt_density(lines: Int[Tensor, " batch"], size: int) -> Float[Tensor, "batch ky"]:
    """Weights of ``kt-gaussian-acs``: 0.1 + a / (1 - a) exp(-(5 ky / lines)^2) with a = 0.2; as `line_density`.

    As in CMRxRecon 2024's second task (Wang 2024, arXiv:2402.15939, and the challenge's generator of patterns).
    """
    offset, own = _own(lines, size)
    return (0.1 + 0.25 * torch.exp(-(offset * 5 / lines.double()[:, None]).square())).where(own, 0.0)


def repeat(table: Bool[Tensor, "frame line"], shape: Sequence[int]) -> Bool[Tensor, "batch slice t ky"]:
    """Family (e): a given pattern for all subjects and slices of `shape`, its lines in the middle of ky.

    Its frames come again from the first one where `shape` has more.
    """
    _, _, frames, size = shape
    cycle = torch.arange(frames, device=table.device) % len(table)
    return crop_or_pad(table[cycle], (size,), (-1,)).expand(shape)


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
    sampled: Bool[Tensor, "*rest ky"], existing: Bool[Tensor, "*rest ky"] | None = None
) -> Float[Tensor, ""]:
    """Lines that exist over those acquired: what was really kept, ACS lines and rounding included, padding not.

    Args:
        existing: lines that a fully sampled scan would have; None: all.
    """
    return (torch.ones_like(sampled) if existing is None else existing).sum().double() / sampled.sum()


def measured_acs_lines(sampled: Bool[Tensor, "*rest ky"]) -> int:
    """Lines around the centre ``n // 2``, without a gap, that every frame samples; 0 where not even the centre is."""
    always = sampled.flatten(0, -2).all(0)
    centre = len(always) // 2
    after, before = (int(part.long().cumprod(0).sum()) for part in (always[centre:], always[:centre].flip(0)))
    return after + before if after else 0


def _own(lines: Int[Tensor, " batch"], size: int) -> tuple[Int[Tensor, " ky"], Bool[Tensor, "batch ky"]]:
    """Offset of each line from the centre, and which belong to each subject."""
    return torch.arange(size, device=lines.device) - size // 2, centred(lines, size)


def _weighted(
    u: Float[Tensor, "batch slice t ky"],
    weight: Float[Tensor, "batch ky"],
    count: Int[Tensor, " batch"],
    acs_lines: int,
) -> Bool[Tensor, "batch slice t ky"]:
    """The ACS lines, then others up to `count` in all, drawn without replacement in proportion to their weight.

    Taking the largest of log(u) / w does that (Efraimidis and Spirakis 2006).
    """
    # fp64, so that the last bit of a device's logarithm practically never decides.
    order = u.double().log_().div_(weight[:, None, None, :])  # minus infinity where the weight is zero
    first = u.shape[-1] // 2 - acs_lines // 2
    order[..., first : first + acs_lines] = torch.inf
    return _first(order.neg_(), count[:, None, None])


def _first(order: Float[Tensor, "*rest n"], count: Tensor) -> Bool[Tensor, "*rest n"]:
    """True at the `count` (``*rest``) smallest along the last axis: exactly as many, equal ones by their index."""
    index = order.sort(dim=-1, stable=True).indices
    chosen = torch.arange(order.shape[-1], device=order.device) < count[..., None]
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, index, chosen.expand(index.shape))
