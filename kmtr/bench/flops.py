"""FLOPs of a training step: by formula from the numbers of tokens, and counted operation by operation.

A product of n x m and m x k matrices is 2 n m k FLOPs. Norms, activations, softmax, sums and FFT are not counted, nor
what activation checkpointing, repeated embedding under accumulation, or attention kernels compute a second time.
Forward and backward of a product are three products; two where one of its sides needs no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kmtr.config import RunConfig, override
from kmtr.data.loader.batch import Batch
from kmtr.model.packing import Places
from kmtr.model.tokenizers import LineTokenizer, PatchTokenizer
from kmtr.model.transformer import GatedLinear
from kmtr.systems import Reading
from kmtr.tasks import STAGES, Inputs, Model, Preparer, Stage, accumulate
from kmtr.tasks.masked import hidden_lines, hidden_patches

RANK = GatedLinear(1, 1, 2).rank
BOTH, ONE, FORWARD = 3, 2, 1
"""Products of a training step: with the gradient of both sides, of one side, of none."""


@dataclass(frozen=True)
class Counts:
    """Tokens of one subject: lines that the encoder sees, predicted ones, all acquired; so of patches; frames;
    patches that the k-space encoder reads."""

    visible: int
    targets: int
    sampled: int
    visible_patches: int
    hidden_patches: int
    patches: int
    cells: int
    patch_cells: int
    zerofilled: int


def useful(batch: Batch, config: RunConfig) -> list[Counts]:
    """Tokens of each subject, by what its batch holds."""
    present = ~batch.padded.unflatten(2, (-1, config.model.patch[0])).all(-1)
    withheld, (hidden, targets) = hidden_patches(config, batch), hidden_lines(config, batch)
    patches = present[..., None, None].expand(withheld.shape)
    kinds = (
        batch.sampled & ~hidden,
        targets,
        batch.sampled,
        patches & ~withheld,
        patches & withheld,
        patches,
        ~batch.padded,
        present,
        patches & (config.model.encoder_inputs != "kspace"),
    )
    table = torch.stack([kind.flatten(1).sum(1) for kind in kinds], dim=1)
    return [Counts(*row) for row in table.tolist()]


def executed(inputs: Inputs, config: RunConfig) -> list[Counts]:
    """Tokens computed for each subject of a micro-batch."""
    found: dict[str, Places] = {}
    lines, zerofilled = config.model.encoder_inputs != "zerofilled", config.model.encoder_inputs != "kspace"
    names = {"masked": ("visible", "targets"), "masked_images": ("visible_patches", "hidden_patches")}
    for task, (shown, targets) in names.items():
        if asked := inputs.tasks.get(task):
            found |= {shown: asked.shown.arguments[0][0], targets: asked.targets}
    if asked := inputs.tasks.get("align"):
        found["sampled"] = asked.lines.arguments[0][0]
        if asked.teacher.system == "image":
            found["patches"] = asked.teacher.arguments[0][0]
    for reading in _readings(inputs):
        if reading.system != "components":
            found["cells" if reading.system == "kspace" else "patch_cells"] = reading.arguments[1]
        if reading.system == "kspace" and zerofilled:
            found["zerofilled"] = reading.arguments[0][-1]
    if not lines:
        found = {name: places for name, places in found.items() if name not in ("visible", "sampled")}
    some = next(iter(found.values()))
    none = (0,) * len(some.lengths.host)
    table = [found[field.name].lengths.host if field.name in found else none for field in fields(Counts)]
    return [Counts(*row) for row in zip(*table, strict=True)]


def _readings(inputs: Inputs) -> list[Reading]:
    return [value for asked in inputs.tasks.values() for value in vars(asked).values() if isinstance(value, Reading)]


def formula(config: RunConfig, stage: str, n: Counts, candidates: int) -> dict[str, int]:
    """FLOPs of one subject in a step of a stage, forward and backward, by part.

    Args:
        candidates: subjects that each anchor of InfoNCE is compared with: the global batch.
    """
    data, model = config.data, config.model
    frozen = stage == "align" and not config.align.train_image_encoder
    line, patch = LineTokenizer.features(data, model), PatchTokenizer.features(model)
    grid = data.slices * data.frames

    def block(tokens: int, source: int, width: int) -> int:
        maps = 2 * model.mlp_ratio + 2  # of width x width: MLP, queries, output; keys and values are the source's
        return 2 * tokens * maps * width**2 + 4 * source * width**2 + 4 * tokens * source * width

    def encoder(kinds: list[tuple[int, int, int]], frames: int, trained: bool = True) -> int:
        """FLOPs for kinds of (features, tokens, rank of the embedding, 0 where it is not gated)."""
        width, tokens = model.width, sum(count for _, count, _ in kinds)
        first = sum(2 * count * features * max(rank, 1) * width for features, count, rank in kinds)
        rest = model.depth * block(tokens, tokens, width) + block(frames, frames, width)
        rest += sum(2 * count * rank * width for _, count, rank in kinds)
        return BOTH * rest + ONE * first if trained else FORWARD * (rest + first)

    def read(lines: int) -> list[tuple[int, int, int]]:
        """Kinds of tokens of the k-space encoder where it sees so many lines."""
        kinds = [(line, lines, RANK)] if model.encoder_inputs != "zerofilled" else []
        return kinds + ([(patch, n.zerofilled, 0)] if n.zerofilled else [])

    def decoder(features: int, tokens: int, queries: int, frames: int, gated: bool) -> int:
        width, memory = model.decoder_width, tokens + frames
        inputs = 2 * (memory + frames) * model.width * width
        head = 2 * queries * width * features * (RANK if gated else 1)
        head += 2 * queries * RANK * features if gated else 0
        return BOTH * (inputs + model.decoder_depth * block(queries, memory, width) + head)

    encoders = decoders = contrast = 0
    if stage == "masked" or config.align.masked_weight:
        encoders += encoder(read(n.visible), n.cells)
        memory = sum(count for _, count, _ in read(n.visible))
        decoders += decoder(line, memory, n.targets, n.cells, True)
        if config.masked.image_weight and not frozen:
            encoders += encoder([(patch, n.visible_patches, 0)], n.patch_cells)
            decoders += decoder(patch, n.visible_patches, n.hidden_patches, n.patch_cells, False)
    if stage == "align":
        encoders += encoder(read(n.sampled), n.cells)
        ends = [(grid, True)]
        if config.align.teacher == "encoder":
            encoders += encoder([(patch, n.patches, 0)], n.patch_cells, trained=not frozen)
            ends.append((grid // model.patch[0], not frozen))
        for frames, trained in ends:
            harmonics = 2 * frames * 2 * model.width
            heads = 2 * data.slices * 3 * model.width * model.projection
            contrast += harmonics * (ONE if trained else FORWARD) + heads * (BOTH if trained else ONE)
        contrast += 4 * BOTH * 2 * data.slices * candidates * model.projection
    return {"encoders": encoders, "decoders": decoders, "contrastive": contrast}


def counted(config: RunConfig, stage: str, batch: Batch, tables: dict[str, Tensor]) -> tuple[int, int]:
    """FLOPs of one step of one process on `batch` as one micro-batch: operation by operation, and by the formula.

    Nothing is computed: operations are counted by the shapes of tensors that have no memory. Attention is counted as
    plain products, since the backward pass of a fused kernel computes some twice.
    """
    config = override(config, {"train.compile": False})
    prepare = _Prepared(config, tables, batch, STAGES[stage](config))
    with torch.device("meta"):
        engine = _Alone(Model(config))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            accumulate(engine, [_shapes_of(batch)], prepare, STAGES[stage](config))
    subjects = [formula(config, stage, n, candidates=len(batch)) for n in executed(prepare.inputs, config)]
    return counter.get_total_flops(), sum(sum(parts.values()) for parts in subjects)


class _Prepared(Preparer):
    """The inputs of one batch, without memory, whatever it is asked for."""

    def __init__(self, config: RunConfig, tables: dict[str, Tensor], batch: Batch, stage: Stage):
        super().__init__(config, tables, batch.kspace.device)
        self.inputs = _shapes_of(super().__call__(batch, stage))

    def __call__(self, batch: Batch, stage: Stage) -> Inputs:
        return self.inputs


def _shapes_of(value: Any) -> Any:
    """The same with tensors that have no memory, in records, sequences and mappings too."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {name: _shapes_of(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_shapes_of(each) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _shapes_of(getattr(value, field.name)) for field in fields(value)})
    return value


class _Alone:
    """An engine of one process that updates nothing."""

    def __init__(self, module: Model):
        self.module = module

    def __call__(self, inputs: Inputs, predict: bool = False) -> dict[str, dict[str, Tensor]]:
        out: dict[str, dict[str, Tensor]] = self.module(inputs, predict)
        return out

    def backward(self, loss: Tensor) -> None:
        loss.backward()
