"""Where the time of a training step goes: one clock that always stands on some part of it.

The clock is moved by whoever runs a step, by hooks at the encoders and decoders, in the backward pass by hooks at their
outputs, and by every collective of torch.distributed. On a GPU it waits for the device at each turn, so that a measured
step is slower than an undisturbed one: shares count, not sums. (torch.profiler knows no part of the backward pass but
by such hooks, and not how long a collective is waited for.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kmtr.data.loader.batch import Batch
from kmtr.model.encoder import Decoder, Encoded, Encoder
from kmtr.tasks import Inputs, Preparer, Stage
from kmtr.train.step import Engine

PARTS = {
    "data": "waiting for the next batch",
    "patterns + FFT": "copy to the device, undersampling, hiding, images, normalised tokens",
    "encoders": "both, forward and backward",
    "decoders": "both, forward and backward",
    "contrastive": "similarities over the global batch, forward and backward",
    "optimizer": "clipping and AdamW of this worker's share",
    "communication": "all collectives, with waiting for slower workers",
    "rest": "losses, heads, logged means",
}

COLLECTIVES = (
    "allreduce",
    "allreduce_coalesced",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "_allgather_base",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor_coalesced",
    "_reduce_scatter_base",
    "broadcast",
    "barrier",
    "all_gather_single",
    "all_gather_single_coalesced",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
)


class Clock:
    """Seconds of each part so far."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.part, self.mark = "rest", time.perf_counter()

    def start(self) -> None:
        self.mark = self._now()

    def __call__(self, part: str) -> None:
        """From now on it is `part`."""
        now = self._now()
        self.seconds[self.part] += now - self.mark
        self.part, self.mark = part, now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@contextmanager
def watched(clock: Clock, module: nn.Module) -> Iterator[None]:
    """Encoders and decoders of a `tasks.Model` and all collectives turn the clock."""
    handles = []
    for child in module.modules():
        if not isinstance(child, Encoder | Decoder):
            continue
        part = "encoders" if isinstance(child, Encoder) else "decoders"

        def enter(_: nn.Module, __: Any, part: str = part) -> None:
            clock(part)

        def leave(_: nn.Module, __: Any, out: Any, part: str = part) -> None:
            _at_backward(out, partial(clock, part))
            clock("rest")

        handles += [child.register_forward_pre_hook(enter), child.register_forward_hook(leave)]
    originals = {name: vars(ProcessGroup)[name] for name in COLLECTIVES if name in vars(ProcessGroup)}
    for name, original in originals.items():
        setattr(ProcessGroup, name, _waiting(original, clock))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(ProcessGroup, name, original)
        for handle in handles:
            handle.remove()


def _waiting(collective: Callable[..., Any], clock: Clock) -> Callable[..., Any]:
    """A collective that is over when it returns, on the clock."""

    def call(*args: Any, **settings: Any) -> Any:
        before = clock.part
        clock("communication")
        work = collective(*args, **settings)
        if work is not None:
            work.wait()
        clock(before)
        return work

    return call


def _at_backward(out: Any, turn: Callable[[], None]) -> None:
    """Call `turn` when the backward pass reaches a part of the model by this output of it."""

    def reached(_: Tensor) -> None:
        turn()

    for tensor in (out.vectors, out.tokens) if isinstance(out, Encoded) else (out,):
        if tensor.requires_grad:
            tensor.register_hook(reached)


class Announced(Preparer):
    """A preparer that tells `on` what begins: a step asks for the readout before it copies a batch to the device."""

    on: Callable[[str], None] = staticmethod(lambda part: None)

    def readout(self, stage: Stage) -> int | None:
        self.on("patterns + FFT")
        return super().readout(stage)

    def __call__(self, batch: Batch, stage: Stage) -> Inputs:
        self.on("patterns + FFT")
        inputs = super().__call__(batch, stage)
        self.on("rest")
        return inputs


class OnTheClock:
    """A training engine that turns the clock between its verbs."""

    def __init__(self, engine: Engine, clock: Clock):
        self.engine, self.clock = engine, clock

    def __call__(self, inputs: Inputs, predict: bool = False) -> dict[str, dict[str, Tensor]]:
        self.clock("rest")
        out = self.engine(inputs, predict)
        self.clock("contrastive" if "align" in out else "rest")  # what comes between embedding and backward
        return out

    def backward(self, loss: Tensor) -> None:
        self.clock("rest")
        self.engine.backward(loss)
        self.clock("rest")

    def update(self, rates: Mapping[str, float]) -> bool:
        self.clock("optimizer")
        applied = self.engine.update(rates)
        self.clock("rest")
        return applied
