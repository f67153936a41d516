"""Losses as pure functions, in fp32 whatever the engine's precision; every one is a mean per subject."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

HDR_EPS = 0.5


def masked_reconstruction(
    predicted: Float[Tensor, "token feature"],
    target: Float[Tensor, "token feature"],
    counts: Int[Tensor, " batch"],
    kind: Literal["mse", "l1", "hdr"] = "mse",
    blank: Bool[Tensor, "token feature"] | None = None,
) -> Float[Tensor, " batch"]:
    """Mean over the hidden tokens of each subject; 0 for a subject that has none.

    ``hdr`` is k-GIN's high-dynamic-range loss (|e| / (stopgrad|prediction| + 0.5))^2 over complex values (features are
    real and imaginary part, interleaved).

    Args:
        counts: tokens of each subject, which come one after the other.
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
    total = torch.segment_reduce(per_token, "sum", lengths=counts, unsafe=True, initial=0.0)  # unsafe: asks nothing
    return total / counts.clamp(min=1)


class Contrast(NamedTuple):
    """InfoNCE of each anchor.

    Attributes:
        loss: in nats.
        nearest: whether the positive was the nearest candidate (retrieval top-1).
        margin: cosine of the positive less that of the hardest negative, in [-2, 2]; without a negative, as if one lay
            opposite.
    """

    loss: Float[Tensor, "slice local"]
    nearest: Bool[Tensor, "slice local"]
    margin: Float[Tensor, "slice local"]


def info_nce(
    anchor: Float[Tensor, "slice local channel"],
    candidate: Float[Tensor, "slice all channel"],
    positive: Int[Tensor, " local"],
    excluded: Bool[Tensor, "slice local all"],
    temperature: float | Float[Tensor, ""],
    chunk: int = 0,
) -> Contrast:
    """InfoNCE (van den Oord 2018) of local anchors against all candidates, per slice.

    Args:
        positive: index of each anchor's own candidate.
        excluded: candidates that are no negatives of an anchor: of the same subject, or absent. Never the positive.
        temperature: a tensor gets its gradient.
        chunk: anchors whose similarities are held at once; the backward pass makes them again. 0: all.
    """
    anchor, candidate = F.normalize(anchor.float(), dim=-1), F.normalize(candidate.float(), dim=-1)
    if not chunk or chunk >= len(positive):
        return Contrast(*_info_nce(anchor, candidate, positive, excluded, temperature))
    pieces = [
        checkpoint(
            _info_nce, anchor[:, rows], candidate, positive[rows], excluded[:, rows], temperature, use_reentrant=False
        )
        for rows in (slice(first, first + chunk) for first in range(0, len(positive), chunk))
    ]
    return Contrast(*(torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True)))


def _info_nce(
    anchor: Tensor, candidate: Tensor, positive: Tensor, excluded: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    cosine = torch.einsum("slc,sgc->slg", anchor, candidate)
    logits = (cosine / temperature).masked_fill(excluded, -torch.inf)
    local = torch.arange(len(positive), device=positive.device)
    matched, own = logits[:, local, positive], cosine.detach()[:, local, positive]
    negative = excluded.clone()
    negative[:, local, positive] = True
    hardest = cosine.detach().masked_fill(negative, -1.0).amax(-1)
    return logits.logsumexp(-1) - matched, matched >= logits.amax(-1), own - hardest
