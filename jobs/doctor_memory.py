"""Memory of a worker by formula: weights, gradients, optimizer, and what a forward pass keeps for the backward one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jobs.bench_flops import RANK, Counts
from kmtr.config import RunConfig
from kmtr.model.tokenizers import LineTokenizer, PatchTokenizer
from kmtr.objectives import Pretraining
from kmtr.train.engine import BUCKET

PERSISTENT = 100_000
"""Weights of a tensor up to which ZeRO-3 keeps it whole on every worker (DeepSpeed's own threshold)."""


def parameters(config: RunConfig) -> list[int]:
    """Weights in each tensor of the pretraining module, counted without memory for them."""
    with torch.device("meta"):
        return [p.numel() for p in Pretraining(config).parameters()]


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
    sizes: Sequence[int], workers: int, zero_stage: int, bf16: bool, offload: bool = False, ema: bool = False
) -> State:
    """Bytes of weights, gradients, AdamW's state and ZeRO's buffers on one worker (Rajbhandari et al. 2020, "ZeRO",
    figure 1, and what DeepSpeed 0.19 was measured to hold beside; a test compares).

    Per weight: w = g = 2 in bf16, else 4; o = 12 (fp32 master copy and two moments), or 8 where DeepSpeed keeps no
    master copy (stage 0 in fp32); `ema` adds 4 to o. With n workers: stage 0 w + g + o; 1 w + g + o/n; 2 w + (g + o)/n;
    3 (w + g + o)/n. ZeRO adds a bucket of gradients, w bytes for each of `engine.BUCKET` weights, or of all if fewer;
    stage 3 keeps tensors of up to 1e5 weights whole. `offload` moves o/n to the host, with fp32 gradients (4/n). Stages
    1 and 2 then keep there, not on the GPU, the gradients of the share, and w/n to send back, and the largest tensor
    once at each end. Activations, batches and libraries come on top.

    Args:
        sizes: weights in each tensor of the model.
    """
    count = sum(sizes)
    w = g = 2 if bf16 else 4
    o = (12 if zero_stage or bf16 else 8) + (4 if ema else 0)
    if zero_stage == 0:
        return State(float(count * (w + g + o)), 0.0)
    whole = sum(size for size in sizes if size <= PERSISTENT)
    device = {
        1: count * (w + g),
        2: count * (w + g / workers),
        3: count * (w + g) / workers + whole * w,
    }[zero_stage] + min(BUCKET, count) * w
    if not offload:
        return State(device + count * o / workers, 0.0)
    host = count * (o + 4) / workers
    if zero_stage == 3:
        return State(device, host)
    kept = g / workers if zero_stage == 2 else 0
    return State(device - count * kept + max(sizes) * w, host + count * w / workers + max(sizes) * w)


def most_tokens(config: RunConfig) -> Counts:
    """Tokens of a subject that fills all slices and frames, at the lowest acceleration."""
    data, sampling, model = config.data, config.sampling, config.model
    lines, r = data.matrix[0], min(sampling.accelerations)
    kept, _ = sampling.budget(lines, r)
    if r == 1:
        kept = lines
    elif sampling.family == "kt-gaussian-acs":
        kept = min(lines, kept + sampling.acs_lines)
    sampled = data.slices * data.frames * kept
    hidden = round(config.reconstruct.mask_ratio * sampled)
    patches = data.slices * data.frames * lines * data.matrix[1] // (model.patch[0] * model.patch[1] * model.patch[2])
    hidden_patches = round(config.reconstruct.image_mask_ratio * patches)
    return Counts(sampled - hidden, hidden, sampled, patches - hidden_patches, hidden_patches, patches)


def activation_bytes(config: RunConfig, n: Counts) -> float:
    """Bytes that the forward pass of a micro-batch keeps on one worker, of the stage that keeps most.

    With width d and MLP ratio r a block keeps (9 + 2 r) d numbers a token: input and output of both norms, queries,
    keys, values, what attention gave, twice (it is copied for the next product), and the MLP's hidden layer before and
    after its activation (Korthikanti et al. 2022, equation 2, without attention matrices, which the fused kernel never
    writes, and dropout). In a decoder's block (7 + 2 r) d a query and 4 d a token of its memory. With
    `model.checkpointing` an encoder's block keeps d a token, and one block is whole at a time. Embedding and head of
    lines keep the `RANK` maps that their gates mix; pooling a one-hot code, tokens x frames. Numbers are 2 bytes in
    bf16, else 4; losses are fp32.

    Args:
        n: tokens of each subject, padding included.
    """
    data, model = config.data, config.model
    subjects = data.global_batch // config.train.workers // config.train.accumulation
    width, inner, r = model.width, model.decoder_width, model.mlp_ratio
    line, patch = LineTokenizer.features(data, model), PatchTokenizer.features(model)
    cells, patch_cells = data.slices * data.frames, data.slices * data.frames // model.patch[0]
    size = 2 if config.train.bf16 else 4

    def encoder(tokens: int, frames: int, features: int, embedded: int) -> int:
        block = (9 + 2 * r) * width
        blocks = model.depth * width + block if model.checkpointing else model.depth * block
        return size * (tokens * (features + embedded + blocks + 2 * width + frames) + frames * (block + 2 * width))

    def decoder(queries: int, tokens: int, features: int, mixed: int) -> int:
        block = queries * (7 + 2 * r) * inner + tokens * 4 * inner
        read = tokens * width + queries * (width + 2 * inner + mixed)
        return size * (model.decoder_depth * block + read) + 4 * queries * features

    kspace = encoder(n.visible, cells, line, RANK * width)
    kspace += decoder(n.hidden, n.visible + cells, line, RANK * line)
    image = encoder(n.visible_patches, patch_cells, patch, 0)
    image += decoder(n.hidden_patches, n.visible_patches + patch_cells, patch, 0)
    image *= config.reconstruct.image_weight > 0
    trained = config.align.train_image_encoder
    aligned = encoder(n.sampled, cells, line, RANK * width)
    aligned += (kspace + image * trained) * (config.align.reconstruct_weight > 0)
    aligned += encoder(n.patches, patch_cells, patch, 0) * trained
    stages = [kspace + image] * (config.reconstruct_steps > 0) + [aligned] * (config.align_steps > 0)
    return float(subjects * max(stages))
