"""Files of sampling patterns: text, ``.npy``, ``.mat`` v5 and v7.3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kmtr.data.sources import Options, matlab
from kmtr.types import InputError

MOST_BYTES = 1 << 26
"""Largest pattern file: many times what any scan has."""


def read_pattern(path: str | Path) -> np.ndarray:
    """A sampling pattern from a file: bool, ``ky`` or ``t ky``, True = sampled.

    ``.mat`` (v5, v7.3) and ``.npy``: one array of zeros and ones: one line of them (ky), a matrix with the readout
    (each line all zeros or all ones), or a series of such matrices, whose frames are the smallest dimension, first or
    last. The readout is the dimension along which nothing changes, so either order of the axes is read. A matrix
    without such a dimension is t and ky, fewer frames than lines, if all frames have the same number of lines; else it
    is taken as two-dimensional (pseudo-radial).

    ``.txt``, ``.csv``: zeros and ones apart by commas or blanks, a row per line and a column per frame, as VISTA's, or
    the other way round: there are fewer frames than lines.

    Raises:
        InputError: no such array, other values, or a pattern that is not made of whole lines.
    """
    path, where = Path(path), str(path)
    if not path.is_file():
        raise InputError(f"{where}: expected a pattern file, .txt, .npy or .mat, found none")
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"{where}: expected a pattern of at most {MOST_BYTES >> 20} MiB, got a larger file")
    text, readout_first = path.suffix in (".txt", ".csv"), False
    if text:
        stored = _load_text(path)
    elif path.suffix == ".npy":
        stored = _load_npy(path)
    else:
        stored, _, readout_first = matlab.load(path, where, _pattern_key, Options(most_bytes=16 * MOST_BYTES))
    if stored.dtype.kind not in "biuf" or not np.isin(stored, (0, 1)).all():
        raise InputError(f"{where}: expected a pattern of zeros and ones, got other values ({stored.dtype})")
    if not stored.any():
        raise InputError(f"{where}: expected a pattern that samples something, got only zeros")
    pattern = stored.astype(bool)
    if pattern.ndim != 3:
        pattern = pattern.squeeze()
    if pattern.ndim == 1:
        return pattern
    if pattern.ndim == 2:
        frames_first = pattern if pattern.shape[0] < pattern.shape[1] else pattern.T
        counts = frames_first.sum(1)
        if not any(_constant(pattern, axis) for axis in (0, 1)) and (text or (counts == counts[0]).all()):
            if pattern.shape[0] == pattern.shape[1]:
                raise InputError(f"{where}: expected fewer frames than lines, got {pattern.shape}")
            return frames_first
        return _lines(pattern[None], where, readout_first)[0]
    if pattern.ndim != 3:
        raise InputError(f"{where}: expected a pattern of 1 to 3 dimensions (t, ky, kx), got {stored.shape}")
    first, middle, last = pattern.shape
    if min(first, last) >= min(middle, max(first, last)):
        raise InputError(f"{where}: expected fewer frames than lines, first or last, got {pattern.shape}")
    return _lines(pattern if first < last else pattern.transpose(2, 0, 1), where, readout_first)


def _lines(pattern: np.ndarray, where: str, readout_first: bool) -> np.ndarray:
    """``t`` and two dimensions, one of them the readout -> ``t ky``."""
    constant = [_constant(pattern, axis) for axis in (1, 2)]
    if not any(constant):
        raise InputError(
            f"{where}: a two-dimensional pattern {pattern.shape[1:]}: expected whole lines, zero or one all along the "
            "readout; pseudo-radial patterns are not supported"
        )
    # All ones: constant along both, so only the container tells which dimension is the readout.
    readout = (1 if readout_first else 2) if all(constant) else 1 + constant.index(True)
    return pattern.take(0, readout)


def _constant(pattern: np.ndarray, axis: int) -> bool:
    return bool((pattern == pattern.take([0], axis)).all())


def _pattern_key(names: Sequence[str], where: str) -> str:
    found = [name for name in names if "mask" in name.lower()] or list(names)
    if len(found) != 1:
        listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "no array at all"
        raise InputError(f"{where}: expected one pattern, such as the variable mask, got {listed}")
    return found[0]


def _load_npy(path: Path) -> np.ndarray:
    try:
        return np.array(np.load(path, allow_pickle=False, mmap_mode="r"))  # a map can't claim more than the file has
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: expected a plain .npy array; cannot be read ({type(error).__name__})") from None


def _load_text(path: Path) -> np.ndarray:
    try:
        rows = [line.replace(",", " ").split() for line in path.read_text("ascii").splitlines()]
        return np.array([row for row in rows if row], np.float32)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected rows of as many zeros and ones each; cannot be read ({type(error).__name__})"
        ) from None
