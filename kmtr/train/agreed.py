"""Errors on which all workers agree, so that none waits for one that gave up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from kmtr.types import KmtrError

T = TypeVar("T")

NOTHING, SAVE, STOP, _FAILED = range(4)
"""Wishes of a worker between two steps: that of any worker is all workers', the largest first."""


def together(call: Callable[[], T], device: torch.device, then: Callable[[], None] | None = None) -> T:
    """`together_wishing` where nobody wishes anything."""
    return together_wishing(call, device, then)[0]


def together_wishing(
    call: Callable[[], T], device: torch.device, then: Callable[[], None] | None = None, wish: int = NOTHING
) -> tuple[T, int]:
    """Result of `call` and the workers' largest wish, or on all workers the error of the first that has one: nobody
    waits for one that gave up.

    Args:
        then: is called where `call` has returned, before the others are waited for.

    Raises:
        KmtrError: of the lowest rank that has one.
    """
    result, failure = _tried(call)
    if then is not None:
        then()
    wishes = agree(failure, device, wish)
    return result, wishes  # type: ignore[return-value]  # no failure, so there is a result


def _tried(call: Callable[[], T]) -> tuple[T | None, KmtrError | None]:
    try:
        return call(), None
    except KmtrError as error:
        return None, error


def agree(error: KmtrError | None, device: torch.device, wish: int = NOTHING) -> int:
    """Raise the first worker's error on all workers if any has one; else their largest wish.

    Raises:
        KmtrError: of the lowest rank that has one.
    """
    flag = torch.tensor(wish if error is None else _FAILED, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    found = int(flag)
    if found == _FAILED:
        errors: list[KmtrError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        raise next(one for one in errors if one is not None)
    return found
