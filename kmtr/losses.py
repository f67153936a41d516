"""Losses as pure functions, in fp32 whatever the engine's precision; every one is a mean per subject."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

HDR_EPS = 0.5


def masked_reconstruction(
    predicted: Float[Tensor, "batch token feature"],
    target: Float[Tensor, "batch token feature"],
    padded: Bool[Tensor, "batch token"],
    kind: Literal["mse", "l1", "hdr"] = "mse",
    blank: Bool[Tensor, "batch token feature"] | None = None,
) -> Float[Tensor, " batch"]:
    """Mean over the hidden tokens of each subject; 0 for a subject that has none.

    ``hdr`` is k-GIN's high-dynamic-range loss (|e| / (stopgrad|prediction| + 0.5))^2 over complex values (features are
    real and imaginary part, interleaved).

    Args:
        blank: features that are no data; a token's mean is over the others.
    """
    error = predicted.float() - target.float()
    if kind == "mse":
        per_feature = error.square()
    elif kind == "l1":
        per_feature = error.abs()
    else:
        pairs = error.unflatten(-1, (-1, 2)).square().sum(-1)
        size = predicted.detach().float().unflatten(-1, (-1, 2)).square().sum(-1).sqrt()
        per_feature = (pairs / (size + HDR_EPS).square()).repeat_interleave(2, -1)
    if blank is None:
        per_token = per_feature.mean(-1)
    else:
        per_token = per_feature.masked_fill(blank, 0.0).sum(-1) / (~blank).sum(-1).clamp(min=1)
    present = ~padded
    return (per_token * present).sum(-1) / present.sum(-1).clamp(min=1)


def info_nce(
    anchor: Float[Tensor, "slice local channel"],
    candidate: Float[Tensor, "slice all channel"],
    positive: Int[Tensor, " local"],
    excluded: Bool[Tensor, "slice local all"],
    temperature: float,
) -> tuple[Float[Tensor, "slice local"], Bool[Tensor, "slice local"]]:
    """InfoNCE (van den Oord 2018) of local anchors against all candidates, per slice.

    Args:
        positive: index of each anchor's own candidate.
        excluded: candidates that are no negatives of an anchor: of the same subject, or absent. Never the positive.

    Returns:
        loss per anchor, in nats, and whether the positive was the nearest candidate (retrieval top-1).
    """
    anchor, candidate = F.normalize(anchor.float(), dim=-1), F.normalize(candidate.float(), dim=-1)
    logits = torch.einsum("slc,sgc->slg", anchor, candidate) / temperature
    logits = logits.masked_fill(excluded, -torch.inf)
    local = torch.arange(len(positive), device=positive.device)
    matched = logits[:, local, positive]
    return logits.logsumexp(-1) - matched, matched >= logits.amax(-1)
