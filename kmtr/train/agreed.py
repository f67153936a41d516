"""Errors on which all workers agree, so that none waits for one that gave up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from kmtr.types import KmtrError

T = TypeVar("T")


def together(call: Callable[[], T], device: torch.device, then: Callable[[], None] | None = None) -> T:
    """`together_or_stop` where nobody asks to stop."""
    return together_or_stop(call, device, then)[0]


def together_or_stop(
    call: Callable[[], T], device: torch.device, then: Callable[[], None] | None = None, stop: bool = False
) -> tuple[T, bool]:
    """Result of `call` and whether any worker asks to stop, or on all workers the error of the first that has one:
    nobody waits for one that gave up.

    Args:
        then: is called where `call` has returned, before the others are waited for.
        stop: this worker asks to stop.

    Raises:
        KmtrError: of the lowest rank that has one.
    """
    result, failure = _tried(call)
    if then is not None:
        then()
    stops = agree(failure, device, stop)
    return result, stops  # type: ignore[return-value]  # no failure, so there is a result


def _tried(call: Callable[[], T]) -> tuple[T | None, KmtrError | None]:
    try:
        return call(), None
    except KmtrError as error:
        return None, error


def agree(error: KmtrError | None, device: torch.device, stop: bool = False) -> bool:
    """Raise the first worker's error on all workers if any has one; else whether any asks to stop.

    Raises:
        KmtrError: of the lowest rank that has one.
    """
    flag = torch.tensor(2 if error is not None else int(stop), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    found = int(flag)
    if found == 2:
        errors: list[KmtrError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        raise next(one for one in errors if one is not None)
    return found == 1
