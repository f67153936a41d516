"""Encoders of both domains and the decoders of masked pretraining: one architecture, two kinds of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kmtr.config import Data, Model
from kmtr.model.packing import Lengths, Places, indices, join
from kmtr.model.tokenizers import LineTokenizer, PatchTokenizer, Tokens
from kmtr.model.transformer import Block, GatedLinear, sincos
from kmtr.physics.cycle import static_dynamic


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

    def forward(self, index: Int[Tensor, "*token axis"]) -> Float[Tensor, "*token channel"]:
        """Code of each index; axes beyond those given (frame vectors have no place) stay zero."""
        parts = [getattr(self, f"table{i}")[index[..., i]] for i in range(index.shape[-1])]
        code = torch.cat(parts, dim=-1).to(self.view.weight.dtype)  # whether or not the engine cast the tables
        view = self.view(self.get_buffer("view_of_slice")[index[..., 0]])
        return nn.functional.pad(code, (0, view.shape[-1] - code.shape[-1])) + view


@dataclass(frozen=True)
class Encoded:
    """Output of an encoder per subject: its tokens, and one vector per slice and temporal position that is there.

    Attributes:
        lengths: of the tokens.
        cells: (slice, t) of the vectors.
        absent: (slice, t) without one.
        low: what the encoder saw at low resolution (`tokenizers.Centre`), zero where absent; None: it saw none.
    """

    tokens: Float[Tensor, "token channel"]
    lengths: Lengths
    vectors: Float[Tensor, "cell channel"]
    cells: Places
    absent: Bool[Tensor, "batch slice t"]
    low: Float[Tensor, "batch slice t pixel"] | None = None

    @property
    def frames(self) -> Float[Tensor, "batch slice t channel"]:
        """The vectors on their grid, zeros where absent."""
        if self.absent.numel() == len(self.vectors):
            return self.vectors.unflatten(0, self.absent.shape)
        empty = self.vectors.new_zeros(*self.absent.shape, self.vectors.shape[-1])
        return empty.masked_scatter(~self.absent[..., None], self.vectors)

    @property
    def vector(self) -> Float[Tensor, "batch channel"]:
        """Static and dynamic part of every slice of the configuration, fp32, of the vectors and of what was seen at low
        resolution: the embedding of a subject.
        """
        parts = [*static_dynamic(self.frames, self.absent)]
        if self.low is not None:
            parts += static_dynamic(self.low, self.absent)
        return torch.cat(parts, dim=-1).flatten(1)

    def vector_of(self, places: Places, span: int = 1) -> Int[Tensor, " token"]:
        """Index of the vector at the slice and time of each of these places.

        Args:
            span: steps of the places' time that one vector covers.
        """
        number = (~self.absent).flatten().cumsum(0) - 1
        slices, times = self.absent.shape[1:]
        return number[(places.lengths.subject * slices + places.index[:, 0]) * times + places.index[:, 1] // span]


def on_grid(
    absent: Bool[Tensor, "batch slot frame"], slots: Sequence[int], shape: tuple[int, int]
) -> Bool[Tensor, "batch slice t"]:
    """The (slice, t) without data on the whole grid of frame vectors, for a batch of fewer slices or frames.

    Args:
        slots: slice of the grid that each slice of the batch is.
        shape: of the grid.
    """
    whole = absent.new_ones(len(absent), *shape)
    whole[:, indices(slots, absent.device), : absent.shape[2]] = absent
    return whole


class Encoder(nn.Module):
    """Tokens -> transformer -> mean per (slice, t) -> one block over those frame vectors.

    Pooling everything into one mean would lose the motion, so (slice, t) is kept.

    Args:
        vocabularies: grid and embedding of each kind of tokens that it reads.
        grid: of the frame vectors; that of the first kind where not given. A token that spans several of its frames
            counts in each; of several kinds, each kind's mean weighs the same, however many tokens it has.
        low: pixels of an image of low resolution that the frame vectors see; 0: none.
    """

    def __init__(
        self, vocabularies: Sequence[tuple[Grid, nn.Module]], model: Model, grid: Grid | None = None, low: int = 0
    ):
        super().__init__()
        width, heads = model.width, model.width // model.head_width
        grids = [each for each, _ in vocabularies]
        grid = grids[0] if grid is None else grid
        self.grid_shape, self.checkpointing = grid.shape, model.checkpointing
        self.spans = [len(grid.frames) // len(each.frames) for each in grids]
        grids += [grid] if grid not in grids else []
        self.frame_position = grids.index(grid)
        self.rates = [model.drop_path * i / max(model.depth - 1, 1) for i in range(model.depth)]
        self.embed = nn.ModuleList(embed for _, embed in vocabularies)
        self.position = nn.ModuleList(Position(each, width) for each in grids)
        self.blocks = nn.ModuleList(Block(width, heads, model.mlp_ratio) for _ in range(model.depth))
        self.norm = nn.LayerNorm(width)
        self.frame_block = Block(width, heads, model.mlp_ratio)
        self.frame_norm = nn.LayerNorm(width)
        self.low = nn.Linear(low, width) if low else None

    def forward(
        self,
        kinds: Sequence[Tokens],
        cells: Places,
        absent: Bool[Tensor, "batch slice t"],
        draws: Float[Tensor, "batch block 2"] | None = None,
        low: Float[Tensor, "batch slice t pixel"] | None = None,
    ) -> Encoded:
        """
        Args:
            kinds: tokens of each vocabulary.
            cells: (slice, t) that hold data; those that are not `absent`.
            draws: uniform numbers for stochastic depth (Huang 2016): a subject leaves out a block's attention or MLP
                where its number is below the block's rate, and the rest grows by as much. None: nothing is left out.
            low: on the grid of the frame vectors, if the encoder sees any.
        """
        embedded = [
            (embed(tokens.values, tokens.index) + position(tokens.index), tokens.lengths)
            for tokens, embed, position in zip(kinds, self.embed, self.position, strict=False)
        ]
        x, lengths, places = join(embedded)
        for number, block in enumerate(self.blocks):
            scale = None
            if draws is not None and (rate := self.rates[number]):
                scale = ((draws[:, number] >= rate) / (1 - rate)).to(x.dtype)[lengths.subject]
            if self.checkpointing and torch.is_grad_enabled():
                # The reentrant kind would end a weight's gradient twice where an encoder runs twice in a step (ZeRO-3).
                x = checkpoint(block, x, lengths, scale=scale, use_reentrant=False)
            else:
                x = block(x, lengths, scale=scale)
        x = self.norm(x)
        means = [
            self._pool(x if len(kinds) == 1 else x[place], tokens, span, cells)
            for tokens, place, span in zip(kinds, places, self.spans, strict=True)
        ]
        pooled = (sum(means[1:], means[0]) / len(means)).to(x.dtype)
        if self.low is not None and low is not None:
            pooled = pooled + self.low(low.flatten(0, 2)[cells.cell(self.grid_shape)].to(x.dtype))
        vectors = self.frame_block(pooled + self.position[self.frame_position](cells.index), cells.lengths)
        return Encoded(x, lengths, self.frame_norm(vectors), cells, absent, low)

    def _pool(
        self, x: Float[Tensor, "token channel"], tokens: Tokens, span: int, cells: Places
    ) -> Float[Tensor, "cell channel"]:
        """Mean of the tokens in each cell, in fp32; zero where there are none.

        Args:
            span: frames that a token's temporal position covers.
        """
        slices, frames = self.grid_shape
        size = len(tokens.lengths.host) * slices * frames
        first = tokens.cell((slices, frames // span)) * span
        total, count = x.new_zeros(size, x.shape[-1], dtype=torch.float32), x.new_zeros(size, dtype=torch.float32)
        for offset in range(span):
            cell = (first + offset,)
            # Not index_add: its order of summation, and so the last bit, is left to chance on a GPU.
            total = total.index_put(cell, x.float(), accumulate=True)
            count = count.index_put(cell, count.new_ones(()), accumulate=True)
        mean = total / count.clamp(min=1)[:, None]
        return mean if cells.lengths.total == size else mean[cells.cell(self.grid_shape)]


class LineEmbed(nn.Module):
    """Linear map of a line, different along ky."""

    def __init__(self, features: int, lines: int, width: int):
        super().__init__()
        self.linear = GatedLinear(features, width, lines)

    def forward(self, values: Float[Tensor, "token feature"], index: Int[Tensor, "token axis"]) -> Tensor:
        return self.linear(values.to(self.linear.gate.dtype), index[..., -1])


class PatchEmbed(nn.Module):
    """Linear map of an image patch."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.linear = nn.Linear(features, width)

    def forward(self, values: Float[Tensor, "token feature"], index: Int[Tensor, "token axis"]) -> Tensor:
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

    def forward(self, encoded: Encoded, asked: Places) -> Float[Tensor, "token feature"]:
        """Contents of the tokens at the places that are asked for."""
        memory, sources, _ = join([(encoded.tokens, encoded.lengths), (encoded.vectors, encoded.cells.lengths)])
        memory = self.memory(memory)
        x = self.position(asked.index) + self.query(encoded.vectors)[encoded.vector_of(asked)]
        for block in self.blocks:
            x = block(x, asked.lengths, memory, sources)
        return self.head(self.norm(x), asked.index)


class LineHead(nn.Module):
    """Decoder output of a line."""

    def __init__(self, width: int, features: int, lines: int):
        super().__init__()
        self.linear = GatedLinear(width, features, lines)

    def forward(self, x: Tensor, index: Int[Tensor, "token axis"]) -> Float[Tensor, "token feature"]:
        return self.linear(x, index[..., -1])


class PatchHead(nn.Module):
    """Decoder output of an image patch."""

    def __init__(self, width: int, features: int):
        super().__init__()
        self.linear = nn.Linear(width, features)

    def forward(self, x: Tensor, index: Int[Tensor, "token axis"]) -> Float[Tensor, "token feature"]:
        return self.linear(x)


def line_encoder(data: Data, model: Model) -> Encoder:
    """The k-space encoder: of lines, of patches of zero-filled images, or of both (`model.encoder_inputs`)."""
    lines, patches = Grid.lines(data), Grid.patches(data, model)
    vocabularies: list[tuple[Grid, nn.Module]] = []
    if model.encoder_inputs != "zerofilled":
        vocabularies.append((lines, LineEmbed(LineTokenizer.features(data, model), data.matrix[0], model.width)))
    if model.encoder_inputs != "kspace":
        vocabularies.append((patches, PatchEmbed(PatchTokenizer.features(model), model.width)))
    return Encoder(vocabularies, model, lines, model.centre**2)


def patch_encoder(data: Data, model: Model) -> Encoder:
    return Encoder([(Grid.patches(data, model), PatchEmbed(PatchTokenizer.features(model), model.width))], model)


def line_decoder(data: Data, model: Model) -> Decoder:
    features = LineTokenizer.features(data, model)
    return Decoder(Grid.lines(data), LineHead(model.decoder_width, features, data.matrix[0]), model)


def patch_decoder(data: Data, model: Model) -> Decoder:
    head = PatchHead(model.decoder_width, PatchTokenizer.features(model))
    return Decoder(Grid.patches(data, model), head, model)
