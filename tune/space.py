"""The trials of a search, drawn before the first one starts, as a pure function of (seed, trial number)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kmtr.config import RunConfig, override
from kmtr.types import InputError

DIGITS = 4
"""Significant digits of a drawn value: what is printed, logged and hashed is exactly what was trained."""


_PLASTIC = 1.324717957244746
STEPS = np.array([1 / _PLASTIC, 1 / _PLASTIC**2])
"""Steps of the additive recurrence R2 in two dimensions (Roberts 2018, "The unreasonable effectiveness of quasirandom
sequences"; x^3 = x + 1): any number of successive points covers the square evenly, unlike a few independent draws."""


def trials(config: RunConfig) -> list[dict[str, Any]]:
    """The keys that each trial changes, by their dotted names.

    Trial k depends on (seed, k) alone, so that a longer search begins with the trials of a shorter one.
    ``align.temperature`` is log-uniform (left out where no step aligns), ``masked.mask_ratio`` uniform: both by a
    low-discrepancy sequence from a random start. ``sampling.accelerations`` is one nominal R; every choice comes once
    before any comes again.

    Raises:
        InputError: a range that is empty or leaves the domain of its key, or a combination that can't run.
    """
    search = config.search
    _check("temperature", search.temperature, math.inf)
    _check("mask_ratio", search.mask_ratio, 1.0)
    if not search.accelerations:
        raise InputError("search.accelerations: expected one or more nominal R, got none")
    drawn = [_draw(config, number) for number in range(search.trials)]
    for values in drawn:
        override(config, values)
    return drawn


def _draw(config: RunConfig, number: int) -> dict[str, Any]:
    search = config.search
    u, v = (_generator(config.seed).random(2) + number * STEPS) % 1
    low, high = search.temperature
    temperature = low * (high / low) ** u
    first, last = search.mask_ratio
    ratio = first + (last - first) * v
    block, place = divmod(number, len(search.accelerations))
    order = _generator(config.seed, block + 1).permutation(len(search.accelerations))
    values: dict[str, Any] = {
        "align.temperature": _rounded(temperature, search.temperature),
        "masked.mask_ratio": _rounded(ratio, search.mask_ratio),
        "sampling.accelerations": (search.accelerations[order[place]],),
    }
    if not config.align_steps:
        del values["align.temperature"]
    return values


def _generator(*numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))


def _rounded(value: float, limits: tuple[float, float]) -> float:
    return min(max(float(f"{value:.{DIGITS}g}"), limits[0]), limits[1])


def _check(name: str, limits: tuple[float, float], end: float) -> None:
    low, high = limits
    if not 0 < low <= high < end:
        raise InputError(
            f"search.{name}: expected 0 < low <= high{'' if math.isinf(end) else f' < {end:g}'}, got {low:g},{high:g}"
        )
