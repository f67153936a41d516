"""One of two processes with the real DeepSpeed: averages, offload and memory in every ZeRO stage.

A module, since spawned processes import what they run.
"""

from __future__ import annotations

import gc
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kmtr.config import RunConfig, from_json, override
from kmtr.train.engine import ShardedEngine

CPU = torch.device("cpu")
WIDTH, STEPS, DECAY = 400, 3, 0.9
CASES: dict[str, dict[str, Any]] = {
    f"zero{stage}-{'bf16' if bf16 else 'fp32'}{'-offload' if offload else ''}": {
        "train.zero_stage": stage,
        "train.bf16": bf16,
        "train.offload": offload,
    }
    for stage, bf16, offload in (
        *((stage, bf16, False) for stage in range(4) for bf16 in (False, True)),
        (1, False, True),
        (1, True, True),
        (2, True, True),
        (3, False, True),
        (3, True, True),
    )
}


class Net(nn.Module):
    """Matrices that ZeRO-3 shards (above 1e5 weights), vectors that it keeps whole, and the names that groups go by."""

    def __init__(self) -> None:
        super().__init__()
        kspace = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.systems = nn.ModuleDict({"kspace": kspace, "image": nn.Linear(WIDTH, WIDTH)})

    def forward(self, inputs: Tensor, predict: bool = False) -> dict[str, Tensor]:
        last = self.systems["image"]
        return {"y": last(self.systems["kspace"](inputs.to(last.weight.dtype)))}


SIZES = [p.numel() for p in Net().parameters()]


def tensors() -> list[Tensor]:
    """All tensors of this process, gradients included."""
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    return found + [t.grad for t in found if t.is_leaf and t.grad is not None]


def storages(of: list[Tensor]) -> dict[int, int]:
    """Storage -> its bytes."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in of}


def settled(before: list[Tensor]) -> int:
    """Bytes held besides those tensors, which must be kept: what an engine that has ended left may go at any time.

    The least of three readings: a reduction's thread may let its buffer go a moment after it has ended.
    """
    readings = []
    for _ in range(3):
        now = storages(tensors())
        readings.append(sum(now[s] for s in now.keys() - storages(before).keys()))
        time.sleep(0.05)
    return min(readings)


def built(config: RunConfig, world: int) -> ShardedEngine:
    torch.manual_seed(0)
    return ShardedEngine(Net(), config, world, CPU)


def step(engine: ShardedEngine, number: int, rank: int, before: list[Tensor] | None = None) -> int:
    """One step of two micro-batches on data of its own; most bytes held after a backward pass, where asked for."""
    most = 0
    for micro in range(2):
        generator = torch.Generator().manual_seed(100 * number + 10 * micro + rank)
        engine.backward(engine(torch.randn(1, WIDTH, generator=generator))["y"].float().square().mean())
        most = 0 if before is None else max(most, settled(before))
    engine.update(dict.fromkeys(("kspace", "image", "heads.align"), 1e-2))
    return most


def weights(engine: ShardedEngine) -> dict[str, Tensor]:
    """Whole fp32 weights of the encoder, as AdamW updates them; all workers must call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, weight in engine.wrapped.module.systems["kspace"].named_parameters():
        whole = safe_get_full_fp32_param(weight) if engine.held.stage else weight
        found[name] = whole.detach().clone()
    return found


def outputs(engine: ShardedEngine) -> Tensor:
    """What the engine computes with the weights that it has now."""
    with torch.no_grad():
        return engine(torch.eye(WIDTH), predict=True)["y"].float()


def case(config: RunConfig, rank: int, world: int) -> dict[str, Any]:
    """Facts of one case, each to be judged by the test."""
    before = tensors()
    plain = built(config, world)
    trajectory: list[dict[str, Tensor]] = []
    for number in range(STEPS):
        measured = step(plain, number, rank, before if number == STEPS - 1 else None)
        measured -= sum(w.nbytes for weights in trajectory for w in weights.values())
        trajectory.append(weights(plain))
    last = outputs(plain)
    plain.wrapped.destroy()
    averaging = override(config, {"optimizer.ema": DECAY})
    engine = built(averaging, world)
    for number in range(STEPS):
        step(engine, number, rank)
    with engine.averaged():
        average, inside = weights(engine), outputs(engine)
    after = weights(engine)
    shares = [DECAY ** (STEPS - 1 - i) for i in range(STEPS)]
    closed = {
        name: sum(share * w[name].double() for share, w in zip(shares, trajectory, strict=True)) / sum(shares)
        for name in average
    }
    same_outputs = torch.equal(outputs(engine), last)
    engine.wrapped.destroy()
    return {
        "bytes": measured,
        "off_by": max(float((average[k] - closed[k]).abs().max()) for k in closed),
        "moved": max(float((trajectory[-1][k] - closed[k]).abs().max()) for k in closed),
        "undisturbed": all(torch.equal(after[k], trajectory[-1][k]) for k in after) and same_outputs,
        "used": float((inside - last).abs().max()),
        "last": float(last.double().norm()),
    }


def work(rank: int, world: int, folder: str, text: str) -> None:
    """All cases, written by each worker to ``<rank>.json``."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    os.environ["TORCH_EXTENSIONS_DIR"] = f"{folder}/compiled"
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    base = from_json(text)
    built(base, world).wrapped.destroy()
    gc.collect()
    gc.freeze()  # what the libraries hold for ever need not be looked through in `settled`
    found = {}
    for name, changes in CASES.items():
        found[name] = case(override(base, changes), rank, world)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
