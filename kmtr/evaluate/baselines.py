"""Features of the linear baselines: parts of the undersampled k-space, and its image at low resolution; images that
need no reconstruction.

A claim of the encoder on a dataset has to beat these. Where they are near perfect the dataset is too easy, and nothing
is shown by winning.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kmtr.data.loader.batch import Batch
from kmtr.inputs import Shared, acquired, lowrank, view_shared
from kmtr.physics.fourier import crop_or_pad, magnitude_image
from kmtr.physics.lines import phase_gain

VERSION = 3
"""Version of the baselines; 1 did not separate static and dynamic part, 2 scored masks of one frame. A result of
another one is made anew.
"""
LOW_RESOLUTION = 16
CENTRE = (4, 8)
"""Lines and samples along each, about the centre of k-space."""


def central(batch: Batch) -> np.ndarray:
    """The central 4 x 8 complex samples of every slice and frame, zero where not sampled, as `still_and_moving`."""
    kspace = batch.kspace / phase_gain(batch.kspace, batch.sampled)[..., None, None, None]
    kept = torch.where(batch.sampled[:, :, None, :, :, None], kspace, 0)
    ky, kx = (slice(n // 2 - size // 2, n // 2 + size // 2) for n, size in zip(kept.shape[-2:], CENTRE, strict=True))
    return still_and_moving(torch.view_as_real(kept[..., ky, kx].contiguous()).movedim(2, 3), batch.padded)


def low_resolution(batch: Batch) -> np.ndarray:
    """View-shared zero-filled magnitude images of 16 x 16 of every slice and frame, as `still_and_moving`.

    A strong baseline, though it trains no network.
    """
    shared = view_shared(batch)
    size = tuple(min(LOW_RESOLUTION, n) for n in shared.shape[-2:])
    return still_and_moving(magnitude_image(crop_or_pad(shared, size, (-2, -1))), batch.padded)


def still_and_moving(values: Float[Tensor, "batch slice t *rest"], padded: Bool[Tensor, "batch slice t"]) -> np.ndarray:
    """The mean over the frames and each frame's deviation from it, float32 ``subject feature``.

    Standardised apart, as a ridge does, the little that moves weighs as much as what stands still: without the split
    it is lost in the penalty.
    """
    present = (~padded).to(values.dtype).view(*padded.shape, *[1] * (values.ndim - 3))
    mean = (values * present).sum(2, keepdim=True) / present.sum(2, keepdim=True).clamp(min=1)
    return torch.cat([mean, (values - mean) * present], dim=2).flatten(1).cpu().numpy()


def zerofilled_image(matrix: tuple[int, int]) -> Callable[[Batch], dict[str, Tensor]]:
    """Predictor of the magnitude image of the acquired lines, each frame by itself, in the source's numbers."""
    return lambda batch: {"image": magnitude_image(crop_or_pad(acquired(batch), matrix, (-2, -1)))}


def lowrank_image(matrix: tuple[int, int]) -> Callable[[Batch], dict[str, Tensor]]:
    """Predictor of the magnitude image of the low-rank + sparse reconstruction, in the source's numbers."""

    def image(batch: Batch) -> dict[str, Tensor]:
        gain = phase_gain(batch.kspace, batch.sampled)[:, 0, 0].abs()
        return {
            "image": magnitude_image(crop_or_pad(lowrank(batch), matrix, (-2, -1))) * gain[:, None, None, None, None]
        }

    return image


def shared_image(matrix: tuple[int, int]) -> Callable[[Batch], dict[str, Tensor]]:
    """Predictor of the temporally shared image, in the source's numbers."""

    def image(batch: Batch) -> dict[str, Tensor]:
        seen = Shared.of(batch, matrix)
        return {"image": seen.image * seen.unit[:, None, None, None, None]}

    return image
