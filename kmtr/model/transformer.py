"""Pre-norm transformer blocks, positions, and a linear map that depends on ky."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


def sincos(positions: Float[Tensor, " n"], width: int) -> Float[Tensor, "n width"]:
    """Fixed sine and cosine code (Vaswani 2017), `width` even."""
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(width // 2) / (width // 2))
    angle = positions[:, None].float() * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention of queries to memory (itself where none is given) on the fused kernel of the device."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "batch token channel"],
        memory: Float[Tensor, "batch source channel"],
        padded: Bool[Tensor, "batch source"],
    ) -> Float[Tensor, "batch token channel"]:
        batch, tokens, width = x.shape
        q = self.query(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        k, v = self.key_value(memory).view(batch, -1, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=~padded[:, None, None, :])
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """x + attention(norm x), x + MLP(norm x); with `cross`, attention reads another sequence instead of itself."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, cross: bool = False):
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.norm_memory = nn.LayerNorm(width) if cross else None
        self.attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(
        self,
        x: Float[Tensor, "batch token channel"],
        padded: Bool[Tensor, "batch source"],
        memory: Float[Tensor, "batch source channel"] | None = None,
    ) -> Float[Tensor, "batch token channel"]:
        y = self.norm_attention(x)
        source = y if memory is None or self.norm_memory is None else self.norm_memory(memory)
        x = x + self.attention(y, source, padded)
        return x + self.mlp(self.norm_mlp(x))


class GatedLinear(nn.Module):
    """A linear map per line of k-space at the cost of a few: ``sum_r gate[ky, r] (W_r x + b_r)``.

    Neighbouring lines differ in what they mean, smoothly: the gates start as low cosines of |ky|.
    """

    def __init__(self, inputs: int, outputs: int, lines: int, rank: int = 4):
        super().__init__()
        self.rank = rank
        self.linear = nn.Linear(inputs, rank * outputs)
        radius = (torch.arange(lines) - lines // 2).abs() / (lines / 2)
        self.gate = nn.Parameter(torch.cos(math.pi * radius[:, None] * torch.arange(rank)) / math.sqrt(rank))

    def forward(
        self, x: Float[Tensor, "batch token inputs"], ky: Int[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token outputs"]:
        y = self.linear(x).unflatten(-1, (self.rank, -1))
        return (self.gate[ky].to(y.dtype)[..., None, :] @ y).squeeze(-2)  # an einsum of the same takes longer on CPUs
