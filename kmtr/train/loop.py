"""The loop of one training worker: batch, objective, look, update, log, validate, save."""

from __future__ import annotations

import math
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kmtr.config import RunConfig, from_json
from kmtr.data import pipeline
from kmtr.data.batch import Batch, HostBatch
from kmtr.data.reader import Dataset
from kmtr.encoder import export_encoder
from kmtr.objectives import STAGES, Preparer, Pretraining, Step
from kmtr.tracking import Spool
from kmtr.train import checkpoint, guard, validation
from kmtr.train.engine import ShardedEngine, learning_rates, stage_of
from kmtr.train.progress import Sender
from kmtr.types import KmtrError

RECONSTRUCT_ENCODER = "encoder-reconstruct"
"""Folder in the run's: the encoder as stage b left it."""


def train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """One worker of a run: `train`, with every error returned instead of raised.

    Ray retries whatever is raised, at the price of a restart, and an error in our code, in the data or in the loss
    would only come again. So it is returned (and its process group torn down, which wakes the other workers); only the
    loss of a process is retried.

    Returns:
        What `train` returned, or ``error`` (one line).
    """
    try:
        return train(job)
    except KmtrError as error:
        message = str(error)
    except Exception as error:  # told to the driver below; the traceback stays in this worker's log
        traceback.print_exc()
        message = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        )
    Sender(job["progress"]).fail(message)
    if dist.is_initialized():
        dist.destroy_process_group()
    return {"error": message}


def train(job: dict[str, Any]) -> dict[str, Any]:
    """From the last checkpoint of a run to its end, on one worker of Ray Train.

    Args:
        job: ``config`` (JSON), ``folder`` (of the run), ``tables`` (statistics as numpy), ``tracking`` (uri, run_id,
            spool
            folder), ``progress`` (name of the progress actor).

    Returns:
        ``metrics`` of the last validation; ``step``; ``stopped``: the guard ended alignment, so the metrics are those
        of stage b's end, whose encoder is to be used; ``unsent``: records that tracking could not send yet.

    Raises:
        KmtrError: on all workers together: damaged data, a loss that is not finite (before it changed anything), a
            checkpoint that does not fit.
    """
    import ray.train
    import ray.train.torch

    config = from_json(job["config"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.manual_seed(config.seed)
    if device.type == "cpu":
        share = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
        torch.set_num_threads(config.train.threads or share)
    tables = {name: torch.from_numpy(array) for name, array in job["tables"].items()}

    dataset = Dataset.open(config.data)
    reader = dataset.reader("train", config.data)
    plan = pipeline.plan_of(config, dataset)
    prepare = Preparer(config, tables, device)
    engine = ShardedEngine(Pretraining(config), config, world, device)
    validate = validation.Validation(config, dataset, prepare, tables, rank, world, device)

    progress: dict[str, Any] = {"step": 0, "reference": {}, "stopped": False}
    last = ray.train.get_checkpoint()
    if last is not None:
        with last.as_directory() as folder:
            try:
                progress = checkpoint.restore(Path(folder), engine, config, rank, world)
                failure = None
            except KmtrError as error:
                failure = error
        agree(failure, device)

    tracking = job["tracking"]
    spool = Spool(tracking["spool"], tracking["uri"], tracking["run_id"]) if rank == 0 else None
    tell = Sender(job["progress"]) if rank == 0 else None
    steps = range(progress["step"], progress["step"] if progress["stopped"] else config.total_steps)
    batches = pipeline.batches(config, reader, plan, steps, rank, world)
    size = config.data.global_batch // world // config.train.accumulation
    watch = _Watch()
    metrics: dict[str, float] = progress["reference"] if progress["stopped"] else {}

    for step in steps:
        stage, _ = stage_of(config, step)
        host, failure = fetch(batches)
        watch.waited()
        agree(failure, device)
        assert host is not None

        batch = host.to(device, prepare.readout(stage))
        micro = [batch[i : i + size] for i in range(0, len(batch), size)]
        means = reduce(STAGES[stage](engine, micro, prepare, config), device)
        wrong = [name for name, value in means.items() if not math.isfinite(value)]
        if wrong:
            raise KmtrError(
                f"step {step + 1}: {stage} {wrong[0]} is {means[wrong[0]]}, expected a finite number; nothing was "
                f"updated; lower {stage}.learning_rate, or resume from the last checkpoint by the same command"
            )
        rates = learning_rates(config, step)
        engine.update(rates)
        done = step + 1
        watch.stepped(host, batch)

        end_of_stage = done in (config.reconstruct_steps, config.total_steps)
        if done % config.train.log_every == 0 or done == 1 or end_of_stage:
            logged = {f"{stage}/{name}": value for name, value in means.items()}
            logged |= {f"{stage}/learning_rate": rates["kspace"], f"{stage}/gradient_norm": engine.gradient_norm()}
            logged |= {"epoch": float(plan.epoch(step))} | watch.rates(config, world, device)
            if spool and tell:
                spool.metrics(done, {k: v for k, v in logged.items() if math.isfinite(v)})
                tell.put(done, stage, logged)
        if done % config.train.eval_every == 0 or end_of_stage:
            with engine.averaged():
                metrics, figure = validate(engine)
            if spool and tell:
                spool.metrics(done, metrics)
                tell.put(done, stage, metrics)
                if figure is not None:
                    path = Path(job["folder"]) / "figures" / f"reconstruction_{done:07d}.png"
                    path.parent.mkdir(exist_ok=True)
                    figure.savefig(path, dpi=144)
                    spool.artifact(path, "figures")
            if stage == "align" and config.align.guard:
                lost = guard.fallen(progress["reference"], metrics, config.align.tolerance)
                if lost and tell:
                    tell.put(done, stage, {f"lost/{name.removeprefix('val/')}": loss for name, loss in lost.items()})
                progress["stopped"] = bool(lost)
            watch.reset()
        if done == config.reconstruct_steps and config.align_steps:
            progress["reference"] = metrics
            with engine.averaged():
                weights = engine.weights("kspace_encoder")
            if rank == 0:
                export_encoder(Path(job["folder"]) / RECONSTRUCT_ENCODER, config, weights, tables)
        progress["step"] = done
        if done % config.train.checkpoint_every == 0 or end_of_stage or progress["stopped"]:
            with tempfile.TemporaryDirectory() as folder:
                checkpoint.save(Path(folder), engine, config, tables, progress, rank, world)
                ray.train.report({"step": done, **metrics}, checkpoint=ray.train.Checkpoint.from_directory(folder))
            watch.reset()
        if progress["stopped"]:
            metrics = progress["reference"]
            break

    unsent = spool.close(30.0) if spool else 0
    return {"metrics": metrics, "step": progress["step"], "stopped": progress["stopped"], "unsent": unsent}


def fetch(batches: Iterator[HostBatch]) -> tuple[HostBatch | None, KmtrError | None]:
    """The next batch, or the error that reading it gave."""
    try:
        return next(batches), None
    except KmtrError as error:
        return None, error


def agree(error: KmtrError | None, device: torch.device) -> None:
    """Raise the first worker's error on all workers if any has one: nobody waits for a worker that gave up.

    Raises:
        KmtrError: of the lowest rank that has one.
    """
    flag = torch.tensor(0 if error is None else 1, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if int(flag):
        messages: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if error is None else str(error))
        raise KmtrError(next(m for m in messages if m is not None))


def reduce(step: Step, device: torch.device) -> dict[str, float]:
    """Means over the global batch of what a step logged."""
    names = sorted(step.sums)
    totals = torch.stack([step.sums[n] for n in names] + [step.counts[n] for n in names]).to(device, torch.float64)
    dist.all_reduce(totals)
    sums, counts = totals.cpu().chunk(2)
    return dict(zip(names, (sums / counts.clamp(min=1)).tolist(), strict=True))


class _Watch:
    """Throughput, waiting and memory since the last line."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.began = self.mark = time.perf_counter()
        self.wait_s, self.steps, self.bytes, self.data = 0.0, 0, 0, 0.0
        self.lines: Tensor | int = 0
        self.existing: Tensor | int = 0

    def waited(self) -> None:
        now = time.perf_counter()
        self.wait_s += now - self.mark

    def stepped(self, host: HostBatch, batch: Batch) -> None:
        self.steps += 1
        self.lines = self.lines + batch.sampled.sum()
        self.existing = self.existing + batch.existing.sum()
        self.bytes += host.stored.nbytes
        self.data += (1 - host.padding) * host.stored.nbytes
        self.mark = time.perf_counter()

    def rates(self, config: RunConfig, world: int, device: torch.device) -> dict[str, float]:
        """subjects/s and acquired lines/s over all workers, share of time waiting for data, true R, share of
        the batches that is padding, peak memory in GiB.
        """
        seconds, lines = time.perf_counter() - self.began, int(self.lines)
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**30
        else:
            peak = (
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
            )
        rates = {
            "subjects_per_s": self.steps * config.data.global_batch / seconds,
            "tokens_per_s": lines * world / seconds,
            "data_wait_fraction": self.wait_s / seconds,
            "true_acceleration": int(self.existing) / max(lines, 1),
            "padding_fraction": 1 - self.data / max(self.bytes, 1),
            "memory_gib": peak,
        }
        self.reset()
        return rates
