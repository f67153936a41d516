"""Losses as pure functions, in fp32 whatever the engine's precision; every one is a mean per subject."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kmtr.metrics.images import WINDOW
from kmtr.types import UNLABELLED

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


def over_subjects(values: Float[Tensor, "cell ..."], counts: Int[Tensor, " batch"]) -> Float[Tensor, "batch ..."]:
    """Sum over the cells of each subject, which come one after the other; 0 for a subject that has none."""
    return torch.segment_reduce(values, "sum", lengths=counts, unsafe=True, initial=0.0)  # unsafe: asks nothing


def told(
    truth: UInt8[Tensor, "*cell y x"], drawn: Bool[Tensor, "*cell class"]
) -> tuple[UInt8[Tensor, "*cell y x"], Bool[Tensor, "*cell class"]]:
    """Truth, and the classes drawn, of cells where nobody knows the background: there UNLABELLED pixels are of none of
    the classes that the cell shows, so they become background that may be any other class.

    Sources leave whatever is not contoured UNLABELLED in a frame that lacks a class (`data.sources.cine`): of the
    Sunnybrook data's end-systole the cavity alone is known, which would teach that all of the image is cavity.
    """
    shown = torch.stack([(truth == value).any(-1).any(-1) for value in range(drawn.shape[-1])], dim=-1)
    partly = shown.any(-1) & ~shown[..., 0]
    shown[..., 0] = True
    beside = partly[..., None, None] & (truth == UNLABELLED)
    return truth.masked_fill(beside, 0), drawn & (shown | ~partly[..., None])


def cross_entropy_and_dice(
    logits: Float[Tensor, "cell class y x"],
    truth: UInt8[Tensor, "cell y x"],
    drawn: Bool[Tensor, "cell class"],
    counts: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Cross entropy, mean over pixels, and 1 - soft Dice, mean over the classes drawn, of each subject; 0 for a subject
    without a labelled pixel.

    Where a source does not draw a class, its background may be that class: the probability of a background pixel is
    that of the background and the undrawn classes together (marginal loss of Fang and Yan, IEEE Trans Med Imaging
    39:3619, 2020; Shi et al., Med Image Anal 70:101979, 2021). Dice (Milletari 2016) is over all pixels of the subject
    together, where the class is drawn, without the background, smoothed by one pixel.

    Args:
        truth: UNLABELLED pixels count for nothing, whatever is predicted there, but for what `told` knows of them.
        drawn: classes that the cell's source draws; the background (0) counts as drawn.
        counts: cells of each subject, which come one after the other.
    """
    truth, drawn = told(truth, drawn)
    counted = truth != UNLABELLED
    wanted = truth.long().masked_fill(~counted, 0)
    foreground = drawn.clone()
    foreground[:, 0] = False
    log_p = logits.float().log_softmax(1)
    unsure = log_p.masked_fill(foreground[..., None, None], -torch.inf).logsumexp(1)
    right = torch.where(wanted == 0, unsure, log_p.gather(1, wanted[:, None])[:, 0])
    pixels = over_subjects(counted.sum((1, 2)).float(), counts)
    entropy = over_subjects(torch.where(counted, -right, 0.0).sum((1, 2)), counts) / pixels.clamp(min=1)

    asked = counted[:, None] & foreground[:, 1:, None, None]
    p = torch.where(asked, log_p[:, 1:].exp(), 0.0)
    true = asked & (wanted[:, None] == torch.arange(1, logits.shape[1], device=truth.device)[:, None, None])
    both = over_subjects((p * true).sum((2, 3)), counts)
    sizes = over_subjects(p.sum((2, 3)) + true.sum((2, 3)), counts)
    seen = over_subjects(asked.any(-1).any(-1).float(), counts) > 0
    overlap = torch.where(seen, (2 * both + 1) / (sizes + 1), 0.0).sum(1) / seen.sum(1).clamp(min=1)
    return entropy + torch.where(seen.any(1), 1 - overlap, 0.0)


def absolute_and_structural(
    predicted: Float[Tensor, "cell y x"],
    truth: Float[Tensor, "cell y x"],
    peak: Float[Tensor, " batch"],
    counts: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Mean absolute error over the subject's peak, and 1 - SSIM (`metrics.images.ssim`'s convention), mean over the
    cells of each subject; 0 for a subject that has none.

    Args:
        peak: maximum of each subject's true images, the data range of SSIM.
        counts: cells of each subject, which come one after the other.
    """
    rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=len(truth))
    scale = peak.clamp(min=torch.finfo(torch.float32).tiny)[rows, None, None]
    x, y = predicted.float() / scale, truth.float() / scale
    error = (x - y).abs().mean((1, 2)) + 1 - _ssim(x, y)
    return over_subjects(error, counts) / counts.clamp(min=1)


def _ssim(x: Float[Tensor, "cell y x"], y: Float[Tensor, "cell y x"]) -> Float[Tensor, " cell"]:
    """SSIM of images whose data range is 1: uniform windows that lie within the image, variances over n - 1."""
    means = _window_means(torch.stack([x, y, x * x, y * y, x * y], dim=1))
    mean_x, mean_y, xx, yy, xy = means.unbind(1)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    variances = unbiased * (xx - mean_x.square() + yy - mean_y.square())
    covariance = unbiased * (xy - mean_x * mean_y)
    luminance, contrast = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + luminance) * (2 * covariance + contrast)
    similarity = similarity / ((mean_x.square() + mean_y.square() + luminance) * (variances + contrast))
    return similarity.mean((1, 2))


def _window_means(images: Float[Tensor, "cell image y x"]) -> Float[Tensor, "cell image inner_y inner_x"]:
    """Mean over each `WINDOW` x `WINDOW` pixels, by a product with a band matrix for each axis: on CPUs pooling takes
    six times as long. In fp32 under autocast too, since variances are differences of these means.
    """
    with torch.autocast(images.device.type, enabled=False):
        rows, columns = (_band(n, images) for n in images.shape[-2:])
        return rows.T @ (images @ columns)


def _band(size: int, like: Tensor) -> Float[Tensor, "pixel window"]:
    """Share of each pixel of a row in the mean over each window."""
    offset = torch.arange(size, device=like.device)[:, None] - torch.arange(size - WINDOW + 1, device=like.device)
    return ((offset >= 0) & (offset < WINDOW)).to(like.dtype) / WINDOW
