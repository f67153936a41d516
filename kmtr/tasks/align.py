"""Alignment: InfoNCE between the embeddings of undersampled k-space and of the fully sampled image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.tasks.base import Engine, Step, Sums, gather, share, weigh, world
from kmtr.tasks.inputs import Preparer
from kmtr.tasks.losses import info_nce


def step(engine: Engine, micro: Sequence[Batch], prepare: Preparer, config: RunConfig) -> Step:
    """Alignment: InfoNCE over the global batch on static and dynamic embeddings per slice, beside the masked loss.

    The negatives are the whole global batch at any number of workers and micro-batches: embeddings come first (with
    several micro-batches without a graph, as GradCache does), the loss gives their gradients, then each micro-batch
    passes its gradient on through ``sum(z * dz)``. Memory per worker grows with local x global.
    """
    total = Sums()
    inputs = [prepare(batch, "align") for batch in micro]
    with torch.set_grad_enabled(len(micro) == 1):
        outs = [engine(x, "align") for x in inputs]
    z = torch.cat([out["z"] for out in outs])
    learnt = outs[0].get("temperature")
    temperature = None if learnt is None else learnt.detach().requires_grad_()
    present = ~torch.cat([x.absent for x in inputs]).all(-1) & ~torch.cat([b.repeated for b in micro])[:, None]
    key = torch.cat([batch.key for batch in micro])
    leaf = z.detach().float().requires_grad_()
    contrast = contrastive(leaf, present, key, config, total, temperature)
    dz, *rest = torch.autograd.grad(contrast, [leaf] if temperature is None else [leaf, temperature])
    weight = config.align.masked_weight
    first = 0
    for i, batch in enumerate(micro):
        out = outs[0] if len(micro) == 1 else engine(inputs[i], "align")
        rows = slice(first, first + len(batch))
        first += len(batch)
        loss = (out["z"].float() * dz[rows]).sum() * world() * len(micro)
        if rest:
            loss = loss + out["temperature"] * rest[0] * world()  # each micro-batch passes on its share of one gradient
        if "kspace" in out:
            total.add("kspace_loss", out["kspace"], ~batch.repeated)
            kept = weigh(out, {"kspace": weight, "image": weight * config.masked.image_weight})
            loss = loss + (kept * ~batch.repeated).sum() * share(batch, len(micro))
        engine.backward(loss)
    return total.step()


def contrastive(
    z: Float[Tensor, "batch slice 4 channel"],
    present: Bool[Tensor, "batch slice"],
    key: Int[Tensor, " batch"],
    config: RunConfig,
    total: Sums,
    temperature: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """This worker's part of the symmetric global InfoNCE: summed over workers it is the one-process loss.

    Args:
        temperature: that is learnt; None: `align.temperature`.
    """
    everything, everyone = gather(z), gather(key)
    everywhere = gather(present.to(torch.uint8)).bool()
    rank = dist.get_rank() if dist.is_initialized() else 0
    positive = torch.arange(len(z), device=z.device) + rank * len(z)
    same = key[:, None] == everyone[None, :]
    same[torch.arange(len(z), device=z.device), positive] = False
    excluded = same[None] | ~everywhere.T[:, None, :]
    anchors = everywhere.sum().clamp(min=1)
    loss = z.new_zeros(())
    for i, part in enumerate(("static", "dynamic")):
        weight = config.align.static_weight if part == "static" else config.align.dynamic_weight
        for anchor, candidate in ((i, i + 2), (i + 2, i)):
            contrast = info_nce(
                z[:, :, anchor].transpose(0, 1),
                everything[:, :, candidate].transpose(0, 1),
                positive,
                excluded.masked_fill(~present.T[..., None], False),
                config.align.temperature if temperature is None else temperature,
                config.align.chunk,
            )
            counted = contrast.loss.masked_fill(~present.T, 0.0)
            total.add(f"infonce_{part}", counted, present.T)
            total.add(f"top1_{part}", contrast.nearest, present.T)
            total.add(f"margin_{part}", contrast.margin, present.T)
            loss = loss + weight * counted.sum() / (2 * anchors)
    rivals = (~excluded).sum(-1)
    total.add("top1_chance", 1 / rivals.clamp(min=1), present.T)
    if temperature is not None:
        total.add("temperature", temperature, torch.ones_like(temperature))
    return loss
