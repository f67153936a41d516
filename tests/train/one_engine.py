"""One of two processes with the real DeepSpeed: averages, offload and memory in every ZeRO stage.

A module, since spawned processes import what they run.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kmtr.config import RunConfig, from_json, override
from kmtr.train import checkpoint
from kmtr.train.engine import ShardedEngine

CPU = torch.device("cpu")
WIDTH, STEPS, SAVED, DECAY = 400, 3, 2, 0.9
CASES: dict[str, dict[str, Any]] = {
    f"zero{stage}-{'bf16' if bf16 else 'fp32'}{'-offload' if offload else ''}": {
        "train.zero_stage": stage,
        "train.bf16": bf16,
        "train.offload": offload,
    }
    for stage, bf16, offload in (
        *((stage, bf16, False) for stage in range(4) for bf16 in (False, True)),
        (1, False, True),
        (2, True, True),
        (3, False, True),
    )
}


class Net(nn.Module):
    """Matrices that ZeRO-3 shards (above 1e5 weights), vectors that it keeps whole, and the names that groups go by."""

    def __init__(self) -> None:
        super().__init__()
        self.kspace_encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.image_encoder = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor, stage: str) -> dict[str, Tensor]:
        return {"y": self.image_encoder(self.kspace_encoder(inputs.to(self.image_encoder.weight.dtype)))}


SIZES = [p.numel() for p in Net().parameters()]


def held() -> int:
    """Bytes of all tensors of this process, gradients included; a storage counts once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def settled() -> int:
    """The least of three readings of `held`: a reduction's thread may let its buffer go a moment after it has ended."""
    readings = [held()]
    for _ in range(2):
        time.sleep(0.05)
        readings.append(held())
    return min(readings)


def built(config: RunConfig, world: int) -> ShardedEngine:
    torch.manual_seed(0)
    return ShardedEngine(Net(), config, world, CPU)


def step(engine: ShardedEngine, number: int, rank: int, measure: bool = False) -> int:
    """One step of two micro-batches on data of its own; most bytes held after a backward pass, where asked for."""
    most = 0
    for micro in range(2):
        generator = torch.Generator().manual_seed(100 * number + 10 * micro + rank)
        engine.backward(engine(torch.randn(1, WIDTH, generator=generator), "reconstruct")["y"].float().square().mean())
        most = max(most, settled()) if measure else 0
    engine.update(dict.fromkeys(("kspace", "image", "heads"), 1e-2))
    return most


def outputs(engine: ShardedEngine) -> Tensor:
    """What the engine computes with the weights that it has now."""
    with torch.no_grad():
        return engine(torch.eye(WIDTH), "predict")["y"].float()


def case(config: RunConfig, folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Facts of one case, each to be judged by the test."""
    before = held()
    plain = built(config, world)
    trajectory: list[dict[str, Tensor]] = []
    for number in range(STEPS):
        measured = step(plain, number, rank, measure=number == STEPS - 1) - before
        measured -= sum(w.nbytes for weights in trajectory for w in weights.values())
        trajectory.append(plain.weights("kspace_encoder"))
    last = outputs(plain)
    plain.wrapped.destroy()
    averaging = override(config, {"optimizer.ema": DECAY})
    engine = built(averaging, world)
    for number in range(STEPS):
        if number == SAVED:
            progress: dict[str, Any] = {"step": number}
            mine = folder / f"worker{rank}"
            checkpoint.save(mine, engine, averaging, {}, progress, rank, world)
            shutil.copytree(mine, folder, dirs_exist_ok=True)  # as Ray Train brings the parts together
            dist.barrier()
        step(engine, number, rank)
    with engine.averaged():
        average, inside = engine.weights("kspace_encoder"), outputs(engine)
    after = engine.weights("kspace_encoder")
    shares = [DECAY ** (STEPS - 1 - i) for i in range(STEPS)]
    closed = {
        name: sum(share * w[name].double() for share, w in zip(shares, trajectory, strict=True)) / sum(shares)
        for name in average
    }
    same_outputs = torch.equal(outputs(engine), last)
    engine.wrapped.destroy()

    again = built(averaging, world)
    restored = checkpoint.restore(folder, again, averaging, rank, world)
    for number in range(restored["step"], STEPS):
        step(again, number, rank)
    with again.averaged():
        restarted = again.weights("kspace_encoder")
        restarted_inside = outputs(again)
    again.wrapped.destroy()
    return {
        "bytes": measured,
        "off_by": max(float((average[k] - closed[k]).abs().max()) for k in closed),
        "moved": max(float((trajectory[-1][k] - closed[k]).abs().max()) for k in closed),
        "undisturbed": all(torch.equal(after[k], trajectory[-1][k]) for k in after) and same_outputs,
        "used": float((inside - last).abs().max()),
        "restart_equal": all(torch.equal(average[k], restarted[k]) for k in average)
        and torch.equal(inside, restarted_inside),
        "last": float(last.double().norm()),
    }


def work(rank: int, world: int, folder: str, text: str) -> None:
    """All cases, written by each worker to ``<rank>.json``."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    base = from_json(text)
    built(base, world).wrapped.destroy()
    gc.collect()
    gc.freeze()  # what the libraries hold for ever need not be looked through in `held`
    found = {}
    for name, changes in CASES.items():
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        (place / f"worker{rank}").mkdir()
        found[name] = case(override(base, changes), place, rank, world)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
