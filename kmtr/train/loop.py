"""The loop of one training worker: batch, step, log, validate, save."""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
import traceback
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from kmtr import machine, tracking
from kmtr.config import RunConfig, from_json
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import pipeline
from kmtr.data.loader.device import HostBatch
from kmtr.exported import WEIGHTS, read_weights
from kmtr.tasks import Model, Preparer, stage_of
from kmtr.train import checkpoint, choice, guard, heads, validation, watch
from kmtr.train.agreed import SAVE, STOP, together, together_wishing
from kmtr.train.checkpoint import Progress, layout_of
from kmtr.train.engine import ShardedEngine
from kmtr.train.folder import MASKED_ENCODER, SPEED, SPEED_CPU, by_setting
from kmtr.train.handed import taken
from kmtr.train.progress import Sender
from kmtr.train.step import Report, TrainingStep
from kmtr.types import KmtrError, with_kind


def train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """One worker of a run: `train`, with every error returned instead of raised.

    Ray retries whatever is raised, at the price of a restart, and an error in our code, in the data or in the loss
    would only come again. So it is returned (and its process group torn down, which wakes the other workers); only the
    loss of a process is retried.

    Returns:
        What `Worker.run` returned, or ``error`` (one line).
    """
    import ray.train
    import ray.train.torch

    tell, device = Sender(job["progress"]), ray.train.torch.get_device()
    if settled := tell.settled():
        return {"error": settled}
    context = ray.train.get_context()
    with _node_read(job, context), watch.beating(tell, context.get_world_rank(), device) as pulse:
        try:
            return Worker(job, tell, pulse).run()
        except KmtrError as error:
            message, lost_peer = str(error), False
        except Exception as error:  # told to the driver below; the traceback stays in this worker's log
            traceback.print_exc()
            message, lost_peer = _told(error, Path(job["folder"])), watch.lost_peer(error)
        tell.fail(message, lost_peer)
        watch.abandon(device)
    return {"error": message}


class Worker:
    """One worker of a run, from its last checkpoint to its end.

    Args:
        job: ``config`` (JSON), ``folder`` (of the run), ``resolved`` (`handed.handed`), ``tables`` (statistics as
            numpy), ``tracking`` (uri, run_id, spool folder), ``progress`` (name of the progress actor).
        tell: this worker's end of that actor.

    Raises:
        KmtrError: on all workers together, here and in `run`: damaged data, a loss or gradient that is not finite, a
            checkpoint that does not fit.
    """

    def __init__(self, job: dict[str, Any], tell: Sender, pulse: watch.Pulse):
        import ray.train
        import ray.train.torch

        self.config = config = from_json(job["config"])
        self.folder = Path(job["folder"])
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = device = ray.train.torch.get_device()
        torch.manual_seed(config.seed)
        if device.type == "cpu":
            torch.set_num_threads(config.train.threads or machine.threads(context.get_local_world_size()))
        if config.train.deterministic:
            deterministic()
        self.tables = {name: torch.from_numpy(array) for name, array in job["tables"].items()}

        dataset = Dataset.open(config.data)
        self.reader = dataset.reader("train", config.data)
        self.plan = taken(config, dataset, job["resolved"])
        prepare = Preparer(config, self.tables, device)
        model = Model(config)
        if config.stage == "task" and config.task.encoder != "none":
            system = model.systems[config.task.system]
            system.load_state_dict(read_weights(Path(config.task.encoder) / WEIGHTS)[0])
        self.sender, self.tell, self.pulse = tell, tell if self.rank == 0 else None, pulse
        if newest(self.folder) is None and not config.run.begin:
            say = self.tell.say if self.tell else lambda _: None
            heads.begin(model, prepare, config, self.reader, job["resolved"]["rows"], device, say)
        self.engine = ShardedEngine(model, config, self.world, device)
        self.step = TrainingStep(config, self.engine, prepare, device, self.world)
        self.validate = validation.of(config, dataset, prepare, self.rank, self.world, device)
        known = job["tracking"]
        self.spool = None
        if self.rank == 0:
            say = partial(_indented, tell)
            self.spool = tracking.Spool(known["spool"], known["uri"], known["run_id"], say)
            if config.train.bf16 and not machine.computes_bf16(device.type):
                say("train.bf16=true: this CPU has no products of bf16, which take many times as long; false is faster")
        self.progress = self._restored()
        self.metrics = self.progress.metrics
        self.saved = self.progress.step
        self.written = threading.Event()
        self.written.set()
        self.nothing = tempfile.TemporaryDirectory()
        self.watch = _Watch()
        self.told: dict[str, float] = {}

    def _restored(self) -> Progress:
        """The progress of the last checkpoint, which the engine goes on from; a new one where there is none."""
        import ray.train

        progress, last = Progress(), newest(self.folder)
        self.unlisted = last is not None and ray.train.get_checkpoint() is None
        self.branched = last is None and bool(self.config.run.begin)
        if self.branched:
            progress = self._branched(Path(self.config.run.begin))
        elif last is not None:
            folder = self._whole(last)
            progress = together(lambda: checkpoint.fitting(folder, self.engine.shapes(), self.config), self.device)
            together(lambda: checkpoint.restore(folder, self.engine), self.device)
            if progress.step == self.config.masked_steps and self.config.align_steps:
                self._export(folder)  # it may have ended between the checkpoint and this
        layout = layout_of(self.config, self.world)
        before = progress.layouts[-1][1] if progress.layouts else None
        if layout != before:
            progress.layouts.append((progress.step, layout))
        if self.spool and self.tell:
            self.spool.metrics(progress.step, {"run/workers": self.world})
            if last is None and self.spool.continued:
                self.tell.say("  step      0  starts again, since no checkpoint was written before it was interrupted")
            if last is not None:
                changes = [f"{k} {before[k]} -> {v}" for k, v in layout.items() if before and v != before[k]]
                self.tell.say(f"  step {progress.step:>6}  goes on       {', '.join(changes)}".rstrip())
        return progress

    def _branched(self, folder: Path) -> Progress:
        """The progress of another run's checkpoint, which the engine goes on from."""
        together(partial(checkpoint.check_whole, folder, self.rank, self.world), self.device)
        progress = together(lambda: checkpoint.fitting(folder, self.engine.shapes(), self.config), self.device)
        together(lambda: checkpoint.restore(folder, self.engine), self.device)
        progress.stopped, progress.worse = False, 0  # what ended the other run does not end this one
        if self.tell:
            self.tell.say(f"  step {progress.step:>6}  branches off  another run's checkpoint")
        return progress

    def _whole(self, newest: Path) -> Path:
        """The newest checkpoint of which nothing is missing or changed.

        Raises:
            DamagedError: none is whole.
        """
        found: list[Any] = [checkpoint.back_from(newest)]
        dist.broadcast_object_list(found)
        first: checkpoint.DamagedError | None = None
        for folder in found[0]:
            try:
                together(partial(checkpoint.check_whole, folder, self.rank, self.world), self.device)
                return Path(folder)
            except checkpoint.DamagedError as error:
                first = first or error
                if self.tell:
                    self.tell.say(f"               damaged       {error}; looking at the one before")
        raise checkpoint.DamagedError(
            f"{first or 'checkpoint: none is there'}; nor is one before it whole: run.fresh=true"
        )

    def run(self) -> dict[str, Any]:
        """Train to the end, or to where the run is to stop.

        Returns:
            ``interrupted``: the run was asked to stop; ``paused``: it is at `train.until`; else
            ``metrics`` of the weights that the run leaves; ``step``; ``stopped``: patience ended training on labels, or
            the guard alignment, so that the encoder of the end of masked reconstruction is to be used.
        """
        config, progress = self.config, self.progress
        first = progress.step
        if self.branched or self.unlisted:
            self._save(wait=True)  # from now on it needs the other run no more, and Ray Train has a list again
        last = min(config.train.until or config.total_steps, config.total_steps)
        steps = range(first, first if progress.stopped else max(first, last))
        wanted = self.step.prepare.wanted
        batches = pipeline.batches(config, self.reader, self.plan, steps, self.rank, self.world, wanted)
        for step in steps:
            host, wish = together_wishing(lambda: next(batches), self.device, self.watch.waited, self.pulse.wish)
            if wish == STOP:
                return self._interrupted()
            if wish == SAVE:
                self._save_early()
            report = self.step(step, host)
            self.pulse.moved()
            self.watch.stepped(host, report)
            progress.step = step + 1
            self._look(report)
            ends = progress.step in (config.masked_steps, last)
            if progress.step % config.train.log_every == 0 or progress.step == 1 or ends:
                self._log(report)
            if progress.step % config.train.eval_every == 0 or ends:
                self._evaluate(report.stage)
            if progress.step == config.masked_steps and config.align_steps:
                progress.reference = self.metrics
            if progress.step % config.train.checkpoint_every == 0 or ends or progress.stopped:
                self._save(wait=ends or progress.stopped)
            if progress.stopped:
                break
        if self.spool:
            self.spool.close(30.0)
        paused = not progress.stopped and progress.step < config.total_steps
        metrics = self.metrics if paused else self._left()
        return {"metrics": metrics, "step": progress.step, "stopped": progress.stopped, "paused": paused}

    def _save_early(self) -> None:
        """A node is about to be taken away."""
        if self.progress.step > self.saved:
            self._save(wait=True)
        self.pulse.answered()

    def _interrupted(self) -> dict[str, Any]:
        """Save, and leave."""
        progress = self.progress
        if progress.step > self.saved:
            self._save(wait=True)
        if self.spool:
            self.spool.close(5.0)
        return {"interrupted": True, "step": progress.step}

    def _left(self) -> dict[str, float]:
        """Metrics of the weights that the run leaves."""
        progress = self.progress
        if self.config.stage == "task":
            return choice.result(progress, self.config, self.validate.held_out)
        return progress.reference if progress.stopped else progress.metrics

    def _look(self, report: Report) -> None:
        """Count a step that was skipped.

        Raises:
            KmtrError: there were too many.
        """
        if report.applied:
            return
        progress, most = self.progress, self.config.train.max_skipped
        progress.skipped += 1
        if self.spool and self.tell:
            self.spool.metrics(progress.step, {"run/skipped_steps": progress.skipped})
            self.tell.say(
                f"  step {progress.step:>6}  skipped      {report.stage}: the gradient is not finite; the weights stay "
                f"({progress.skipped} of at most {most})"
            )
        if progress.skipped > most:
            raise KmtrError(
                f"step {progress.step}: {progress.skipped} steps had a gradient that is not finite, expected at most "
                f"train.max_skipped={most}; lower {report.stage}.learning_rate and resume by the same command"
            )

    def _log(self, report: Report) -> None:
        stage, done, means = report.stage, self.progress.step, report.means
        whole = means.get("loss")  # of a single task the same curve as that task's
        logged = {f"{stage}/{name}": value for name, value in means.items() if name == "loss" or value != whole}
        logged[f"{stage}/learning_rate"] = report.rates[next(iter(self.validate.prepare.readers))]
        for head in stage_of(self.config, done - 1)[0].fresh:
            logged[f"{stage}/learning_rate_heads_{head}"] = report.rates[f"heads.{head}"]
        logged[f"{stage}/gradient_norm"] = self.engine.gradient_norm()
        logged["data/epoch"] = float(self.plan.epoch(done - 1))
        logged |= self.watch.rates(self.config, self.world, self.device)
        if self.spool and self.tell:
            told = {name: value for name, value in logged.items() if math.isfinite(value) and self._news(name, value)}
            self.spool.metrics(done, told)
            self.tell.put(done, stage, logged)

    def _news(self, name: str, value: float) -> bool:
        """False for a value that seldom changes and is what it was: its chart would be a line."""
        if not name.startswith("data/") and not name.endswith("/top1_chance"):
            return True
        before, self.told[name] = self.told.get(name), value
        return before != value

    def _evaluate(self, stage: str) -> None:
        """Validation, the guard of alignment, and of training on labels the choice of its weights."""
        progress, done = self.progress, self.progress.step
        with self.engine.averaged():
            self.metrics, figure = self.validate(self.engine)
            self.pulse.moved()
            progress.metrics = self.metrics
            better = stage == "task" and choice.judge(progress, self.metrics)
            if better and choice.keeps_best(progress, self.config):
                self.engine.remember()
        if self.rank == 0 and self.validate.held_out and self.validate.held.columns:
            self.validate.held.write(self.folder, done)
        if self.spool and self.tell:
            self.spool.metrics(done, self.metrics)
            self.tell.put(done, stage, self.metrics)
            if figure is not None:
                path = self.folder / "figures" / f"reconstruction_{done:07d}.png"
                path.parent.mkdir(exist_ok=True)
                figure.savefig(path, dpi=144)
                self.spool.artifact(path, "figures")
        if stage == "align" and self.config.align.guard:
            lost = guard.fallen(progress.reference, self.metrics, self.config.align.tolerance)
            if lost and self.tell:
                self.tell.put(done, stage, {f"lost/{name.removeprefix('val/')}": loss for name, loss in lost.items()})
            progress.stopped = bool(lost)
        if stage == "task":
            self._end_early()
        self.watch.reset()

    def _end_early(self) -> None:
        """Stop where `task.patience` validations were no better than the best, which tracking is told."""
        progress = self.progress
        progress.stopped = choice.ends(progress, self.config)
        if self.spool and self.tell and progress.best_step:
            best = progress.best[choice.SCORE]
            told = {"step": progress.best_step, "score": best, "validation_subjects": self.validate.held_out}
            self.spool.metrics(progress.step, {f"best/{name}": float(value) for name, value in told.items()})
            if progress.stopped:
                self.tell.say(
                    f"  step {progress.step:>6}  stopped      {progress.worse} validations without a better val/score "
                    f"than {best:.3f} at step {progress.best_step}"
                )

    def _save(self, wait: bool) -> None:
        """A checkpoint, and at the end of masked reconstruction its encoder. Training stops to copy the state; written
        and hashed it is beside training.

        Args:
            wait: until it is written; else for the one before only, so that the host holds one copy at most.
        """
        import ray.train

        progress, began = self.progress, time.perf_counter()
        self.written.wait()
        part = checkpoint.collect(self.engine, progress, self.config, self.rank, self.world)
        self.written.clear()
        modes = ray.train.CheckpointUploadMode
        ray.train.report(
            {"step": progress.step, "ended": float(progress.stopped), **self.metrics},
            checkpoint=ray.train.Checkpoint.from_directory(self.nothing.name),  # Ray wants one; `_write` makes it
            checkpoint_upload_mode=modes.SYNC if wait else modes.ASYNC,
            checkpoint_upload_fn=partial(self._write, part),
        )
        self.saved = progress.step
        self.pulse.moved()
        if self.spool:
            self.spool.metrics(progress.step, {"run/checkpoint_stall_s": time.perf_counter() - began})
        if progress.step == self.config.masked_steps and self.config.align_steps:
            dist.barrier()  # all workers' files are there
            written = ray.train.get_checkpoint()
            assert written is not None
            with written.as_directory() as place:
                self._export(Path(place))
        self.watch.reset()

    def _write(self, part: checkpoint.Part, _: Any, name: str) -> Any:
        """Write a worker's part where Ray Train looks for it; in a thread of Ray's, or its error ends the run."""
        import ray.train

        target = self.folder / "train" / name
        try:
            part.write(target)
        except Exception as error:
            self.sender.fail(_told(error, self.folder))
            self.sender.settle()  # it would come again
            raise
        finally:
            self.written.set()
        return ray.train.Checkpoint.from_directory(str(target))

    def _export(self, folder: Path) -> None:
        if self.rank == 0:
            checkpoint.export_encoder_from(folder, self.folder / MASKED_ENCODER, self.config, self.tables)


def _node_read(job: dict[str, Any], context: Any) -> AbstractContextManager[None]:
    """One worker of each node tells MLflow what that does."""
    every_s = from_json(job["config"]).tracking.system_s
    if not every_s or context.get_local_rank():
        return nullcontext()
    known = job["tracking"]
    return tracking.readings(Path(job["folder"]), known["uri"], known["run_id"], context.get_node_rank(), every_s)


def newest(folder: Path) -> Path | None:
    """The last checkpoint of a run that Ray Train knows; where its list was set aside (`trainer.set_aside`), the last
    to which no file is missing.
    """
    import ray.train

    last = ray.train.get_checkpoint()
    if last is not None:
        return Path(last.path)
    if not (folder / "train" / checkpoint.ASIDE).is_file():
        return None
    there = sorted((folder / "train").glob("checkpoint_*"), reverse=True)
    return next((one for one in there if checkpoint.complete(one)), None)


def _told(error: Exception, folder: Path) -> str:
    """An error of no kind of ours in one line; a full disk by its setting."""
    text = with_kind(error)
    told = by_setting(text, folder)
    if told == text and isinstance(error, SafetensorError):
        return f"storage.root: {folder} can not be written: {text}"
    return told


def _indented(tell: Sender, line: str) -> None:
    tell.say(f"               {line}")


def deterministic() -> None:
    """Only kernels that repeat bit for bit; an operation that has none raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # debugging, and slow


class _Watch:
    """Throughput, waiting and memory since the last line."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.began = self.mark = time.perf_counter()
        self.processor = time.process_time()
        self.wait_s, self.steps, self.bytes, self.data = 0.0, 0, 0, 0.0
        self.lines: Tensor | int = 0
        self.existing: Tensor | int = 0

    def waited(self) -> None:
        now = time.perf_counter()
        self.wait_s += now - self.mark

    def stepped(self, host: HostBatch, report: Report) -> None:
        batch = report.batch
        self.steps += 1
        self.lines = self.lines + batch.sampled.sum()
        self.existing = self.existing + batch.existing.sum()
        self.bytes += host.stored.nbytes
        self.data += (1 - host.padding) * host.stored.nbytes
        self.mark = time.perf_counter()

    def rates(self, config: RunConfig, world: int, device: torch.device) -> dict[str, float]:
        """subjects/s (on CPUs also by the processor's time) and acquired lines/s over all workers, share of time
        waiting for data, true R, share of the batches that is padding, peak memory in GiB.
        """
        seconds, lines = time.perf_counter() - self.began, int(self.lines)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else machine.peak()
        rates = {
            SPEED: self.steps * config.data.global_batch / seconds,
            "speed/tokens_per_s": lines * world / seconds,
            "speed/data_wait_fraction": self.wait_s / seconds,
            "data/true_acceleration": int(self.existing) / max(lines, 1),
            "data/padding_fraction": 1 - self.data / max(self.bytes, 1),
            "speed/memory_gib": peak / 2**30,
        }
        if device.type == "cpu":
            rates[SPEED_CPU] = self.steps * config.data.global_batch / (time.process_time() - self.processor)
        self.reset()
        return rates
