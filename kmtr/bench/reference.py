"""Reference of `bench.py step`: the model at the settings of github.com/Yundi-Zhang/ViTa, written plainly.

fp32; an autoencoder per domain whose encoder sees the visible tokens and whose decoder runs over ALL positions, with a
mask token where nothing was visible; attention as softmax(Q K^T / sqrt(205)) V with the whole matrix in memory; heads
of 205 channels (1025 / 5); two subjects in a batch. Tokens, losses, alignment and data are ours; depth and widths are
the recipe's, with as many heads as come nearest to the width, and MLPs as wide as bring the number of parameters to
that of our model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kmtr.config import Model, RunConfig
from kmtr.model.encoder import Grid, Position
from kmtr.model.tokenizers import LineTokenizer, PatchTokenizer, Tokens
from kmtr.physics.cycle import static_dynamic
from kmtr.systems import Reading
from kmtr.tasks import Inputs, tasks_of
from kmtr.tasks import Model as Ours
from kmtr.tasks.base import LOSS
from kmtr.tasks.losses import masked_reconstruction
from kmtr.tasks.masked import Asked
from kmtr.types import InputError

HEAD = 205
BATCH = 2
TOLERANCE = 0.05
"""Parameters may differ from our model's by this share."""

Positions = Literal["all", "acquired"]
"""Positions that the decoder of lines runs over: every (slice, t, ky), or only those that were acquired."""


@dataclass(frozen=True)
class Padded:
    """Tokens of each subject, filled up to the most that one of the batch has."""

    values: Float[Tensor, "batch token feature"]
    index: Int[Tensor, "batch token axis"]
    padded: Bool[Tensor, "batch token"]

    @staticmethod
    def of(tokens: Tokens) -> Padded:
        most = max(1, *tokens.lengths.host)
        there = torch.arange(most, device=tokens.index.device) < tokens.lengths.counts[:, None]

        def spread(x: Tensor) -> Tensor:
            return x.new_zeros(*there.shape, x.shape[-1]).masked_scatter(there[..., None], x)

        return Padded(spread(tokens.values), spread(tokens.index), ~there)


class Attention(nn.Module):
    """Self-attention with its matrix ``batch head token token`` in memory."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, round(width / HEAD))
        self.qkv = nn.Linear(width, 3 * self.heads * HEAD)
        self.out = nn.Linear(self.heads * HEAD, width)

    def forward(
        self, x: Float[Tensor, "batch token channel"], padded: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token channel"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, HEAD)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(HEAD)).masked_fill(padded[:, None, None], -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm x), x + MLP(norm x)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self, x: Float[Tensor, "batch token channel"], padded: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token channel"]:
        x = x + self.attention(self.norm_attention(x), padded)
        return x + self.mlp(self.norm_mlp(x))


class Autoencoder(nn.Module):
    """Masked autoencoder (He 2022) of one domain.

    Args:
        widening: of the MLPs, against `model.mlp_ratio`.
    """

    def __init__(self, grid: Grid, features: int, model: Model, widening: float):
        super().__init__()

        def blocks(width: int, depth: int) -> nn.ModuleList:
            hidden = max(1, round(widening * model.mlp_ratio * width))
            return nn.ModuleList(Block(width, hidden) for _ in range(depth))

        self.frames = grid.shape
        self.sizes = (*grid.shape, *map(len, grid.places))
        self.embed = nn.Linear(features, model.width)
        self.position = Position(grid, model.width)
        self.blocks = blocks(model.width, model.depth)
        self.norm = nn.LayerNorm(model.width)
        self.to_decoder = nn.Linear(model.width, model.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(model.decoder_width))
        self.decoder_position = Position(grid, model.decoder_width)
        self.decoder_blocks = blocks(model.decoder_width, model.decoder_depth)
        self.decoder_norm = nn.LayerNorm(model.decoder_width)
        self.head = nn.Linear(model.decoder_width, features)

    def encode(self, tokens: Padded) -> Float[Tensor, "batch token channel"]:
        x = self.embed(tokens.values) + self.position(tokens.index)
        for block in self.blocks:
            x = block(x, tokens.padded)
        return self.norm(x)

    def decode(self, encoded: Tensor, visible: Padded, targets: Padded, positions: Positions) -> Tensor:
        """Predictions at the targets, ``batch target feature``."""
        x = self.to_decoder(encoded)
        if positions == "all":
            x, index = self._on_grid(x, visible)
            padded = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        else:
            x = torch.cat([x, self.mask_token.expand(*targets.padded.shape, -1)], dim=1)
            index = torch.cat([visible.index, targets.index], dim=1)
            padded = torch.cat([visible.padded, targets.padded], dim=1)
        x = x + self.decoder_position(index)
        for block in self.decoder_blocks:
            x = block(x, padded)
        x = self.head(self.decoder_norm(x))
        if positions == "acquired":
            return x[:, visible.index.shape[1] :]
        row = torch.arange(len(x), device=x.device)[:, None]
        return x[row, self._flat(targets.index)]

    def _on_grid(self, x: Tensor, visible: Padded) -> tuple[Tensor, Tensor]:
        """Visible tokens at their places in the whole grid, mask tokens elsewhere; and the index of every place."""
        size = math.prod(self.sizes)
        place = self._flat(visible.index).masked_fill(visible.padded, size)  # padding goes where nobody looks
        grid = self.mask_token.expand(len(x), size + 1, -1).clone()
        grid[torch.arange(len(x), device=x.device)[:, None], place] = x
        axes = torch.meshgrid(*(torch.arange(n, device=x.device) for n in self.sizes), indexing="ij")
        return grid[:, :-1], torch.stack(axes, dim=-1).flatten(0, -2).expand(len(x), -1, -1)

    def _flat(self, index: Int[Tensor, "batch token axis"]) -> Int[Tensor, "batch token"]:
        flat = index[..., 0]
        for axis, size in enumerate(self.sizes[1:], 1):
            flat = flat * size + index[..., axis]
        return flat

    def pooled(self, encoded: Tensor, tokens: Padded) -> Float[Tensor, "batch slice t channel"]:
        """Mean of the tokens of each slice and frame."""
        slices, frames = self.frames
        cell = (tokens.index[..., 0] * frames + tokens.index[..., 1])[..., None]
        seen = (~tokens.padded).to(encoded.dtype)[..., None]
        empty = encoded.new_zeros(len(encoded), slices * frames, encoded.shape[-1])
        total = empty.scatter_add(1, cell.expand(encoded.shape), encoded * seen)
        count = empty[..., :1].scatter_add(1, cell, seen)
        return (total / count.clamp(min=1)).unflatten(1, (slices, frames))


class Reference(nn.Module):
    """Called as `tasks.Model`, with the same terms."""

    def __init__(self, config: RunConfig, positions: Positions, widening: float):
        super().__init__()
        data, model = config.data, config.model
        self.config, self.positions = config, positions
        # Named as the parts of our model, since learning rates go by these names.
        self.systems = nn.ModuleDict()
        self.systems["kspace"] = Autoencoder(Grid.lines(data), LineTokenizer.features(data, model), model, widening)
        tasks = tasks_of(config)
        widths: tuple[int, ...] = (model.width, 2 * model.width) if "align" in tasks else ()
        if "image" in {name for task in tasks.values() for name in task.systems}:
            features = PatchTokenizer.features(model)
            self.systems["image"] = Autoencoder(Grid.patches(data, model), features, model, widening)
        if config.align.teacher == "encoder":
            widths *= 2
        projections = nn.ModuleList(nn.Linear(width, model.projection) for width in widths)
        self.heads = nn.ModuleDict({"align": projections})

    def forward(self, inputs: Inputs, predict: bool = False) -> dict[str, dict[str, Tensor]]:
        out: dict[str, dict[str, Tensor]] = {}
        if asked := inputs.tasks.get("masked"):
            out["masked"] = self._reconstruct("kspace", asked, self.positions, self.config.masked.kspace_loss)
        if asked := inputs.tasks.get("masked_images"):
            out["masked_images"] = self._reconstruct("image", asked, "all")
        if asked := inputs.tasks.get("align"):
            parts, absent = self._parts(asked.lines)
            components = asked.teacher.system == "components"
            if not components:
                parts += self._parts(asked.teacher)[0]
            heads: Any = self.heads["align"]
            z = [head(x) for head, x in zip(heads, parts, strict=True)]
            z += asked.teacher.arguments[0].unbind(2) if components else []
            out["align"] = {"z": torch.stack(z, dim=2), "present": ~absent.all(-1)}
        return out

    def _parts(self, reading: Reading) -> tuple[list[Tensor], Tensor]:
        """Static and dynamic part of what an encoder makes of all tokens; (slice, t) without data."""
        (tokens,), _, absent, *_ = reading.arguments
        model: Any = self.systems[reading.system]
        every = Padded.of(tokens)
        with torch.set_grad_enabled(torch.is_grad_enabled() and reading.learns):
            return list(static_dynamic(model.pooled(model.encode(every), every), absent)), absent

    def _reconstruct(
        self,
        system: str,
        asked: Asked,
        positions: Positions,
        kind: Literal["mse", "l1", "hdr"] = "mse",
    ) -> dict[str, Tensor]:
        model: Any = self.systems[system]
        wanted, (seen,) = asked.targets, asked.shown.arguments[0]
        visible, targets = Padded.of(seen), Padded.of(wanted)
        values = model.decode(model.encode(visible), visible, targets, positions)[~targets.padded]
        return {LOSS: masked_reconstruction(values, wanted.values, wanted.lengths.counts, kind, wanted.blank)}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def our_parameters(config: RunConfig) -> int:
    with torch.device("meta"):
        return count(Ours(config))


def widening_of(config: RunConfig) -> float:
    """Width of the reference's MLPs over `model.mlp_ratio`, at the parameters of our model.

    Raises:
        InputError: no width brings it there: heads of 205 channels alone are larger than the model.
    """

    def parameters(widening: float) -> int:
        with torch.device("meta"):
            return count(Reference(config, "all", widening))

    wanted, least = our_parameters(config), parameters(0.0)
    widening = max(0.0, (wanted - least) / (parameters(1.0) - least))
    found = parameters(widening)
    if abs(found - wanted) > TOLERANCE * wanted:
        raise InputError(
            f"model.width: expected a model that heads of {HEAD} channels fit into, within 5 % of its "
            f"{wanted} parameters, got {found}; measure a wider or deeper one"
        )
    return widening
