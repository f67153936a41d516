"""Encoders of both domains and the decoders of masked reconstruction: one shape, two vocabularies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kmtr.config import Data, Model
from kmtr.model.tokenizers import LineTokenizer, PatchTokenizer, Tokens
from kmtr.model.transformer import Block, GatedLinear, sincos


@dataclass(frozen=True)
class Grid:
    """Positions of a domain: which slice, frame and place a token's index means.

    Attributes:
        views: view type of every slice slot.
        frames: centre of each temporal position, in frames; both domains share this axis.
        places: per remaining axis, signed offset of each position from the centre.
    """

    views: tuple[int, ...]
    frames: tuple[float, ...]
    places: tuple[tuple[float, ...], ...]

    @staticmethod
    def lines(data: Data) -> Grid:
        ny = data.matrix[0]
        ky = tuple(float(i - ny // 2) for i in range(ny))
        return Grid(data.view_types, tuple(map(float, range(data.frames))), (ky,))

    @staticmethod
    def patches(data: Data, model: Model) -> Grid:
        pt = model.patch[0]
        frames = tuple(i * pt + (pt - 1) / 2 for i in range(data.frames // pt))
        places = tuple(
            tuple((i + 0.5) * p - n / 2 for i in range(n // p))
            for n, p in zip(data.matrix, model.patch[1:], strict=True)
        )
        return Grid(data.view_types, frames, places)

    @property
    def shape(self) -> tuple[int, int]:
        """(slices, temporal positions): the grid of frame vectors."""
        return len(self.views), len(self.frames)


class Position(nn.Module):
    """Fixed sin-cos code over (slice, t, places...) plus a learned vector per view type."""

    def __init__(self, grid: Grid, width: int):
        super().__init__()
        quarter = width // 4
        rest = width - 2 * quarter
        share = rest // len(grid.places) // 2 * 2
        widths = [quarter, quarter] + [share] * (len(grid.places) - 1) + [rest - share * (len(grid.places) - 1)]
        axes = [tuple(map(float, range(len(grid.views)))), grid.frames, *grid.places]
        self.tables = len(axes)
        for i, (positions, w) in enumerate(zip(axes, widths, strict=True)):
            code = torch.zeros(len(positions), w)
            code[:, : w // 2 * 2] = sincos(torch.tensor(positions), w // 2 * 2)
            self.register_buffer(f"table{i}", code, persistent=False)
        self.register_buffer("view_of_slice", torch.tensor(grid.views), persistent=False)
        self.view = nn.Embedding(max(grid.views) + 1, width)
        nn.init.normal_(self.view.weight, std=0.02)

    def forward(self, index: Int[Tensor, "batch token axis"]) -> Float[Tensor, "batch token channel"]:
        """Code of each index; axes beyond those given (frame vectors have no place) stay zero."""
        parts = [getattr(self, f"table{i}")[index[..., i]] for i in range(index.shape[-1])]
        code = torch.cat(parts, dim=-1).to(self.view.weight.dtype)  # whether or not the engine cast the tables
        view = self.view(self.get_buffer("view_of_slice")[index[..., 0]])
        return nn.functional.pad(code, (0, view.shape[-1] - code.shape[-1])) + view


@dataclass(frozen=True)
class Encoded:
    """What an encoder made of a subject: its tokens, and one vector per slice and temporal position."""

    tokens: Float[Tensor, "batch token channel"]
    padded: Bool[Tensor, "batch token"]
    frames: Float[Tensor, "batch slice t channel"]
    absent: Bool[Tensor, "batch slice t"]


class Encoder(nn.Module):
    """Tokens -> transformer -> mean per (slice, t) -> one block over those frame vectors.

    Pooling everything into one mean would lose the motion (METHOD's pilot), so (slice, t) is kept.
    """

    def __init__(self, grid: Grid, embed: nn.Module, model: Model):
        super().__init__()
        width, heads = model.width, model.width // model.head_width
        self.grid_shape, self.checkpointing = grid.shape, model.checkpointing
        self.embed = embed
        self.position = Position(grid, width)
        self.blocks = nn.ModuleList(Block(width, heads, model.mlp_ratio) for _ in range(model.depth))
        self.norm = nn.LayerNorm(width)
        self.frame_block = Block(width, heads, model.mlp_ratio)
        self.frame_norm = nn.LayerNorm(width)

    def forward(self, tokens: Tokens, absent: Bool[Tensor, "batch slice t"]) -> Encoded:
        x = self.embed(tokens.values, tokens.index) + self.position(tokens.index)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                # The reentrant kind would end a weight's gradient twice where an encoder runs twice in a step (ZeRO-3).
                x = checkpoint(block, x, tokens.padded, use_reentrant=False)
            else:
                x = block(x, tokens.padded)
        x = self.norm(x)
        slices, frames = self.grid_shape
        cell = tokens.index[..., 0] * frames + tokens.index[..., 1]
        seen = (~tokens.padded).to(x.dtype)
        place = nn.functional.one_hot(cell, slices * frames).to(x.dtype) * seen[..., None]
        count = place.sum(1).clamp(min=1)
        pooled = torch.einsum("blf,blc->bfc", place, x) / count[..., None]
        z, t = torch.meshgrid(
            torch.arange(slices, device=x.device), torch.arange(frames, device=x.device), indexing="ij"
        )
        where = torch.stack([z, t], dim=-1).view(1, -1, 2).expand(len(x), -1, -1)
        vectors = self.frame_block(pooled + self.position(where), absent.flatten(1))
        vectors = self.frame_norm(vectors).unflatten(1, (slices, frames))
        return Encoded(x, tokens.padded, vectors, absent)


class LineEmbed(nn.Module):
    """Linear map of a line, different along ky."""

    def __init__(self, features: int, lines: int, width: int):
        super().__init__()
        self.linear = GatedLinear(features, width, lines)

    def forward(self, values: Float[Tensor, "batch token feature"], index: Int[Tensor, "batch token axis"]) -> Tensor:
        return self.linear(values.to(self.linear.gate.dtype), index[..., -1])


class PatchEmbed(nn.Module):
    """Linear map of an image patch."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.linear = nn.Linear(features, width)

    def forward(self, values: Float[Tensor, "batch token feature"], index: Int[Tensor, "batch token axis"]) -> Tensor:
        return self.linear(values.to(self.linear.weight.dtype))


class Decoder(nn.Module):
    """Predicts token contents at queried positions: cross-attention from position codes to tokens and frame vectors."""

    def __init__(self, grid: Grid, head: nn.Module, model: Model):
        super().__init__()
        width = model.decoder_width
        self.position = Position(grid, width)
        self.memory = nn.Linear(model.width, width)
        self.query = nn.Linear(model.width, width)
        heads = width // model.head_width
        self.blocks = nn.ModuleList(
            Block(width, heads, model.mlp_ratio, cross=True) for _ in range(model.decoder_depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = head

    def forward(self, encoded: Encoded, index: Int[Tensor, "batch query axis"]) -> Float[Tensor, "batch query feature"]:
        frames = encoded.frames.flatten(1, 2)
        memory = self.memory(torch.cat([encoded.tokens, frames], dim=1))
        padded = torch.cat([encoded.padded, encoded.absent.flatten(1)], dim=1)
        row = torch.arange(len(index), device=index.device)[:, None]
        x = self.position(index) + self.query(encoded.frames[row, index[..., 0], index[..., 1]])
        for block in self.blocks:
            x = block(x, padded, memory)
        return self.head(self.norm(x), index)


class LineHead(nn.Module):
    """Decoder output of a line."""

    def __init__(self, width: int, features: int, lines: int):
        super().__init__()
        self.linear = GatedLinear(width, features, lines)

    def forward(self, x: Tensor, index: Int[Tensor, "batch token axis"]) -> Float[Tensor, "batch token feature"]:
        return self.linear(x, index[..., -1])


class PatchHead(nn.Module):
    """Decoder output of an image patch."""

    def __init__(self, width: int, features: int):
        super().__init__()
        self.linear = nn.Linear(width, features)

    def forward(self, x: Tensor, index: Int[Tensor, "batch token axis"]) -> Float[Tensor, "batch token feature"]:
        return self.linear(x)


def line_encoder(data: Data, model: Model) -> Encoder:
    features = LineTokenizer.features(data, model)
    return Encoder(Grid.lines(data), LineEmbed(features, data.matrix[0], model.width), model)


def patch_encoder(data: Data, model: Model) -> Encoder:
    return Encoder(Grid.patches(data, model), PatchEmbed(PatchTokenizer.features(model), model.width), model)


def line_decoder(data: Data, model: Model) -> Decoder:
    features = LineTokenizer.features(data, model)
    return Decoder(Grid.lines(data), LineHead(model.decoder_width, features, data.matrix[0]), model)


def patch_decoder(data: Data, model: Model) -> Decoder:
    head = PatchHead(model.decoder_width, PatchTokenizer.features(model))
    return Decoder(Grid.patches(data, model), head, model)


def static_dynamic_embedding(
    frames: Float[Tensor, "batch slice t channel"], absent: Bool[Tensor, "batch slice t"]
) -> tuple[Float[Tensor, "batch slice channel"], Float[Tensor, "batch slice channel2"]]:
    """What stays and what moves of each slice: the temporal mean, and the first cosine and sine over the cycle.

    Cine is gated: frame 0 is end-diastole, so the first harmonic holds the contraction. Computed in fp32.
    """
    present = (~absent).float()[..., None]
    x = frames.float()
    mean = (x * present).sum(2) / present.sum(2).clamp(min=1)
    deviation = (x - mean[:, :, None]) * present
    count = present.sum(2).clamp(min=1)  # frames of the cycle: a shorter series is padded at its end
    t = torch.arange(frames.shape[2], device=frames.device)
    angle = 2 * math.pi * (t + 0.5) / count
    basis = torch.stack([angle.cos(), angle.sin()], dim=-1)
    harmonic = torch.einsum("bstc,bstk->bskc", deviation, basis) * (2 / count[..., None])
    return mean, harmonic.flatten(2)
