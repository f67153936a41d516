"""Errors of ours among what Ray wraps them in."""

from __future__ import annotations

from kmtr.types import KmtrError


def find_cause(error: BaseException | None, kind: type[KmtrError]) -> KmtrError | None:
    """The first error of `kind` among an error, its causes and what Ray wrapped; None if there is none."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        error = queue.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, kind):
            lines = str(error).strip().splitlines() or [""]
            marked = [line.partition(f"{kind.__name__}: ")[2] for line in lines if f"{kind.__name__}: " in line]
            return kind(marked[0] if marked else lines[0])  # Ray puts a traceback before, and advice behind
        queue += [error.__cause__, error.__context__, getattr(error, "cause", None)]
    return None
