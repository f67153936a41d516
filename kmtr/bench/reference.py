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
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kmtr.config import Model, RunConfig
from kmtr.model.encoder import Grid, Position
from kmtr.model.tokenizers import LineTokenizer, PatchTokenizer, Tokens
from kmtr.physics.cycle import static_dynamic
from kmtr.tasks import Inputs
from kmtr.tasks.losses import masked_reconstruction
from kmtr.tasks.pretraining import Pretraining
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
    """Called as `objectives.Pretraining`, with the same terms."""

    def __init__(self, config: RunConfig, positions: Positions, widening: float):
        super().__init__()
        data, model = config.data, config.model
        self.config, self.positions = config, positions
        self.kspace = Autoencoder(Grid.lines(data), LineTokenizer.features(data, model), model, widening)
        widths: tuple[int, ...] = (model.width, 2 * model.width)
        if config.has_image_encoder:
            self.image = Autoencoder(Grid.patches(data, model), PatchTokenizer.features(model), model, widening)
            widths *= 2
        self.heads = nn.ModuleList(nn.Linear(width, model.projection) for width in widths)

    def forward(self, inputs: Inputs, stage: str) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        loss = self.config.masked.kspace_loss
        aligned, frozen = stage == "align", stage == "align" and not self.config.align.train_image_encoder
        if not aligned or self.config.align.masked_weight:
            out["kspace"] = self._reconstruct(self.kspace, inputs.lines, inputs.line_targets, self.positions, loss)
        if inputs.patches and inputs.patch_targets and self.config.masked.image_weight and not frozen:
            out["image"] = self._reconstruct(self.image, inputs.patches, inputs.patch_targets, "all")
        if aligned and inputs.all_lines is not None:
            every = Padded.of(inputs.all_lines)
            parts = list(static_dynamic(self.kspace.pooled(self.kspace.encode(every), every), inputs.absent))
            if inputs.all_patches is not None:
                shown = Padded.of(inputs.all_patches)
                with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                    patches = self.image.pooled(self.image.encode(shown), shown)
                parts += static_dynamic(patches, inputs.absent_patches)
            z = [head(x) for head, x in zip(self.heads, parts, strict=True)]
            out["z"] = torch.stack(z if inputs.clean is None else [*z, *inputs.clean.unbind(2)], dim=2)
        return out

    def _reconstruct(
        self,
        model: Autoencoder,
        seen: Tokens,
        asked: Tokens,
        positions: Positions,
        loss: Literal["mse", "l1", "hdr"] = "mse",
    ) -> Float[Tensor, " batch"]:
        visible, targets = Padded.of(seen), Padded.of(asked)
        values = model.decode(model.encode(visible), visible, targets, positions)[~targets.padded]
        return masked_reconstruction(values, asked.values, asked.lengths.counts, loss, asked.blank)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def our_parameters(config: RunConfig) -> int:
    with torch.device("meta"):
        return count(Pretraining(config))


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
