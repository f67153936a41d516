"""Subjects of a source that have the same contents: one person under two names would land in training and test.

Told before anything is read, by digests of contents that two people never share: measured values have noise. A reader's
``contents(item)`` gives them, else a piece from the middle of the item's first file.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kmtr.data.sources import Item

Content = tuple[Literal["images", "contours"], str]
"""Kind of content, and its digest."""

PIECE_BYTES = 1 << 16
VALUES = 16
"""Fewer different bytes in a piece are padding, which anybody's file may have."""

THREADS = min(16, os.cpu_count() or 1)
"""Inflating files is most of the work, and Python lets it run at once."""


def marked(items: Sequence[Item], contents: Callable[[Item], Iterable[Content]]) -> list[Item]:
    """The items, with a problem where one has the same contents as another.

    Of subjects with the same images the first in order goes on. Contours that two have are nobody's until somebody says
    whose: none of the subjects goes on.
    """
    owners: dict[Content, list[int]] = defaultdict(list)
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda item: _told(item, contents), items)
        for number, digests in enumerate(found):
            for content in digests:
                owners[content].append(number)
    problems: dict[int, str] = {}
    order = f"of {len(items)} in the order of names"
    for (what, _), numbers in sorted(owners.items(), reverse=True):  # images first
        left = [number for number in numbers if number not in problems]
        if what == "images":
            said = f"the same images as subject {numbers[0] + 1} {order}: one person twice? Leave one of them"
            problems |= dict.fromkeys(left[1:], said)
        elif len(left) > 1:
            listed = ", ".join(str(number + 1) for number in left[:5])
            said = f"subjects {listed} {order} have the same contours: whose are they? Leave them with one"
            problems |= dict.fromkeys(left, said)
    return [replace(item, problem=item.problem or problems.get(n, "")) for n, item in enumerate(items)]


def _told(item: Item, contents: Callable[[Item], Iterable[Content]]) -> set[Content]:
    try:
        return set() if item.problem else set(contents(item))
    except Exception:  # whatever is wrong with the files of one subject, `read` says it of that subject alone
        return set()


def of_files(item: Item) -> list[Content]:
    """The images of an item whose first path is a file: its size, and a piece from its middle."""
    path = item.files[0]
    if not path.is_file():
        return []
    size = path.stat().st_size
    piece = piece_of(path, (size - PIECE_BYTES) // 2)
    return [("images", f"{size} {digest(piece)}")] if len(set(piece)) > VALUES else []


def piece_of(path: Path, start: int) -> bytes:
    """`PIECE_BYTES` of a file, from `start` on or from its beginning; fewer where it ends."""
    with path.open("rb") as file:
        file.seek(max(0, start))
        return file.read(PIECE_BYTES)


def digest(content: bytes) -> str:
    """BLAKE2b of 128 bits, hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
