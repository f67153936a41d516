"""Compiled blocks beside eager ones, in a process of its own: the compiler can't trace what checks types under pytest.

Writes one line of JSON: the largest difference of values and gradients, and how many graphs were compiled for the first
two lengths and for the others after them.

    python tests/compiled_blocks.py [all]      self-attention, and cross-attention with checkpointing; or all
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from kmtr.model.packing import Lengths
from kmtr.model.transformer import Block

SIZES = [((5, 9, 9), (4, 6, 2)), ((7, 3), (8, 8)), ((12, 1, 4, 4), (3, 3, 3, 9)), ((2,), (40,))]


def run(block: Block, queries: Lengths, sources: Lengths, cross: bool, again: bool) -> list[Tensor]:
    """Output, and gradients of the input and of all weights."""
    generator = torch.Generator().manual_seed(0)
    x, memory = (torch.randn(n.total, 32, generator=generator).requires_grad_() for n in (queries, sources))
    scale = None if cross else torch.rand(queries.total, 2, generator=generator)
    arguments = (x, queries, memory if cross else None, sources if cross else None, scale)
    y = checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


def main() -> None:
    difference, graphs = 0.0, []
    pairs = []
    for cross in (False, True):
        torch.manual_seed(0)
        eager, fast = (Block(32, 2, 2, cross=cross) for _ in range(2))
        fast.load_state_dict(eager.state_dict())
        fast.compiled()
        pairs.append((cross, eager, fast))
    for sizes in SIZES:
        queries, sources = (Lengths(n, torch.tensor(n)) for n in sizes)
        for cross, eager, fast in pairs:
            for again in (False, True) if "all" in sys.argv else (cross,):
                results = zip(*(run(b, queries, sources, cross, again) for b in (eager, fast)), strict=True)
                difference = max(difference, *(float((a - b).abs().max() / a.abs().max()) for a, b in results))
        graphs.append(counters["stats"]["unique_graphs"])
    sys.stdout.write(json.dumps({"difference": difference, "first": graphs[1], "last": graphs[-1]}) + "\n")


if __name__ == "__main__":
    main()
