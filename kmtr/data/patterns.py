"""Sampling patterns that come from files: text, ``.npy``, ``.mat`` v5 and v7.3."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from kmtr.config import RunConfig, Sampling
from kmtr.data.sources import Options, matlab
from kmtr.physics.sampling import measured_acs_lines, true_acceleration
from kmtr.types import InputError

MOST_BYTES = 1 << 26
"""Largest pattern file: many times what any scan has."""


def table(sampling: Sampling) -> Bool[Tensor, "frame line"] | None:
    """The pattern of ``sampling.family=file``, read once per process; None for families that are drawn.

    Raises:
        InputError: no file given, or `read_pattern` refuses it.
    """
    if sampling.family != "file":
        if sampling.file:
            raise InputError(
                f"sampling.file: not used by sampling.family={sampling.family}, which draws; set sampling.family=file"
            )
        return None
    if not sampling.file:
        raise InputError("sampling.file: expected a pattern file (.txt, .npy, .mat) for sampling.family=file, got none")
    return _table(sampling.file)


def digest(sampling: Sampling) -> str:
    """SHA-256 of the lines of ``sampling.family=file``; empty for families that are drawn."""
    if (lines := table(sampling)) is None:
        return ""
    return hashlib.sha256(f"{tuple(lines.shape)}".encode() + lines.numpy().tobytes()).hexdigest()


def check(config: RunConfig) -> None:
    """Whether the accelerations say what the configured pattern file has: its R is what it is, and nothing is drawn.

    Raises:
        InputError: they do not; says what to set. Also as `table`.
    """
    if (lines := table(config.sampling)) is None:
        return
    r = float(true_acceleration(lines))
    nominal = max(1, round(r))
    for key, given in (
        ("sampling", config.sampling.accelerations),
        ("evaluate", config.evaluate.accelerations),
    ):
        if given != (nominal,):
            raise InputError(
                f"{key}.accelerations: none is drawn with sampling.family=file, whose pattern has R = {r:.2f} and "
                f"{measured_acs_lines(lines)} ACS lines; set sampling.accelerations={nominal} and "
                f"evaluate.accelerations={nominal}, got {','.join(map(str, given))}"
            )


def check_lines(table: Bool[Tensor, "frame line"], view: str, lines: int) -> None:
    """Refuse a pattern of another number of lines than the k-space of a view has."""
    if table.shape[1] != lines:
        raise InputError(
            f"sampling.file: expected a pattern of the {lines} lines of {view}, got {table.shape[1]} lines"
        )


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


@lru_cache(maxsize=8)
def _table(file: str) -> Bool[Tensor, "frame line"]:
    return torch.from_numpy(np.atleast_2d(read_pattern(file)).copy())


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
