"""One of several processes that compute the same steps; a module, since spawned processes import what they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import processes
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from kmtr.config import RunConfig, from_json, override, to_json
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import planning
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.collate import collate
from kmtr.tasks import STAGES, Inputs, Model, Preparer, Step, accumulate

CPU = torch.device("cpu")


class PlainEngine:
    """What tasks ask of an engine: gradients are averaged over micro-batches, here, and workers, in `average`."""

    def __init__(self, module: Model, micro: int):
        self.module, self.micro = module, micro

    def __call__(self, inputs: Inputs, predict: bool = False) -> dict[str, dict[str, Tensor]]:
        return self.module(inputs, predict)

    def backward(self, loss: Tensor) -> Any:
        (loss / self.micro).backward()

    def average(self, world: int) -> dict[str, Tensor]:
        named = dict(self.module.named_parameters())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in named.values()]
        flat = torch.cat([g.flatten() for g in gradients])
        if world > 1:
            dist.all_reduce(flat)
        parts = (flat / world).split([g.numel() for g in gradients])
        return {name: part.view(g.shape) for name, part, g in zip(named, parts, gradients, strict=True)}


def step(config: RunConfig, stage: str, batch: Batch, micro: int, tables: dict[str, Tensor], world: int) -> dict:
    """Gradients of one step, and means of what is logged, over all workers."""
    torch.manual_seed(0)
    engine = PlainEngine(Model(config), micro)
    size = len(batch) // micro
    parts = [batch[i : i + size] for i in range(0, len(batch), size)]
    logged: Step = accumulate(engine, parts, Preparer(config, tables, CPU), STAGES[stage](config))
    gradients = engine.average(world)
    both = torch.stack([torch.stack([logged.sums[name], logged.counts[name]]) for name in logged.sums])
    if world > 1:
        dist.all_reduce(both)
    return gradients | {f"logged.{name}": total / count for name, (total, count) in zip(logged.sums, both, strict=True)}


def work(rank: int, world: int, folder: str, cases: list[tuple[str, int, dict[str, Any]]]) -> None:
    """All cases (stage, micro-batches, changes); the first worker writes ``<world>-<case>.safetensors``."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    base = from_json((Path(folder) / "config.json").read_text())
    tables = load_file(Path(folder) / "tables.safetensors")
    tables["static_mean"] = torch.view_as_complex(tables["static_mean"])
    dataset = Dataset.of(base.data.root)
    slot = planning.plan_of(base, dataset).share(0, rank, world)
    samples = dataset.reader("train", base.data).samples(slot.row)
    for number, (stage, micro, changes) in enumerate(cases):
        config = override(base, changes)
        wanted = Preparer(config, tables, CPU).wanted
        host = collate(samples, config, wanted=wanted, real=slot.real)
        result = step(config, stage, host.to(CPU), micro, tables, world)
        if rank == 0:
            save_file({k: v.clone() for k, v in result.items()}, Path(folder) / f"{world}-{number}.safetensors")
    if world > 1:
        dist.destroy_process_group()


def one_and_two(
    config: RunConfig, tables: dict[str, Tensor], folder: Path, cases: list[tuple[str, int, dict[str, Any]]]
) -> None:
    """`work` by this process alone, and by two others: files of both in `folder`."""
    (folder / "config.json").write_text(to_json(config))
    kept = {k: torch.view_as_real(v) if v.is_complex() else v for k, v in tables.items()}
    save_file({k: v.contiguous() for k, v in kept.items()}, folder / "tables.safetensors")
    two = processes.start(work, 2, 2, str(folder), cases)
    threads = torch.get_num_threads()
    work(0, 1, str(folder), cases)
    torch.set_num_threads(threads)
    while not two.join(timeout=60):
        pass
