"""Line counts of the sampling families: lines drawn of a frame, the most that it has, and whether they are enough.

Of whole numbers and of tensors, so that what is refused, what memory is reckoned with and what is drawn are one.
"""

from __future__ import annotations

from typing import Any

from kmtr.types import InputError


def drawn_lines(lines: Any, acceleration: Any, family: str) -> Any:
    """Lines of a frame that the family draws at nominal R: floor(lines / R), the ACS lines among them.

    ``kt-gaussian-acs`` has its ACS lines on top, and lines / R to the next whole number, halves up as in MATLAB.

    Args:
        lines, acceleration: ints, or tensors of integers; the result is of the same kind.
    """
    if family == "kt-gaussian-acs":
        return (2 * lines + acceleration) // (2 * acceleration)
    return lines // acceleration


def most_lines(lines: int, acceleration: int, acs_lines: int, family: str) -> int:
    """Lines of a frame: exactly so many, but for ``kt-gaussian-acs``, where drawn lines may fall on ACS lines."""
    count: int = drawn_lines(lines, acceleration, family)
    return min(count + acs_lines, lines) if family == "kt-gaussian-acs" else count


def check_lines(lines: int, acceleration: int, acs_lines: int, family: str, what: str = "sampling") -> None:
    """Check that a pattern of `lines` can be drawn at this R. Those of the family ``file`` are what they are.

    Args:
        what: that asks for it, as the error begins.

    Raises:
        InputError: nothing but ACS lines would be sampled, or nothing at all.
    """
    if acceleration == 1 or family == "file":
        return
    count = drawn_lines(lines, acceleration, family)
    if count <= (0 if family in ("gaussian-wide", "kt-gaussian-acs") else acs_lines):
        least = f"more than {acs_lines} ACS; lower R or sampling.acs_lines" if count else "some; lower R"
        raise InputError(f"{what}: R = {acceleration} leaves {count} of {lines} lines, expected {least}")
