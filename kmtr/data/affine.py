"""Affines of images whose axes are flipped or resized: 4x4, voxel (x, y, slice) -> mm in the scanner's
right-anterior-superior coordinates, as NIfTI has them.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

Affine = Float[np.ndarray, "4 4"]


def flipped(affine: Affine, axis: int, count: int) -> Affine:
    """The affine of an image that is turned round along an axis.

    Args:
        axis: 0 to 2, column of the affine.
        count: voxels along it.
    """
    turned = affine.copy()
    turned[:, 3] += (count - 1) * affine[:, axis]
    turned[:, axis] = -affine[:, axis]
    return turned


def resized(affine: Affine, axis: int, have: int, want: int, *, cropped: bool) -> Affine:
    """The affine of an image with `want` in place of `have` voxels along an axis around the same centre, index
    ``n // 2``.

    Args:
        axis: 0 to 2, column of the affine.
        cropped: it was cropped or padded, so that voxels keep their size; else it keeps its field of view.
    """
    scale = 1.0 if cropped else have / want
    found = affine.copy()
    found[:, axis] = affine[:, axis] * scale
    found[:, 3] += (have // 2 - scale * (want // 2)) * affine[:, axis]
    return found
