"""Processes of `bench.py step`: `alone` beside the reference settings, `together` beside PyTorch's DDP.

All step through `Worker.step`, which is a step of kmtr.train.loop without logging; only the engine differs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kmtr import machine
from kmtr.bench import flops as count
from kmtr.bench.parts import PARTS, Announced, Clock, OnTheClock, watched
from kmtr.bench.reference import BATCH, Positions, Reference, widening_of
from kmtr.config import RunConfig, drawn_lines, from_json, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import pipeline, planning
from kmtr.data.loader.device import HostBatch
from kmtr.tasks import STAGES, Inputs, Model, accumulate
from kmtr.train.agreed import agree
from kmtr.train.engine import ShardedEngine, parameter_groups
from kmtr.train.step import Engine, TrainingStep
from kmtr.types import KmtrError, first_line, with_kind

RATE = 1e-7
"""Learning rate: an update costs the same at any, and weights that hardly move keep the losses finite."""

LEARNING = {
    "masked.learning_rate": RATE,
    "align.learning_rate": RATE,
    "align.head_factor": 1.0,
    "train.on_nonfinite": "stop",
}

WARM = 2
"""Steps of each before the first that counts."""

COUNTED = 4
"""Batches whose tokens are counted: R differs from subject to subject."""

TIMED_PARTS = 6
"""Steps in which the parts are timed."""

RESET_PEAK = Path("/proc/self/clear_refs")
MANY = 1_000_000
TABLES = "tables.safetensors"
SWEEP = (2, 4, 8, 16)
MATRIX = {"cpu": 2048, "cuda": 8192}


class Plain:
    """Plain PyTorch: AdamW on fp32 weights, autocast to bfloat16 where asked for, DDP over several processes.

    DDP is at its best: it knows only the parameters that the stage trains, so it need not search for unused ones.
    """

    def __init__(self, module: nn.Module, config: RunConfig, device: torch.device):
        self.module = self.wrapped = module.to(device)
        self.config, self.device = config, device
        groups = parameter_groups(module, config)
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=config.optimizer.betas, fused=True)

    def distribute(self) -> None:
        """Wrap in DDP, after a backward pass that showed which parameters get a gradient."""
        for parameter in self.module.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
        self.wrapped = DistributedDataParallel(self.module)

    def __call__(self, inputs: Inputs, predict: bool = False) -> dict[str, dict[str, Tensor]]:
        with torch.autocast(self.device.type, torch.bfloat16) if self.config.train.bf16 else nullcontext():
            out: dict[str, dict[str, Tensor]] = self.wrapped(inputs, predict)
        return out

    def backward(self, loss: Tensor) -> None:
        (loss / self.config.train.accumulation).backward()

    def update(self, rates: Mapping[str, float]) -> bool:
        trained = [p for p in self.module.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(trained, self.config.optimizer.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["domain"]] * group["share"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True


@dataclass
class Worker:
    """One process: data, and how a step is made.

    Attributes:
        stages: that are measured.
        tell: prints a line of progress, from the first process only.
    """

    config: RunConfig
    tables: dict[str, Tensor]
    stages: tuple[str, ...]
    rank: int
    world: int
    device: torch.device
    tell: Callable[[str], None]

    def __post_init__(self) -> None:
        self.config = override(self.config, LEARNING)
        self.prepare = Announced(self.config, self.tables, self.device)

    def batches(self, config: RunConfig) -> Iterator[HostBatch]:
        dataset = Dataset.open(config.data)
        plan = planning.plan_of(config, dataset)
        reader = dataset.reader("train", config.data)
        return pipeline.batches(config, reader, plan, range(MANY), self.rank, self.world)

    def model(self) -> Model:
        torch.manual_seed(self.config.seed)
        return Model(self.config)

    def step(
        self, engine: Engine, host: HostBatch, stage: str, config: RunConfig, on: Callable[[str], None] = lambda _: None
    ) -> None:
        """A step of training, as its loop takes it.

        Args:
            on: told which part begins.

        Raises:
            KmtrError: a loss is not finite.
        """
        agree(None, self.device)
        self.prepare.on = on
        # A run of this stage alone, unchecked: a process's share of the batch may be too few subjects to align.
        config = config.model_copy(update={"stage": stage})
        # In alignment behind `align.head_steps`: from there on all learns that does in the longest part of the stage.
        number = 0 if stage == "masked" else config.align.head_steps
        TrainingStep(config, engine, self.prepare, self.device, self.world)(number, host)

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds, from when all processes are ready to when the device is done."""
        dist.barrier()
        self.synchronise()
        began = time.perf_counter()
        work()
        self.synchronise()
        return time.perf_counter() - began

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# -------------------------------------------------------------------------------------------------------------- alone


def alone(worker: Worker) -> dict[str, Any]:
    """Each stage in one process: our step and the reference's in turns, FLOPs, the matmul ceiling; then R."""
    result = {stage: _beside_reference(worker, stage) for stage in worker.stages}
    result["sweep"] = _sweep(worker)
    return result


def _beside_reference(worker: Worker, stage: str) -> dict[str, Any]:
    config, rounds = worker.config, worker.config.bench.pairs
    batches = worker.batches(config)
    looked_at = [next(batches).to(worker.device) for _ in range(COUNTED)]
    counted, formula = count.counted(config, stage, looked_at[0], worker.tables)
    useful = [n for batch in looked_at for n in count.useful(batch, config)]
    first = [count.formula(config, stage, n, len(looked_at[0])) for n in useful[: len(looked_at[0])]]
    parts = [count.formula(config, stage, n, config.data.global_batch) for n in useful]
    worker.tell(f"{stage}: FLOPs counted / by formula {counted / formula:.3f}")
    ours = ShardedEngine(worker.model(), config, 1, worker.device)

    def our_step() -> None:
        worker.step(ours, next(batches), stage, config)

    memory = {"ours": _peak(worker, our_step)}
    references: dict[str, Callable[[], None]] = {}
    refused: dict[str, str] = {}
    for positions in ("all", "acquired"):
        step = _reference_step(worker, stage, positions)
        try:
            memory[f"reference_{positions}"] = _peak(worker, step)
            references[f"reference_{positions}"] = step
        except torch.OutOfMemoryError:
            refused[f"reference_{positions}"] = f"out of memory with {BATCH} subjects: set bench.lines"
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", "matmul", *references)}
    multiply, flops = _matmul(config, worker.device)
    for number in range(rounds):
        turns = [("ours", our_step), ("matmul", multiply), *references.items()]
        for name, work in turns if number % 2 == 0 else reversed(turns):
            seconds[name].append(worker.timed(work))
        _progress(worker, stage, number, rounds, seconds)
    return {
        "seconds": seconds,
        "refused": refused,
        "memory_gib": memory,
        "flops_per_subject": {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]},
        "flops_counted_over_formula": counted / formula,
        "lines_per_subject": sum(n.sampled for n in useful) / len(useful),
        "padding_flops": 1 - sum(sum(p.values()) for p in first) / formula,
        "matmul_flops": flops,
    }


def _reference_step(worker: Worker, stage: str, positions: Positions) -> Callable[[], None]:
    changes = {"data.global_batch": BATCH, "train.accumulation": 1, "train.bf16": False}
    config = override(worker.config, changes)
    torch.manual_seed(config.seed)
    engine = Plain(Reference(config, positions, widening_of(config)), config, worker.device)
    batches = worker.batches(config)
    return lambda: worker.step(engine, next(batches), stage, config)


def _peak(worker: Worker, step: Callable[[], None]) -> float:
    """Peak memory in GiB while the first steps are made: of the GPU, or of this process with all that it holds."""
    if worker.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(worker.device)
    elif RESET_PEAK.exists():
        RESET_PEAK.write_text("5")  # the kernel's peak starts anew
    for _ in range(WARM):
        step()
    if worker.device.type == "cuda":
        return torch.cuda.max_memory_allocated(worker.device) / 2**30
    if not RESET_PEAK.exists():
        return machine.peak() / 2**30
    lines = (RESET_PEAK.parent / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def _matmul(config: RunConfig, device: torch.device) -> tuple[Callable[[], None], int]:
    """A large product in the engine's precision, and its FLOPs: what the machine can at best."""
    n = MATRIX[device.type]
    dtype = torch.bfloat16 if config.train.bf16 else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    multiply()
    return multiply, 2 * n**3


def _sweep(worker: Worker) -> dict[str, list[float]]:
    """R -> seconds of steps of masked pretraining at this R alone, in turns; fewer ACS lines where R leaves no more."""
    config = worker.config
    ny = config.data.matrix[0]
    factors = [r for r in SWEEP if drawn_lines(ny, r, config.sampling.family)]
    acs = {
        "sampling.acs_lines": min(config.sampling.acs_lines, drawn_lines(ny, factors[-1], config.sampling.family) - 1)
    }
    configs = {r: override(config, acs | {"sampling.accelerations": (r,)}) for r in factors}
    engine = ShardedEngine(worker.model(), config, 1, worker.device)
    batches = worker.batches(config)
    seconds: dict[str, list[float]] = {str(r): [] for r in factors}
    rounds = max(3, config.bench.pairs // 2)
    for number in range(-1, rounds):
        for r in factors if number % 2 else reversed(factors):
            host = replace(next(batches), config=configs[r])
            spent = worker.timed(partial(worker.step, engine, host, "masked", configs[r]))
            if number >= 0:  # before: warming up
                seconds[str(r)].append(spent)
        if number >= 0:
            _progress(worker, "R", number, rounds, seconds)
    return seconds


# ----------------------------------------------------------------------------------------------------------- together


def together(worker: Worker) -> dict[str, Any]:
    """Each stage on several processes: our engine and DDP on the same batches, A B B A; then the parts of our step."""
    return {stage: _beside_ddp(worker, stage) for stage in worker.stages}


def _beside_ddp(worker: Worker, stage: str) -> dict[str, Any]:
    config, rounds = worker.config, worker.config.bench.pairs
    batches = worker.batches(config)
    theirs = Plain(worker.model(), config, worker.device)
    micro = next(batches).to(worker.device)[: config.data.global_batch // worker.world // config.train.accumulation]
    accumulate(theirs, [micro], worker.prepare, STAGES[stage](config))
    theirs.distribute()
    ours = ShardedEngine(worker.model(), config, worker.world, worker.device)
    engines: dict[str, Engine] = {"ours": ours, "ddp": theirs}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(-WARM, rounds):
        host = next(batches)
        for name in engines if number % 2 == 0 else reversed(engines):
            spent = worker.timed(partial(worker.step, engines[name], host, stage, config))
            if number >= 0:
                seconds[name].append(spent)
        if number >= 0:
            _progress(worker, f"{stage} on {worker.world} processes", number, rounds, seconds)
    return {"seconds": seconds, "parts": _parts(worker, ours, stage, batches)}


def _parts(worker: Worker, engine: ShardedEngine, stage: str, batches: Iterator[HostBatch]) -> dict[str, float]:
    """Mean seconds of each part of a step."""
    clock = Clock(worker.device)
    on_the_clock = OnTheClock(engine, clock)
    with watched(clock, engine.wrapped.module):
        clock.start()
        for _ in range(TIMED_PARTS):
            clock("data")
            host = next(batches)
            clock("rest")
            worker.step(on_the_clock, host, stage, worker.config, clock)
        clock("rest")
    return {part: clock.seconds[part] / TIMED_PARTS for part in PARTS}


# ------------------------------------------------------------------------------------------------------------ process


def program_of(name: str) -> Callable[[Worker], dict[str, Any]]:
    """The program of this name."""
    if name == "tracked":
        from kmtr.bench.tracked import tracked  # which imports this module

        return tracked
    return {"alone": alone, "together": together}[name]


def _progress(worker: Worker, what: str, number: int, rounds: int, seconds: dict[str, list[float]]) -> None:
    """A line every tenth."""
    if 10 * (number + 1) // rounds > 10 * number // rounds:
        times = "   ".join(f"{name} {median(values):.3f} s" for name, values in seconds.items())
        worker.tell(f"{what} {number + 1}/{rounds}   {times}")


def work(rank: int, world: int, program: str, request: str, folder: str, threads: int, stages: tuple[str, ...]) -> None:
    """A spawned process: a program (`program_of`) on ``train.device``; the first one writes ``folder/program.json``.

    What DeepSpeed and torch say goes to ``folder/program-rank.log``, an error to ``folder/program-rank.error``.

    Args:
        threads: of a process; those that a worker of training has.
    """
    try:
        _work(rank, world, program, request, folder, threads, stages)
    except Exception as error:
        words = first_line(error) if isinstance(error, KmtrError) else with_kind(error)
        (Path(folder) / f"{program}-{rank}.error").write_text(words)
        raise


def _work(
    rank: int, world: int, program: str, request: str, folder: str, threads: int, stages: tuple[str, ...]
) -> None:
    screen = os.dup(1)
    log = os.open(Path(folder) / f"{program}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def tell(line: str) -> None:
        if rank == 0:
            os.write(screen, f"  {line}\n".encode())

    config = from_json(request)
    cuda = config.train.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(threads)
    meeting = f"file://{folder}/{program}.meeting"
    dist.init_process_group("nccl" if cuda else "gloo", meeting, rank=rank, world_size=world)
    tables = load_file(Path(folder) / TABLES)
    tables["static_mean"] = torch.view_as_complex(tables["static_mean"])
    result = program_of(program)(Worker(config, tables, stages, rank, world, device, tell))
    if rank == 0:
        (Path(folder) / f"{program}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
