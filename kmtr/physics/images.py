"""Magnitude images."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def rms(image: Float[Tensor, "batch slice t y x"], padded: Bool[Tensor, "batch slice t"]) -> Float[Tensor, " batch"]:
    """Root mean square of each subject's images over what is not padded; never zero."""
    present = (~padded)[..., None, None]
    energy = (image.square().sum((3, 4)) * present[..., 0, 0]).sum((1, 2))
    count = (present.sum((1, 2, 3, 4)) * image.shape[3] * image.shape[4]).clamp(min=1)
    return (energy / count).sqrt().clamp(min=torch.finfo(image.dtype).tiny)


def scale_image(
    image: Float[Tensor, "batch slice t y x"], padded: Bool[Tensor, "batch slice t"]
) -> Float[Tensor, "batch slice t y x"]:
    """Each subject's images divided by their RMS over what is not padded."""
    return image / rms(image, padded)[:, None, None, None, None]
