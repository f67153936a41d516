"""Exponential moving average of the weights: what is validated and exported where `optimizer.ema` is on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Average:
    """Moving average of the fp32 weights that this worker updates; no worker needs another's.

    With decay d, after t updates it is ``sum_i d^(t-i) w_i / sum_i d^(t-i)`` over i = 1 ... t: the bias correction of
    Adam (Kingma 2015), so that the initial weights have no share in it. Memory: 4 bytes a weight, divided among the
    workers and placed (GPU, or host with `train.offload`) as AdamW's state is; under ZeRO-0 whole on each worker.

    Args:
        weights: of this worker, fp32; copied.
        decay: per update, 0 < decay < 1.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float):
        self.decay, self.updates = decay, 0
        self.values = [w.detach().clone() for w in weights]

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor]) -> None:
        """Take in the weights after a step, the same tensors in the same order as at the beginning."""
        self.updates += 1
        share = (1 - self.decay) / (1 - self.decay**self.updates)
        torch._foreach_lerp_(self.values, [w.detach() for w in weights], share)

    @torch.no_grad()
    def exchange(self, weights: Sequence[Tensor]) -> None:
        """Swap contents with `weights`, one tensor at a time; twice changes nothing."""
        for value, weight in zip(self.values, weights, strict=True):
            kept = weight.detach().clone()
            weight.detach().copy_(value)
            value.copy_(kept)
