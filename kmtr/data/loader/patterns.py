"""The sampling pattern of a configuration that names a file: what it is, and whether it fits."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from kmtr.config import RunConfig, Sampling
from kmtr.physics.sampling import measured_acs_lines, true_acceleration
from kmtr.types import InputError


def table(sampling: Sampling) -> Bool[Tensor, "frame line"] | None:
    """The pattern of ``sampling.family=file``: that which `hold` was given, else read once per process; None for
    families that are drawn.

    Raises:
        InputError: no file given, or `sources.patterns.read_pattern` refuses it.
    """
    if sampling.family != "file":
        if sampling.file:
            raise InputError(
                f"sampling.file: not used by sampling.family={sampling.family}, which draws; set sampling.family=file"
            )
        return None
    if not sampling.file:
        raise InputError("sampling.file: expected a pattern file (.txt, .npy, .mat) for sampling.family=file, got none")
    held = _held.get(sampling.file)
    return _read(sampling.file) if held is None else held


def hold(sampling: Sampling, lines: Bool[np.ndarray, "frame line"] | None) -> None:
    """Make this process use these lines, which its run began with, wherever `table` is asked for the configured file:
    a worker's node may not have it, or a newer one. None, as of families that are drawn: nothing is held.
    """
    if lines is not None:
        _held[sampling.file] = torch.from_numpy(lines.copy())  # Ray's own memory can't be written to


def carried(sampling: Sampling) -> Bool[np.ndarray, "frame line"] | None:
    """Lines that `hold` needs in another process."""
    return None if (lines := table(sampling)) is None else lines.numpy()


def digest(sampling: Sampling) -> str:
    """SHA-256 of the lines of ``sampling.family=file``; empty for families that are drawn."""
    if (lines := table(sampling)) is None:
        return ""
    return hashlib.sha256(f"{tuple(lines.shape)}".encode() + lines.numpy().tobytes()).hexdigest()


def check(config: RunConfig) -> None:
    """Refuse accelerations other than what the configured pattern file has: its R is what it is, and nothing is drawn.

    Raises:
        InputError: they say something else; the line says what to set. Also as `table`.
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


_held: dict[str, Tensor] = {}
"""Pattern file -> its lines, where a run handed them to this process."""


@lru_cache(maxsize=8)
def _read(file: str) -> Bool[Tensor, "frame line"]:
    from kmtr.data.sources.patterns import read_pattern  # with the readers of MATLAB files, which no batch needs

    return torch.from_numpy(np.atleast_2d(read_pattern(file)).copy())
