"""Pre-norm transformer blocks, positions, and a linear map that depends on ky."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kmtr.model.packing import Lengths, attend


def sincos(positions: Float[Tensor, " n"], width: int) -> Float[Tensor, "n width"]:
    """Fixed sine and cosine code (Vaswani 2017), `width` even."""
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(width // 2) / (width // 2))
    angle = positions[:, None].float() * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention of each subject's queries to its own memory (itself where none is given)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.attend = attend

    def forward(
        self,
        x: Float[Tensor, "token channel"],
        memory: Float[Tensor, "source channel"],
        queries: Lengths,
        sources: Lengths,
    ) -> Float[Tensor, "token channel"]:
        q = self.query(x).unflatten(-1, (self.heads, -1))
        k, v = self.key_value(memory).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return self.out(self.attend(q, k, v, queries, sources).flatten(-2))


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
        x: Float[Tensor, "token channel"],
        lengths: Lengths,
        memory: Float[Tensor, "source channel"] | None = None,
        sources: Lengths | None = None,
        scale: Float[Tensor, "token 2"] | None = None,
    ) -> Float[Tensor, "token channel"]:
        """
        Args:
            scale: of attention and MLP, for stochastic depth: 0 where a subject leaves it out.
        """
        y = self.norm_attention(x)
        source = y if memory is None or self.norm_memory is None else self.norm_memory(memory)
        y = self.attention(y, source, lengths, lengths if sources is None else sources)
        x = x + (y if scale is None else y * scale[:, :1])
        y = self.mlp(self.norm_mlp(x))
        return x + (y if scale is None else y * scale[:, 1:])

    def compiled(self) -> None:
        """From now on by torch.compile, once for all lengths; attention stays the fused kernel that it is."""
        self.attention.attend = torch.compiler.disable(attend)
        self.compile(dynamic=True)


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

    def forward(self, x: Float[Tensor, "token inputs"], ky: Int[Tensor, " token"]) -> Float[Tensor, "token outputs"]:
        y = self.linear(x).unflatten(-1, (self.rank, -1))
        return (self.gate[ky].to(y.dtype)[..., None, :] @ y).squeeze(-2)  # an einsum of the same takes longer on CPUs
