"""Alignment: InfoNCE between the embeddings of undersampled k-space and of the fully sampled image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kmtr.config import MIN_TEMPERATURE, RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.model.encoder import Encoded
from kmtr.model.packing import Pending, joint
from kmtr.physics.cycle import static_dynamic
from kmtr.systems import Reading
from kmtr.systems.components import Fixed
from kmtr.tasks.base import Encode, Given, Link, Sums, Task, gather, world
from kmtr.tasks.losses import info_nce


@dataclass(frozen=True)
class Asked:
    """Both sides of a pair: all acquired lines, and the whole image as the teacher sees it."""

    lines: Reading
    teacher: Reading


class Projections(nn.Module):
    """Maps of static and dynamic part of each side into the space of alignment, and the temperature where it is
    learnt.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        model, align = config.model, config.align
        width = {"static": model.width, "dynamic": 2 * model.width}
        if align.learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor([math.log(align.temperature - MIN_TEMPERATURE)]))
        sides = ("kspace", "image") if align.teacher == "encoder" else ("kspace",)
        self.sides = nn.ModuleDict(
            {side: nn.ModuleDict({part: nn.Linear(w, model.projection) for part, w in width.items()}) for side in sides}
        )

    def forward(self, side: str, encoded: Encoded) -> list[Tensor]:
        """Projections of the static and the dynamic part, each ``batch slice channel``."""
        heads: Any = self.sides[side]
        parts = zip(("static", "dynamic"), static_dynamic(encoded.frames, encoded.absent), strict=True)
        return [heads[part](x.to(encoded.vectors.dtype)) for part, x in parts]


class Align(Task):
    """k-space and image of a subject and slice near each other, and far from those of all other subjects.

    The negatives are the whole global batch at any number of workers and micro-batches: embeddings come first (with
    several micro-batches without a graph, as GradCache does), the loss gives their gradients, then each micro-batch
    passes its gradient on through ``sum(z * dz)``. Memory per worker grows with local x global.
    """

    name, label = "align", "contrastive"
    couples = True

    @property
    def systems(self) -> tuple[str, ...]:
        return "kspace", self.teacher

    @property
    def teacher(self) -> str:
        """The system on the image side."""
        return "image" if self.config.align.teacher == "encoder" else "components"

    def head(self) -> nn.Module:
        return Projections(self.config)

    def ask(self, batch: Batch, given: Given) -> Pending[Asked]:
        both = joint(
            {
                "lines": given.read("kspace", batch, number=2),
                "teacher": given.read(self.teacher, batch, number=3),
            }
        )
        return Pending(both.cells, lambda lengths: Asked(**both.make(lengths)))

    def forward(self, encode: Encode, head: Any, asked: Asked) -> dict[str, Tensor]:
        """``z`` ``batch slice 4 channel``, not yet normalised: (k-space static, k-space dynamic, image static, image
        dynamic); ``present`` ``batch slice``; the ``temperature`` where it is learnt.
        """
        encoded, teacher = encode(asked.lines), encode(asked.teacher)
        z = head("kspace", encoded)
        z += teacher.parts.to(z[0].dtype).unbind(2) if isinstance(teacher, Fixed) else head("image", teacher)
        out = {"z": torch.stack(z, dim=2), "present": ~encoded.absent.all(-1)}
        if self.config.align.learn_temperature:
            # Learnt as a logarithm, as in CLIP (Radford 2021), above a floor that never stops its gradient.
            out["temperature"] = MIN_TEMPERATURE + head.log_temperature[0].float().exp()
        return out

    def couple(self, outputs: Sequence[dict[str, Tensor]], micro: Sequence[Batch], log: Sums) -> Link:
        z = torch.cat([out["z"] for out in outputs])
        learnt = outputs[0].get("temperature")
        temperature = None if learnt is None else learnt.detach().requires_grad_()
        repeated, key = torch.cat([b.repeated for b in micro]), torch.cat([b.key for b in micro])
        present = torch.cat([out["present"] for out in outputs]) & ~repeated[:, None]
        leaf = z.detach().float().requires_grad_()
        contrast = contrastive(leaf, present, key, self.config, log, temperature)
        dz, *rest = torch.autograd.grad(contrast, [leaf] if temperature is None else [leaf, temperature])
        parts = dz.split([len(batch) for batch in micro])

        def link(number: int, out: dict[str, Tensor]) -> Tensor:
            loss = (out["z"].float() * parts[number]).sum() * world() * len(micro)
            if rest:
                loss = loss + out["temperature"] * rest[0] * world()  # its share of one gradient
            return loss

        return link


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
