"""Checkpoints: all that a restart needs, hashed by whoever wrote it, verified before DeepSpeed unpickles it.

engine/                      DeepSpeed's shards, one set per worker
encoder/                     the exported k-space encoder (safetensors + JSON), without optimizer
average-rankNN.safetensors   with optimizer.ema: moving average of that worker's weights (of all without ZeRO, once)
progress.json                step, what the guard knows, workers and ZeRO stage that wrote it
sha256-rankNN.json           hashes of the files of one worker
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from kmtr.config import RunConfig
from kmtr.encoder import export_encoder
from kmtr.train.engine import ShardedEngine
from kmtr.types import KmtrError

PROGRESS = "progress.json"


class CheckpointError(KmtrError):
    """A checkpoint that can't be used; it would be so again."""


def save(
    folder: Path,
    engine: ShardedEngine,
    config: RunConfig,
    tables: dict[str, torch.Tensor],
    progress: dict[str, Any],
    rank: int,
    world: int,
) -> None:
    """Write this worker's part of the checkpoint; `progress` is what `restore` returns, with the ``step`` in it."""
    engine.save(str(folder))
    if engine.average is not None and (rank == 0 or config.train.zero_stage):
        engine.average.save(folder / _average(rank, config))
    with engine.averaged():
        weights = engine.weights("kspace_encoder")
    if rank == 0:
        export_encoder(folder / "encoder", config, weights, tables)
        progress = progress | {"workers": world, "zero_stage": config.train.zero_stage}
        (folder / PROGRESS).write_text(json.dumps(progress))
    hashes = {str(p.relative_to(folder)): _sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / f"sha256-rank{rank:02d}.json").write_text(json.dumps(hashes))


def restore(folder: Path, engine: ShardedEngine, config: RunConfig, rank: int, world: int) -> dict[str, Any]:
    """Load a checkpoint and return its progress.

    Raises:
        CheckpointError: a file is missing or changed, or another number of workers or ZeRO stage wrote it, or one
            without the moving average that `optimizer.ema` asks for.
    """
    progress = json.loads((folder / PROGRESS).read_text())
    for key, now, setting in (
        ("workers", world, "train.workers"),
        ("zero_stage", config.train.zero_stage, "train.zero_stage"),
    ):
        if progress[key] != now:
            raise CheckpointError(
                f"{setting}: the run's checkpoint was written with {progress[key]}, got {now}; "
                f"resume with {setting}={progress[key]}, or start anew with run.fresh=true"
            )
    lists = sorted(folder.glob("sha256-rank*.json"))
    if len(lists) != world:
        raise CheckpointError(f"checkpoint: expected the files of {world} workers, got those of {len(lists)}")
    for part in lists:
        for name, digest in json.loads(part.read_text()).items():
            if not (folder / name).is_file() or _sha256(folder / name) != digest:
                raise CheckpointError(f"checkpoint at step {progress['step']}: {name} is missing or changed; refused")
    average = folder / _average(rank, config)
    if engine.average is not None and not average.is_file():
        raise CheckpointError(
            f"optimizer.ema: expected 0, since the run's checkpoint has no average, got {config.optimizer.ema}; "
            "or start anew with run.fresh=true"
        )
    engine.load(str(folder))
    if engine.average is not None:
        engine.average.load(average)
    return {"reference": {}, "stopped": False} | progress


def _average(rank: int, config: RunConfig) -> str:
    return f"average-rank{rank if config.train.zero_stage else 0:02d}.safetensors"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
