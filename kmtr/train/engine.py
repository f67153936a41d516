"""DeepSpeed from the configuration: settings, parameter groups, learning rate, and a thin engine around it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.tasks import STAGES, Inputs, stage_of, tasks_of
from kmtr.train import state
from kmtr.train.average import Average
from kmtr.train.state import Held

BUCKET = 50_000_000
"""Gradients that ZeRO reduces at once, and weights that it gathers: 100 MB in bf16. DeepSpeed's own 5e8 would take 1 GB
of every GPU, whatever the model's size."""


def settings(config: RunConfig, world_size: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's own configuration; every number in it follows from ours and the module's `parameters`.

    Under bf16 with ZeRO gradients are summed over micro-batches and workers in fp32. DeepSpeed has no such sums without
    ZeRO (and its optimizer for that case begins with a step on zero gradients), so there the weights stay fp32 and the
    forward pass is autocast: see `ShardedEngine`.
    """
    train = config.train
    bucket = min(BUCKET, parameters + parameters % 2)  # ZeRO wants an even number
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
    }
    if train.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    accumulation = config.accumulation(world_size)
    found: dict[str, Any] = {
        "train_batch_size": config.data.global_batch,
        "train_micro_batch_size_per_gpu": config.data.global_batch // world_size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.clip_norm if train.zero_stage else 0.0,  # without ZeRO `update` clips
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW, on the host too: no kernel is compiled
        "timers": {"throughput": {"enabled": False}},  # it makes the host wait for the device twice a micro-batch
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if train.bf16 and train.zero_stage:
        found |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return found


def domains(config: RunConfig) -> dict[str, str]:
    """Part of the model, as ``systems.kspace`` or ``heads.masked`` -> domain that it takes its learning rate from: a
    head its own where it is fresh in some stage, else that of the system that it stands on.
    """
    tasks = tasks_of(config).values()
    fresh = {name for stage in STAGES.values() for name in stage(config).fresh}
    systems = {f"systems.{name}": name for task in tasks for name in task.systems}
    return systems | {
        f"heads.{task.name}": f"heads.{task.name}" if task.name in fresh else task.systems[0] for task in tasks
    }


def parameter_groups(module: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Groups by domain (`domains`), decay and share of the learning rate.

    Matrices decay; biases, norms, gates and embeddings of view types do not. With `optimizer.layer_decay` d, block l of
    an encoder's L (the embedding is l = -1) learns at d^(L - l) of the rate (BEiT, Bao 2022); all behind its blocks at
    the whole.
    """
    groups: dict[tuple[str, bool, float], list[nn.Parameter]] = {}
    of = domains(config)
    for name, parameter in module.named_parameters():
        decays = parameter.ndim >= 2 and not name.endswith(("gate", "view.weight"))
        part = ".".join(name.split(".")[:2])
        domain = of.get(part, part)
        share = config.optimizer.layer_decay ** (config.model.depth - _block(name, config.model.depth))
        groups.setdefault((domain, decays, share), []).append(parameter)
    weight_decay = config.optimizer.weight_decay
    return [
        {"params": members, "domain": domain, "share": share, "weight_decay": weight_decay if decays else 0.0}
        for (domain, decays, share), members in groups.items()
    ]


def _block(name: str, depth: int) -> int:
    """Number of the encoder's block that a parameter belongs to: -1 before them, `depth` behind them and elsewhere."""
    if not name.startswith("systems."):
        return depth
    rest = name.split(".", 2)[2]
    if rest.startswith(("embed.", "position.")):
        return -1
    return int(rest.split(".")[1]) if rest.startswith("blocks.") else depth


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up, then the schedule; every stage has its own.

    ``cosine`` falls to zero. ``plateau`` stays, and falls linearly over the last `optimizer.cooldown` of its steps: up
    to there it is the same for a run of any length (warmup-stable-decay, Hu 2024).
    """
    stage, local = stage_of(config, step)
    how = stage.settings
    if config.optimizer.schedule == "plateau":
        warm = min(1.0, (local + 1) / max(how.warmup_steps, 1))
        left = (how.steps - local) / max(config.optimizer.cooldown * how.steps, 1)
        return how.learning_rate * min(warm, left)
    return how.learning_rate * warm_cosine(local, how.steps, how.warmup_steps)


def learning_rates(config: RunConfig, step: int) -> dict[str, float]:
    """Learning rate of each of the `domains`; 0 of a system that its stage keeps frozen."""
    stage, local = stage_of(config, step)
    every, fresh = set(domains(config).values()), {f"heads.{name}": factor for name, factor in stage.fresh.items()}
    if local < stage.head_steps:
        return {domain: stage.settings.learning_rate * fresh.get(domain, 0.0) for domain in every}
    rate = learning_rate(config, step)
    rates = {domain: 0.0 if domain in stage.frozen else rate for domain in every}
    return rates | {domain: rate * factor for domain, factor in fresh.items()}


def warm_cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / max(warmup_steps, 1))
    share = max(0.0, step - warmup_steps) / max(steps - warmup_steps, 1)
    return warm * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def imported(device: torch.device) -> ModuleType:
    """DeepSpeed, imported where it is needed and not before: it probes the machine."""
    # Its tuner of settings, which nothing here calls, imports all of MLflow: two fifths of the import's time, in each
    # worker at each start.
    tuner = ModuleType("deepspeed.autotuning.autotuner")
    tuner.Autotuner = None  # type: ignore[attr-defined]
    sys.modules.setdefault(tuner.__name__, tuner)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device.type == "cpu":
        # Else every first run compiles collectives that only inference calls; killed meanwhile, it leaves a lock
        # behind for which all later runs wait without a word.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed


class ShardedEngine:
    """A DeepSpeed engine with the two verbs that tasks need, and `update`.

    DeepSpeed counts micro-batches in ``step()``: between two backward passes it only counts, after the last one it
    updates the weights. That last call is `update`, so that a loss can be looked at before it changes anything.

    With `optimizer.ema` it also keeps the EMA of all weights, sharded and placed as AdamW's state is. With `train.bf16`
    the model computes in bf16 and AdamW updates fp32 weights: under ZeRO they are a copy, without it the weights
    themselves, which autocast casts.
    """

    def __init__(self, module: nn.Module, config: RunConfig, world_size: int, device: torch.device):
        deepspeed = imported(device)
        optimizer = torch.optim.AdamW(
            parameter_groups(module, config),
            lr=config.masked.learning_rate,
            betas=config.optimizer.betas,
            fused=True,
        )
        self.wrapped, self.optimizer, _, _ = deepspeed.initialize(
            model=module.to(device),
            optimizer=optimizer,
            config=settings(config, world_size, sum(p.numel() for p in module.parameters())),
            dist_init_required=False,
        )
        self.held = Held(self.wrapped)
        self.average = Average(self.held.masters, config.optimizer.ema) if config.optimizer.ema else None
        self._best: list[Tensor] = []
        self._clip_norm = config.optimizer.clip_norm
        self._autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=config.train.bf16 and not config.train.zero_stage
        )
        self._pending = False
        self._norm: Tensor | float = float("nan")

    def __call__(self, inputs: Inputs, predict: bool = False) -> dict[str, dict[str, Tensor]]:
        with self._autocast:
            return self.wrapped(inputs, predict)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient; that of a loss which is not finite is not finite either."""
        if self._pending:
            self.wrapped.step()
        unity = torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))  # no question that the host waits for
        self.wrapped.backward(loss * unity)
        self._pending = True

    def update(self, rates: Mapping[str, float]) -> bool:
        """Change the weights by what `backward` accumulated, at the learning rate of their domain.

        Returns:
            False: the gradient was not finite on some worker; all are as they were, EMA and AdamW's state included.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["domain"]] * group["share"]
        if self.held.stage:
            self.wrapped.step()
            applied = not self.optimizer.overflow
            self._norm = self.wrapped.get_global_grad_norm()
        else:
            self._norm = nn.utils.clip_grad_norm_(self.wrapped.module.parameters(), self._clip_norm)
            applied = math.isfinite(self._norm)
            if not applied:
                self.wrapped.zero_grad()  # AdamW passes over a weight without gradient
            self.wrapped.step()
        self._pending = False
        if applied and self.average is not None:
            self.average.update(self.held.masters)
        return applied

    def gradient_norm(self) -> float:
        """Norm of the last update's gradient before clipping."""
        return float(self._norm)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are their EMA; as they are without `optimizer.ema`. All workers must enter it.

        They are exchanged in place, so it takes no more memory, and come back bit for bit. An error inside leaves the
        average in place: it ends the run, and a collective call here would wait for workers that have left.
        """
        if self.average is None:
            yield
            return
        self._exchange(self.average)
        yield
        self._exchange(self.average)

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the weights as they are, their EMA where they are `averaged`; from now on every checkpoint has them.

        The copy lies in the host's memory: 4 bytes a weight, divided among the workers as AdamW's state is.
        """
        self._best = self._best or self._like_masters()
        for kept, master in zip(self._best, self.held.masters, strict=True):
            kept.copy_(master)

    def shapes(self) -> dict[str, list[int]]:
        """Weight -> its shape."""
        return state.shapes(self.wrapped.module)

    def collect(self) -> state.Content:
        """This worker's pieces of weights, AdamW's state, EMA and what it remembers, copied; every worker must."""
        return state.collect(self.held, self._copies())

    def load(self, paths: Iterable[Path]) -> None:
        """Go on from the pieces that any number of workers in any ZeRO stage wrote; every worker must.

        Raises:
            CheckpointError: something is missing in them.
        """
        files = list(paths)
        self._best = self._like_masters() if state.BEST in state.kinds(files) else []
        updates = state.load(files, self.held, self._copies())
        if self.average is not None:
            self.average.updates = updates

    def _copies(self) -> dict[str, dict[Tensor, Tensor]]:
        """Kind -> master -> copy of it, of the kinds that there are."""
        found = {state.AVERAGE: self.average.values if self.average else [], state.BEST: self._best}
        return {kind: dict(zip(self.held.masters, some, strict=True)) for kind, some in found.items() if some}

    def _like_masters(self) -> list[Tensor]:
        return [torch.empty_like(master, device="cpu") for master in self.held.masters]

    @torch.no_grad()
    def _exchange(self, average: Average) -> None:
        """Swap the weights and their EMA, also in what the model computes with."""
        average.exchange(self.held.masters)
        self.held.refresh()
