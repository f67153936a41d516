"""What the receiver adds to a real image: one smooth phase map per slice (one coil)."""

from __future__ import annotations

import numpy as np

from kmtr.physics.noise import Purpose, generator


def phase_map(matrix: tuple[int, int], *, seed: int, subject: int, slice_index: int, wraps: float = 1.0) -> np.ndarray:
    """A smooth random phase, shared by all frames of one slice; float32 ``y x`` in rad.

    A random cubic polynomial of the position stretched to a span (greatest minus least phase) uniform in
    [0, 2 pi `wraps`], plus a constant uniform in [0, 2 pi). Being defined on [-1, 1]^2 it is the same function of
    position at every matrix size. Pure function of (seed, subject, slice_index), `matrix` and `wraps`.

    Args:
        matrix: pixels along y and x.
        wraps: greatest number of full turns across the field of view.
    """
    rng = generator(seed, subject, Purpose.PHASE, slice_index)
    coefficients = rng.standard_normal((4, 4))
    span, offset = 2 * np.pi * rng.random(2) * (wraps, 1.0)
    order = np.add.outer(np.arange(4), np.arange(4))
    coefficients[(order == 0) | (order > 3)] = 0
    # Pixel n // 2 sits at 0, as the centre of both domains does.
    y, x = ((np.arange(n) - n // 2) / (n / 2) for n in matrix)
    field = np.polynomial.polynomial.polygrid2d(y, x, coefficients)
    return (offset + span * field / np.ptp(field)).astype(np.float32)
