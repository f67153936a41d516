"""The space of a search: a domain for every searched key, checked against the configuration before anything starts."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kmtr.config import RunConfig, flatten, override, typed
from kmtr.config.core import keys
from kmtr.config.whole import is_identity
from kmtr.types import InputError

DIGITS = 4
"""Significant digits of a drawn value: what is printed, logged and hashed is exactly what was trained."""
LISTED = 4096
"""Points of a space up to which all are checked before anything starts."""
BLOCK = 8
"""Successive trials that cover the range of every key evenly, each in an eighth of its own."""
DEFAULT = {
    "align.temperature": "loguniform(0.03,0.3)",
    "masked.mask_ratio": "uniform(0.3,0.9)",
    "sampling.accelerations": "choice(4,8,12)",
}
"""Space of a search over pretraining that is given none."""
_BUDGET, _SCORE = "all trials have the same budget", "it decides what the score is"
NOT_SEARCHED = {
    "seed": "search.confirm repeats trials with other seeds",
    "stage": _SCORE,
    **dict.fromkeys(("masked.steps", "align.steps", "task.steps", "task.labels"), _BUDGET),
    **dict.fromkeys(("task.tasks", "task.targets", "task.diseases"), _SCORE),
}
"""Keys that change what trials learn, and are not searched: why."""
FORM = "uniform(LOW,HIGH), loguniform(LOW,HIGH), choice(A,B,...) or grid(A,B,...)"


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both among them.

    Attributes:
        log: their logarithm is drawn evenly.
        whole: integers alone.
    """

    low: float
    high: float
    log: bool
    whole: bool

    def at(self, u: float) -> float:
        """The value below which a share `u` in [0, 1) of the domain lies, in `DIGITS` digits."""
        low, high = (self.low - 0.5, self.high + 0.5) if self.whole else (self.low, self.high)
        value = low * (high / low) ** u if self.log else low + (high - low) * u
        return self.rounded(value)

    def rounded(self, value: float) -> float:
        """A number as it is trained: an integer, or one of `DIGITS` digits, of more where the range is narrow; inside
        the range.
        """
        if self.whole:
            return int(min(max(round(value), self.low), self.high))
        width, size = self.high - self.low, max(abs(self.low), abs(self.high))
        digits = DIGITS + (max(0, math.ceil(math.log10(size / width))) if width else 0)
        return min(max(float(f"{value:.{digits}g}"), self.low), self.high)

    def every(self) -> tuple[float, ...]:
        """All integers, or the one value, that there are."""
        return tuple(range(int(self.low), int(self.high) + 1)) if self.whole else (self.low,)

    def __len__(self) -> int:
        """Values that there are; of a continuum 2."""
        return int(self.high - self.low) + 1 if self.whole else 1 + (self.low < self.high)


@dataclass(frozen=True)
class Choice:
    """Some values.

    Attributes:
        grid: every one of them is tried with every combination of the other grids.
    """

    values: tuple[Any, ...]
    grid: bool

    def __len__(self) -> int:
        return len(self.values)


Domain = Range | Choice


@dataclass(frozen=True)
class Space:
    """Domains by dotted key, of one configuration.

    Attributes:
        config: that trials change.
    """

    config: RunConfig
    domains: Mapping[str, Domain]

    @cached_property
    def grid(self) -> tuple[dict[str, Any], ...]:
        """All combinations of the grids; one that is empty where there is none."""
        grids = {
            key: domain.values for key, domain in self.domains.items() if isinstance(domain, Choice) and domain.grid
        }
        return tuple(dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values()))

    @property
    def free(self) -> dict[str, Domain]:
        """Domains that are drawn from: all but the grids."""
        return {key: domain for key, domain in self.domains.items() if not (isinstance(domain, Choice) and domain.grid)}

    def size(self, trials: int) -> int:
        """Number of trials where so many are asked for: a space of grids alone is tried whole, and no point twice."""
        return int(min(trials, self.points)) if self.free else len(self.grid)

    @property
    def points(self) -> float:
        """Number of different points; infinite where a key is a continuum."""
        if any(isinstance(one, Range) and not one.whole and one.low < one.high for one in self.domains.values()):
            return math.inf
        return math.prod(len(domain) for domain in self.domains.values())

    def listed(self) -> Iterator[dict[str, Any]]:
        """All points of a space without a continuum."""
        every = [domain.every() if isinstance(domain, Range) else domain.values for domain in self.domains.values()]
        return (dict(zip(self.domains, values, strict=True)) for values in itertools.product(*every))

    def all_drawn(self) -> Iterator[dict[str, Any]]:
        """Different points in the order in which they are drawn at random; without end in a continuum."""
        there: set[str] = set()
        for number in itertools.count():
            if len(there) >= self.points:
                return
            values = self.random(number)
            if str(values) not in there:
                there.add(str(values))
                yield values

    def drawn(self, count: int) -> list[dict[str, Any]]:
        """The first points of `all_drawn`."""
        return list(itertools.islice(self.all_drawn(), count))

    def able(self, values: Mapping[str, Any]) -> bool:
        """True if the values go together."""
        try:
            self.check(values)
        except InputError:
            return False
        return True

    def random(self, number: int) -> dict[str, Any]:
        """The point of a draw, which follows from nothing that was found out. A key's value depends on (seed, key,
        number) alone, so that neither more trials nor another key change it.
        """
        point = self.grid[number % len(self.grid)]
        return self.ordered(point | {key: self._drawn(key, domain, number) for key, domain in self.free.items()})

    def ordered(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values in the order of the space."""
        return {key: values[key] for key in self.domains}

    def _drawn(self, key: str, domain: Domain, number: int) -> Any:
        """Every eighth of a range, and every choice, comes once before any comes again."""
        cells = len(domain.values) if isinstance(domain, Choice) else BLOCK
        block, place = divmod(number, cells)
        own = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.config.seed, own, block])))
        cell = int(rng.permutation(cells)[place])
        if isinstance(domain, Choice):
            return domain.values[cell]
        return domain.at((cell + rng.random(cells)[place]) / cells)

    def check(self, values: Mapping[str, Any]) -> RunConfig:
        """The configuration of a trial.

        Raises:
            InputError: the values do not go together.
        """
        try:
            return override(self.config, dict(values))
        except InputError as error:
            raise InputError(f"search.space: {shown(values)} can not run: {error}") from None


def of(config: RunConfig) -> Space:
    """The space of a search.

    Raises:
        InputError: an unknown key, one that can not be searched or has no effect, a domain of another form or type,
            reversed or outside of the key's bounds, a space of one point, or values that do not go together.
    """
    given = config.search.space or _default(config)
    space = Space(config, {key: _domain(config, key, text) for key, text in given.items()})
    if max(map(len, space.domains.values())) < 2:
        raise InputError(f"search.space: expected a key with more than one value, got {_told(given)}")
    for point in space.listed() if space.points <= LISTED else ():
        space.check(point)
    return space


def shown(values: Mapping[str, Any]) -> str:
    """Values as on a command line."""
    return "  ".join(f"{key}={typed(value)}" for key, value in values.items())


def _default(config: RunConfig) -> dict[str, str]:
    if config.stage == "task":
        raise InputError(
            "search.space: expected domains for training on labels, as "
            "search.space.task.learning_rate=loguniform(0.0001,0.003), got none"
        )
    unread = set() if config.align_steps else {"align.temperature"}
    unread |= set() if config.masked_steps or config.align_steps else {"masked.mask_ratio"}
    return {key: text for key, text in DEFAULT.items() if key not in unread}


def _domain(config: RunConfig, key: str, text: str) -> Domain:
    name = f"search.space.{key}"
    _check_key(config, key, name)
    match = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text, re.DOTALL)
    kind = match[1] if match else ""
    if match is None or kind not in ("uniform", "loguniform", "choice", "grid"):
        raise InputError(f"{name}: expected {FORM}, got {text!r}")
    words = [word.strip() for word in match[2].split("|" if "|" in match[2] else ",")]
    if not all(words):
        raise InputError(f"{name}: expected values between the commas, got {text!r}")
    if kind in ("choice", "grid"):
        values = tuple(_value(config, key, word, name) for word in words)
        if len(set(values)) < len(values):
            raise InputError(f"{name}: expected different values, got {text!r}")
        return Choice(values, kind == "grid")
    return _range(config, key, words, kind == "loguniform", name, text)


def _range(config: RunConfig, key: str, words: Sequence[str], log: bool, name: str, text: str) -> Range:
    annotation = dict(keys(config))[key].annotation
    if annotation not in (int, float):
        raise InputError(f"{name}: expected choice(...) or grid(...), since {key} is no number, got {text!r}")
    try:
        low, high = map(float, words)
    except ValueError:
        raise InputError(f"{name}: expected two numbers, got {text!r}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low <= high) or (log and low <= 0):
        above = "0 < LOW <= HIGH" if log else "LOW <= HIGH"
        raise InputError(f"{name}: expected {above}, got {text!r}")
    for word in words:
        _value(config, key, word, name)
    return Range(low, high, log, annotation is int)


def _value(config: RunConfig, key: str, word: str, name: str) -> Any:
    """A value as the key has it."""
    try:
        return flatten(override(config, {key: word}))[key]
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _check_key(config: RunConfig, key: str, name: str) -> None:
    """Refuse a key that changes nothing of what a trial learns, or that decides how it is scored."""
    if key not in dict(keys(config)):
        override(config, {key: ""})  # which says what is nearest
    patterns = key.startswith("sampling.") and key != "sampling.accelerations"  # those of validation too
    if key in NOT_SEARCHED or patterns:
        raise InputError(f"{name}: is not searched: {NOT_SEARCHED.get(key, _SCORE)}")
    section = key.partition(".")[0]
    read = {"masked": config.masked_steps + config.align_steps, "align": config.align_steps, "task": config.task_steps}
    if not is_identity(key) or key.startswith("data.") or not read.get(section, 1):
        raise InputError(
            f"{name}: expected a key that changes what a run of stage={config.stage} learns from its data, got one "
            "that does not"
        )


def _told(given: Mapping[str, str]) -> str:
    return " ".join(f"{key}={text}" for key, text in given.items())
