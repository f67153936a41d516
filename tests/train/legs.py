"""Legs of runs on the real DeepSpeed and the real data path, each in fresh engines, without Ray.

A module, since spawned processes import what they run.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import processes
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from kmtr.config import RunConfig, from_json
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import pipeline, planning
from kmtr.tasks import Model, Preparer
from kmtr.train import checkpoint
from kmtr.train.checkpoint import Progress
from kmtr.train.engine import ShardedEngine
from kmtr.train.step import TrainingStep
from kmtr.types import KmtrError

CPU = torch.device("cpu")
Steps = list[dict[str, float]]


@dataclass(frozen=True)
class Leg:
    """Part of a run between two starts of its processes.

    Attributes:
        name: of the file with what its steps logged.
        config: as JSON.
        start, stop: steps.
        source: checkpoint that it goes on from; empty: initial weights of `seed`.
        target: folder of the checkpoint at its end; empty: none is written.
        seed: of the initial weights, another at each restart: what is not restored shows.
        poisoned: step whose gradient is NaN under a finite loss, on the last worker.
    """

    name: str
    config: str
    start: int
    stop: int
    source: str = ""
    target: str = ""
    seed: int = 0
    poisoned: int = -1


def drive(leg: Leg, tables: dict[str, Tensor], rank: int, world: int) -> Steps:
    config = from_json(leg.config)
    dataset = Dataset.open(config.data)
    reader, plan = dataset.reader("train", config.data), planning.plan_of(config, dataset)
    torch.manual_seed(leg.seed)
    engine = ShardedEngine(Model(config), config, world, CPU)
    progress = Progress(step=leg.start)
    if leg.source:
        progress = checkpoint.verify(Path(leg.source), engine.shapes(), config, rank, world)
        checkpoint.restore(Path(leg.source), engine)
    assert progress.step == leg.start
    step = TrainingStep(config, engine, Preparer(config, tables, CPU), CPU, world)
    sound = engine.backward
    values: Steps = []
    try:
        steps = range(leg.start, leg.stop)
        batches = pipeline.batches(config, reader, plan, steps, rank, world, step.prepare.wanted)
        for number, host in zip(steps, batches, strict=True):
            bad = number == leg.poisoned and rank == world - 1
            engine.backward = (lambda loss: sound(loss + (loss * 0).sqrt())) if bad else sound  # type: ignore[method-assign]
            report = step(number, host)
            kept = {name: value for name, value in report.means.items() if "top1" not in name}  # whole subjects
            values.append(kept | {"gradient_norm": engine.gradient_norm(), "applied": float(report.applied)})
            progress.step = number + 1
            progress.skipped += not report.applied
    except KmtrError as error:
        return [*values, {"refused": 1.0 if "gradient is not finite although its loss is" in str(error) else 0.0}]
    finally:
        if leg.target:
            write(leg, engine, progress, config, rank, world)
        engine.wrapped.destroy()
    return values


def write(leg: Leg, engine: ShardedEngine, progress: Progress, config: RunConfig, rank: int, world: int) -> None:
    """A checkpoint as Ray Train brings it together: each worker's part is made in a folder of its own."""
    with tempfile.TemporaryDirectory() as part:
        checkpoint.save(Path(part), engine, progress, config, rank, world)
        shutil.copytree(part, leg.target, dirs_exist_ok=True)
    dist.barrier()


def work(rank: int, world: int, folder: str, legs: Sequence[Leg]) -> None:
    """All legs of so many workers; the first writes ``<name>.json``."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    meeting = f"file://{folder}/rendezvous-{legs[0].name}-{world}"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=world)
    tables = load_file(Path(folder) / "tables.safetensors")
    tables["static_mean"] = torch.view_as_complex(tables["static_mean"])
    for leg in legs:
        values = drive(leg, tables, rank, world)
        if rank == 0:
            (Path(folder) / f"{leg.name}.json").write_text(json.dumps(values))
    dist.destroy_process_group()


def run(folder: Path, world: int, legs: Sequence[Leg]) -> dict[str, Steps]:
    """Name -> what each step logged, over all workers."""
    processes.run(work, world, world, str(folder), list(legs))
    return {leg.name: json.loads((folder / f"{leg.name}.json").read_text()) for leg in legs}


def keep(tables: dict[str, Tensor], folder: Path) -> None:
    """Write the statistics that the legs of a folder read."""
    real = {name: torch.view_as_real(t) if t.is_complex() else t for name, t in tables.items()}
    save_file({name: t.contiguous() for name, t in real.items()}, folder / "tables.safetensors")


def spread(steps: Steps, others: Steps, names: Sequence[str] = ()) -> float:
    """Largest relative difference of logged values, of those names or of all; numbers under 1e-3 count as 1e-3."""
    worst = 0.0
    for one, other in zip(steps, others, strict=True):
        for name, value in one.items():
            if not names or name in names:
                worst = max(worst, abs(value - other[name]) / max(abs(other[name]), 1e-3))
    return worst
