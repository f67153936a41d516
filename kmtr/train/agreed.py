"""Errors on which all workers agree, so that none waits for one that gave up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from kmtr.types import KmtrError

T = TypeVar("T")


def together(call: Callable[[], T], device: torch.device, then: Callable[[], None] | None = None) -> T:
    """Result of `call`, or on all workers the error of the first that has one: nobody waits for one that gave up.

    Args:
        then: is called where `call` has returned, before the others are waited for.

    Raises:
        KmtrError: of the lowest rank that has one.
    """
    result, failure = _tried(call)
    if then is not None:
        then()
    agree(failure, device)
    return result  # type: ignore[return-value]  # no failure, so there is a result


def _tried(call: Callable[[], T]) -> tuple[T | None, KmtrError | None]:
    try:
        return call(), None
    except KmtrError as error:
        return None, error


def agree(error: KmtrError | None, device: torch.device) -> None:
    """Raise the first worker's error on all workers if any has one.

    Raises:
        KmtrError: of the lowest rank that has one.
    """
    flag = torch.tensor(0 if error is None else 1, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if int(flag):
        messages: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if error is None else str(error))
        raise KmtrError(next(m for m in messages if m is not None))
