"""Batches made by threads of the training worker itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def in_order(make: Callable[[int], T], numbers: Iterable[int], threads: int, ahead: int) -> Iterator[T]:
    """``make(number)`` of each number in order, by `threads` threads, up to `ahead` of them not yet asked for."""
    with ThreadPoolExecutor(threads, thread_name_prefix="kmtr-read") as pool:
        remaining = iter(numbers)
        pending = deque(pool.submit(make, n) for n in islice(remaining, ahead))
        try:
            while pending:
                batch = pending.popleft().result()
                pending.extend(pool.submit(make, n) for n in islice(remaining, 1))
                yield batch
        finally:
            for future in pending:
                future.cancel()
