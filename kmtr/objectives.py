"""What pretraining minimises: masked reconstruction in both domains (stage b) and alignment of the two (stage c).

A stage is a function of an engine and the micro-batches of one step. It runs forward and backward so that the gradient
is that of the mean over the GLOBAL batch, however it is divided over workers and micro-batches, and returns what to
log. The engine is anything with ``engine(inputs)`` and ``engine.backward(loss)`` that averages gradients over workers
and accumulated micro-batches, as DeepSpeed's does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kmtr.config import MIN_TEMPERATURE, RunConfig
from kmtr.data.batch import Batch
from kmtr.losses import info_nce, masked_reconstruction
from kmtr.model.encoder import (
    Encoded,
    line_decoder,
    line_encoder,
    patch_decoder,
    patch_encoder,
)
from kmtr.model.packing import Lengths, Places
from kmtr.model.packing import gather as gather_places
from kmtr.model.teacher import Components
from kmtr.model.tokenizers import LineTokenizer, PatchTokenizer, Tokens, encoder_inputs
from kmtr.model.transformer import Block
from kmtr.physics import random
from kmtr.physics.cycle import SIDE, static_dynamic
from kmtr.physics.lines import CENTRE


@runtime_checkable
class Engine(Protocol):
    def __call__(self, inputs: Inputs, stage: str) -> dict[str, Tensor]: ...

    def backward(self, loss: Tensor) -> Any: ...


@dataclass(frozen=True)
class Inputs:
    """One micro-batch as the model sees it, made in fp32 outside the engine.

    Attributes:
        lines, line_targets: visible lines and those to predict; the visible ones never depend on any other.
        patches, patch_targets: visible and hidden image patches; None where only lines are asked for.
        all_lines, all_patches: everything acquired, for alignment; None in stage b.
        zerofilled, all_zerofilled: patches of what `lines` and `all_lines` show, where the k-space encoder reads them.
        cells, patch_cells: frame slots that hold data, in the frames of either domain.
        absent, absent_patches: those that do not.
        clean: static and dynamic components of the clean image, where they are alignment's teacher.
        draws: uniform numbers for stochastic depth, of `PASSES`; None: nothing is left out.
    """

    lines: Tokens
    line_targets: Tokens
    patches: Tokens | None
    patch_targets: Tokens | None
    all_lines: Tokens | None
    all_patches: Tokens | None
    cells: Places
    patch_cells: Places
    absent: Bool[Tensor, "batch slice t"]
    absent_patches: Bool[Tensor, "batch slice pt"]
    clean: Float[Tensor, "batch slice part channel"] | None = None
    draws: Float[Tensor, "batch pass block 2"] | None = None
    zerofilled: Tokens | None = None
    all_zerofilled: Tokens | None = None


PASSES = ("lines", "patches", "all_lines", "all_patches")
"""Tokens that an encoder reads; each pass draws its own depth."""


class Preparer:
    """Batch -> Inputs: undersampling, images, hiding and normalisation, on the batch's device, without gradient."""

    def __init__(self, config: RunConfig, tables: dict[str, Tensor], device: torch.device):
        self.config = config
        self.lines = LineTokenizer(config.data, config.model, tables, device)
        self.patches = PatchTokenizer(config.data, config.model, tables, device)
        self.components = Components(tables, device) if config.has_components else None

    def readout(self, stage: str) -> int | None:
        """Central kx samples of a batch that a stage looks at; None: all, since it needs images."""
        if self.reads_images(stage) or self.config.model.encoder_inputs != "kspace":
            return None
        return max(self.lines.samples, CENTRE, SIDE if stage == "align" else 0)

    def reads_images(self, stage: str) -> bool:
        """Whether an encoder reads clean images in this stage."""
        config = self.config
        if stage == "align" and (config.align.teacher == "encoder" or config.align.train_image_encoder):
            return True
        return bool(config.reconstruct.image_weight) and (stage != "align" or config.align.train_image_encoder)

    @torch.no_grad()
    def __call__(self, batch: Batch, stage: str) -> Inputs:
        seen, visible = batch.sampled, batch.sampled & ~batch.hidden
        absent_patches = batch.padded.unflatten(2, (-1, self.config.model.patch[0])).all(-1)
        present = self.patches.present(batch)
        shown, withheld = present & ~batch.hidden_patches, present & batch.hidden_patches
        absent = self.on_grid(batch.padded, batch.slots)
        absent_patches = self.on_grid(absent_patches, batch.slots, self.config.model.patch[0])
        chosen = [visible, batch.targets, seen, shown, withheld, present, ~absent, ~absent_patches]
        many = Lengths.of(chosen)  # all at once: each question makes the host wait for the device
        both, imaged = stage == "align", self.config.model.encoder_inputs != "kspace"
        patches = patch_targets = all_patches = None
        if self.reads_images(stage):
            images = self.patches.images(batch)
            frozen = both and not self.config.align.train_image_encoder
            if self.config.reconstruct.image_weight and not frozen:
                patches = self.patches(batch, images, shown, many[3])
                patch_targets = self.patches(batch, images, withheld, many[4])
            if both:
                all_patches = self.patches(batch, images, present, many[5])
        known = batch.acquired if self.config.reconstruct.target == "all" else seen
        return Inputs(
            lines=self.lines(batch, known=visible, chosen=visible, lengths=many[0]),
            line_targets=self.lines(batch, known=known, chosen=batch.targets, visible=visible, lengths=many[1]),
            patches=patches,
            patch_targets=patch_targets,
            all_lines=self.lines(batch, known=seen, chosen=seen, lengths=many[2]) if both else None,
            all_patches=all_patches,
            cells=gather_places(~absent, many[6]),
            patch_cells=gather_places(~absent_patches, many[7]),
            absent=absent,
            absent_patches=absent_patches,
            clean=self.components(batch) if both and self.components else None,
            draws=self.draws(batch),
            zerofilled=self.patches.zerofilled(batch, visible, many[5]) if imaged else None,
            all_zerofilled=self.patches.zerofilled(batch, seen, many[5]) if imaged and both else None,
        )

    def draws(self, batch: Batch) -> Float[Tensor, "batch pass block 2"] | None:
        """Uniform numbers of (seed, visit, subject), so that neither workers nor recomputation change them."""
        model = self.config.model
        if batch.visit is None or not model.drop_path:
            return None
        shape = (len(PASSES), model.depth, 2)
        return random.uniform(self.config.seed, batch.visit, batch.key, random.DEPTH, shape)

    def on_grid(self, absent: Bool[Tensor, "batch slice t"], slots: tuple[int, ...], every: int = 1) -> Tensor:
        """Which (slice, t) of the configuration's grid of frame vectors hold no data, bool ``batch slice t``."""
        whole = absent.new_ones(len(absent), self.config.data.slices, self.config.data.frames // every)
        whole[:, torch.tensor(slots, device=absent.device), : absent.shape[2]] = absent
        return whole

    @torch.no_grad()
    def queries(self, batch: Batch, queried: Bool[Tensor, "batch slice t ky"] | None = None) -> Inputs:
        """All acquired lines as input; as targets the positions to predict (their values are of no use)."""
        seen = batch.sampled
        lines = self.lines(batch, known=seen, chosen=seen)
        targets = lines if queried is None else self.lines(batch, known=seen, chosen=queried)
        absent = self.on_grid(batch.padded, batch.slots)
        cells = gather_places(~absent)
        zerofilled = None if self.config.model.encoder_inputs == "kspace" else self.patches.zerofilled(batch, seen)
        return Inputs(lines, targets, None, None, None, None, cells, cells, absent, absent, zerofilled=zerofilled)


class Pretraining(nn.Module):
    """Both encoders, both decoders and the projections of alignment: one module, so that one engine
    holds both stages.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        data, model = config.data, config.model
        self.config = config
        self.kspace_encoder = line_encoder(data, model)
        self.kspace_decoder = line_decoder(data, model)
        if config.has_image_encoder:
            self.image_encoder = patch_encoder(data, model)
            self.image_decoder = patch_decoder(data, model)
        width = {"static": model.width, "dynamic": 2 * model.width}
        if config.align.learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor([math.log(config.align.temperature - MIN_TEMPERATURE)]))
        self.kspace_heads = nn.ModuleDict({part: nn.Linear(w, model.projection) for part, w in width.items()})
        if config.has_image_encoder:
            self.image_heads = nn.ModuleDict({part: nn.Linear(w, model.projection) for part, w in width.items()})
        if config.train.compile:
            for module in self.modules():
                if isinstance(module, Block):
                    module.compiled()

    def forward(self, inputs: Inputs, stage: str) -> dict[str, Tensor]:
        """Per-subject losses ``kspace`` and ``image`` ``batch``; in stage c also ``z`` ``batch slice 4 channel``, and
        the ``temperature`` where it is learnt.

        z stacks (k-space static, k-space dynamic, image static, image dynamic), not yet normalised. Two stages of no
        loss: ``embed`` gives the ``embedding`` ``batch feature`` of `lines`, ``predict`` the ``values`` at
        `line_targets`. All goes through here, since ZeRO-3 gathers weights around an engine's call.
        """
        out: dict[str, Tensor] = {}
        if stage in ("embed", "predict"):
            encoded = self._encode(inputs, "lines")
            if stage == "embed":
                return {"embedding": torch.cat(static_dynamic(encoded.frames, encoded.absent), -1).flatten(1)}
            return {"values": self.kspace_decoder(encoded, inputs.line_targets)}
        loss = self.config.reconstruct.kspace_loss
        aligned, frozen = stage == "align", stage == "align" and not self.config.align.train_image_encoder
        if not aligned or self.config.align.reconstruct_weight:
            targets = inputs.line_targets
            predicted = self.kspace_decoder(self._encode(inputs, "lines"), targets)
            out["kspace"] = masked_reconstruction(
                predicted, targets.values, targets.lengths.counts, loss, targets.blank
            )
        if inputs.patches and inputs.patch_targets and self.config.reconstruct.image_weight and not frozen:
            targets = inputs.patch_targets
            predicted = self.image_decoder(self._encode(inputs, "patches"), targets)
            out["image"] = masked_reconstruction(predicted, targets.values, targets.lengths.counts)
        if aligned and inputs.all_lines is not None:
            z = self._project(self._encode(inputs, "all_lines"), self.kspace_heads)
            if inputs.clean is not None:
                z += list(inputs.clean.to(z[0].dtype).unbind(2))
            else:
                with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                    patches = self._encode(inputs, "all_patches", whole=frozen)
                z += self._project(patches, self.image_heads)
            out["z"] = torch.stack(z, dim=2)
            if self.config.align.learn_temperature:
                # Learnt as a logarithm, as in CLIP (Radford 2021), above a floor that never stops its gradient.
                out["temperature"] = MIN_TEMPERATURE + self.log_temperature[0].float().exp()
        return out

    @staticmethod
    def _project(encoded: Encoded, heads: nn.ModuleDict) -> list[Tensor]:
        """Projections of the static and the dynamic part, each ``batch slice channel``."""
        parts = static_dynamic(encoded.frames, encoded.absent)
        pairs = zip((heads["static"], heads["dynamic"]), parts, strict=True)
        return [head(x.to(encoded.vectors.dtype)) for head, x in pairs]

    def _encode(self, inputs: Inputs, kind: str, whole: bool = False) -> Encoded:
        """What the encoder of its domain makes of one of `PASSES`; `whole`: at full depth."""
        lines = kind.endswith("lines")
        encoder = self.kspace_encoder if lines else self.image_encoder
        cells = (inputs.cells, inputs.absent) if lines else (inputs.patch_cells, inputs.absent_patches)
        draws = None if inputs.draws is None or whole else inputs.draws[:, PASSES.index(kind)]
        tokens = getattr(inputs, kind)
        shown = inputs.all_zerofilled if kind == "all_lines" else inputs.zerofilled
        read = encoder_inputs(self.config.model, tokens, shown) if lines else [tokens]
        encoded: Encoded = encoder(read, *cells, draws)
        return encoded


@dataclass(frozen=True)
class Step:
    """What a step minimised: names as they are logged -> sum over this worker's subjects (or anchors),
    and their count.
    """

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]


def reconstruct(engine: Engine, micro: Sequence[Batch], prepare: Preparer, config: RunConfig) -> Step:
    """Stage b: loss on hidden lines plus `image_weight` times that on hidden patches."""
    total = _Sums()
    for batch in micro:
        out = engine(prepare(batch, "reconstruct"), "reconstruct")
        loss = _weigh(out, {"kspace": 1.0, "image": config.reconstruct.image_weight})
        real = ~batch.repeated
        total.add("kspace_loss", out["kspace"], real)
        if "image" in out:
            total.add("image_loss", out["image"], real)
        total.add("loss", loss, real)
        engine.backward((loss * real).sum() * _share(batch, len(micro)))
    return total.step()


def align(engine: Engine, micro: Sequence[Batch], prepare: Preparer, config: RunConfig) -> Step:
    """Stage c: InfoNCE over the global batch on static and dynamic embeddings per slice, and stage b's loss kept.

    The negatives are the whole global batch at any number of workers and micro-batches: embeddings come first (with
    several micro-batches without a graph, as GradCache does), the loss gives their gradients, then each micro-batch
    passes its gradient on through ``sum(z * dz)``. Memory per worker grows with local x global.
    """
    total = _Sums()
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
    weight = config.align.reconstruct_weight
    first = 0
    for i, batch in enumerate(micro):
        out = outs[0] if len(micro) == 1 else engine(inputs[i], "align")
        rows = slice(first, first + len(batch))
        first += len(batch)
        loss = (out["z"].float() * dz[rows]).sum() * _world() * len(micro)
        if rest:
            loss = (
                loss + out["temperature"] * rest[0] * _world()
            )  # each micro-batch passes on its share of one gradient
        if "kspace" in out:
            total.add("kspace_loss", out["kspace"], ~batch.repeated)
            kept = _weigh(out, {"kspace": weight, "image": weight * config.reconstruct.image_weight})
            loss = loss + (kept * ~batch.repeated).sum() * _share(batch, len(micro))
        engine.backward(loss)
    return total.step()


def contrastive(
    z: Float[Tensor, "batch slice 4 channel"],
    present: Bool[Tensor, "batch slice"],
    key: Int[Tensor, " batch"],
    config: RunConfig,
    total: _Sums,
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


STAGES: dict[str, Callable[[Engine, Sequence[Batch], Preparer, RunConfig], Step]] = {
    "reconstruct": reconstruct,
    "align": align,
}


class _Gather(torch.autograd.Function):
    """All workers' tensors concatenated along the first axis; its adjoint sums what every worker did with our part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous()
        dist.all_reduce(total)
        size = len(total) // dist.get_world_size()
        return total[dist.get_rank() * size : (dist.get_rank() + 1) * size]


def gather(x: Tensor) -> Tensor:
    """Rows of all workers, in rank order, with gradient."""
    return _Gather.apply(x) if _world() > 1 else x


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _share(batch: Batch, micro: int) -> float:
    """Factor from a sum over a micro-batch to the global mean, given that the engine averages over both."""
    return _world() * micro / batch.real


def _weigh(out: dict[str, Tensor], weights: dict[str, float]) -> Float[Tensor, " batch"]:
    terms = [out[name] * weight for name, weight in weights.items() if name in out]
    return torch.stack(terms).sum(0)


class _Sums:
    """Running sums and counts of what is logged."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, counted: Tensor) -> None:
        values, counted = values.detach().float(), counted.float()
        self.sums[name] = self.sums.get(name, values.new_zeros(())) + (values * counted).sum()
        self.counts[name] = self.counts.get(name, values.new_zeros(())) + counted.sum()

    def step(self) -> Step:
        return Step(self.sums, self.counts)
