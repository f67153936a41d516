"""Memory of a worker by formula: weights, gradients, optimizer, and what a forward pass keeps for the backward one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kmtr.bench.flops import RANK, Counts
from kmtr.config import RunConfig, most_lines
from kmtr.model.tokenizers import LineTokenizer, PatchTokenizer
from kmtr.tasks import Model
from kmtr.train.engine import BUCKET

PERSISTENT = 100_000
"""Weights of a tensor up to which ZeRO-3 keeps it whole on every worker (DeepSpeed's own threshold)."""


def parameters(config: RunConfig) -> list[int]:
    """Weights in each tensor of a run's model, counted without memory for them."""
    with torch.device("meta"):
        return [p.numel() for p in Model(config).parameters()]


@dataclass(frozen=True)
class State:
    """Bytes of one worker.

    Attributes:
        device: on its GPU, or in the host's memory where it computes there.
        host: in the host's memory besides.
    """

    device: float
    host: float


def state_bytes(
    sizes: Sequence[int],
    workers: int,
    zero_stage: int,
    bf16: bool,
    *,
    offload: bool = False,
    ema: bool = False,
    accumulates: bool = False,
) -> State:
    """Bytes of weights, gradients, AdamW's state and ZeRO's buffers on one worker (Rajbhandari et al. 2020, "ZeRO",
    figure 1, and what DeepSpeed 0.19 was measured to hold beside; a test compares).

    Per weight: w = g = 2 in bf16, else 4; s = 4, gradients as they are summed; o = 12 (fp32 master copy, two moments),
    or 8 without ZeRO, where the fp32 weights themselves are updated; `ema` adds 4 to o. With n workers: stage 0
    4 + 4 + o, in bf16 too; 1 w + g + o/n; 2 w + (s + o)/n; 3 (w + s + o)/n. ZeRO adds a bucket of gradients, w bytes (s
    in stage 3) for each of `engine.BUCKET` weights, or of all if fewer; stage 1 under accumulation another g, in bf16
    always s instead, without a bucket; stage 3 keeps tensors of up to 1e5 weights whole. `offload` moves o/n to the
    host, with fp32 gradients (4/n). Stages 1 and 2 then keep there w/n to send back, and the largest tensor once at
    each end; stage 1 has its bucket again, in bf16 s besides; stage 2 has its share of the gradients on the host, in
    fp32 only under accumulation. Activations, batches and libraries come on top.

    Args:
        sizes: weights in each tensor of the model.
        accumulates: several micro-batches per step.
    """
    count = float(sum(sizes))
    o = (12 if zero_stage else 8) + (4 if ema else 0)
    if zero_stage == 0:
        return State(count * (4 + 4 + o), 0.0)
    w = g = 2 if bf16 else 4
    s = 4
    share, bucketed = count / workers, min(BUCKET, count)
    if zero_stage == 3:
        device = share * (w + s) + sum(size for size in sizes if size <= PERSISTENT) * w + bucketed * s
        return State(device, share * (o + 4)) if offload else State(device + share * o, 0.0)
    largest, host = max(sizes) * w, share * (o + 4 + w) + max(sizes) * w
    if zero_stage == 2:
        if not offload:
            return State(count * w + share * (s + o) + bucketed * w, 0.0)
        return State(float(count * w + bucketed * w + largest), host + share * s * (accumulates or bf16))
    gradients = count * (g + g * accumulates + s * bf16) + bucketed * w
    if offload:
        return State(float(count * w + gradients + largest), host)
    return State(count * w + (count * (g + s) if bf16 else gradients) + share * o, 0.0)


def most_tokens(config: RunConfig) -> Counts:
    """Tokens of a subject that fills all slices and frames, at the lowest acceleration."""
    data, sampling, how = config.data, config.sampling, config.masked
    lines, r = data.matrix[0], min(sampling.accelerations)
    kept = most_lines(lines, r, sampling.acs_lines, sampling.family)
    cells = data.slices * data.frames
    patch_cells = cells // config.model.patch[0]
    sampled = cells * kept
    hidden = round(how.mask_ratio * sampled)
    candidates = hidden if how.target == "acquired" else cells * lines - sampled + hidden
    targets = round(how.target_lines * candidates) if how.target_lines else candidates
    patches = patch_cells * lines * data.matrix[1] // (config.model.patch[1] * config.model.patch[2])
    hidden_patches = round(how.image_mask_ratio * patches)
    visible = (sampled - hidden, targets, sampled, patches - hidden_patches, hidden_patches, patches)
    return Counts(*visible, cells, patch_cells, 0 if config.model.encoder_inputs == "kspace" else patches)


def activation_bytes(config: RunConfig, subjects: Sequence[Counts]) -> float:
    """Bytes that the forward pass of a micro-batch keeps on one worker, of the stage that keeps most.

    With width d and MLP ratio r a block keeps (9 + 2 r) d numbers a token: input and output of both norms, queries,
    keys, values, what attention gave, twice (it is copied for the next product), and the MLP's hidden layer before and
    after its activation (Korthikanti et al. 2022, equation 2, without attention matrices, which the fused kernel never
    writes, and dropout). In a decoder's block (7 + 2 r) d a query and 4 d a token of its memory. With
    `model.checkpointing` an encoder's block keeps d a token, and one block is whole at a time. Embedding and head of
    lines keep the `RANK` maps that their gates mix. Numbers are 2 bytes in bf16, else 4; losses are fp32.

    Args:
        subjects: tokens of each subject of the micro-batch.
    """
    model = config.model
    width, inner, r = model.width, model.decoder_width, model.mlp_ratio
    line, patch = LineTokenizer.features(config.data, model), PatchTokenizer.features(model)
    size = 2 if config.train.bf16 else 4

    def encoder(tokens: int, cells: int, features: int, embedded: int) -> int:
        block = (9 + 2 * r) * width
        blocks = model.depth * width + block if model.checkpointing else model.depth * block
        return size * (tokens * (features + embedded + blocks + 2 * width) + cells * (block + 2 * width))

    def decoder(queries: int, tokens: int, features: int, mixed: int) -> int:
        block = queries * (7 + 2 * r) * inner + tokens * 4 * inner
        read = tokens * width + queries * (2 * inner + mixed)
        return size * (model.decoder_depth * block + read) + 4 * queries * features

    def of(n: Counts) -> int:
        """One subject's."""
        kspace = encoder(n.visible, n.cells, line, RANK * width)
        kspace += decoder(n.targets, n.visible + n.cells, line, RANK * line)
        image = encoder(n.visible_patches, n.patch_cells, patch, 0)
        image += decoder(n.hidden_patches, n.visible_patches + n.patch_cells, patch, 0)
        image *= config.masked.image_weight > 0
        trained = config.align.teacher == "encoder" and config.align.train_image_encoder
        aligned = encoder(n.sampled, n.cells, line, RANK * width)
        aligned += (kspace + image * trained) * (config.align.masked_weight > 0)
        aligned += encoder(n.patches, n.patch_cells, patch, 0) * trained
        return max((kspace + image) * (config.masked_steps > 0), aligned * (config.align_steps > 0))

    return float(sum(map(of, subjects)))
