"""DeepSpeed from the configuration: settings, parameter groups, learning rate, and a thin engine around it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.objectives import Inputs
from kmtr.train.average import Average

BUCKET = 50_000_000
"""Gradients that ZeRO reduces at once, and weights that it gathers: 100 MB in bf16. DeepSpeed's own 5e8 would take 1 GB
of every GPU, whatever the model's size."""


def settings(config: RunConfig, world_size: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's own configuration; every number in it follows from ours and the module's `parameters`."""
    train = config.train
    bucket = min(BUCKET, parameters)
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
    }
    if train.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": config.data.global_batch,
        "train_micro_batch_size_per_gpu": config.data.global_batch // world_size // train.accumulation,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW, on the host too: no kernel is compiled
        "bf16": {"enabled": train.bf16},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


DOMAINS = {
    "image_encoder": "image",
    "image_decoder": "image",
    "kspace_heads": "heads",
    "image_heads": "heads",
    "log_temperature": "heads",
}
"""Of the parts of `objectives.Pretraining` that are not k-space's."""


def parameter_groups(module: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Groups by domain, decay and share of the learning rate.

    Domains (of `learning_rates`) are ``kspace``, ``image`` and ``heads``, which are alignment's projections. Matrices
    decay; biases, norms, gates and embeddings of view types do not. With `optimizer.layer_decay` d, block l of an
    encoder's L (the embedding is l = -1) learns at d^(L - l) of the rate (BEiT, Bao 2022); all behind its blocks at the
    whole.
    """
    groups: dict[tuple[str, bool, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        decays = parameter.ndim >= 2 and not name.endswith(("gate", "view.weight"))
        domain = next((domain for prefix, domain in DOMAINS.items() if name.startswith(prefix)), "kspace")
        share = config.optimizer.layer_decay ** (config.model.depth - _block(name, config.model.depth))
        groups.setdefault((domain, decays, share), []).append(parameter)
    weight_decay = config.optimizer.weight_decay
    return [
        {"params": members, "domain": domain, "share": share, "weight_decay": weight_decay if decays else 0.0}
        for (domain, decays, share), members in groups.items()
    ]


def _block(name: str, depth: int) -> int:
    """Number of the encoder's block that a parameter belongs to: -1 before them, `depth` behind them and elsewhere."""
    encoder, _, rest = name.partition(".")
    if encoder not in ("kspace_encoder", "image_encoder"):
        return depth
    if rest.startswith(("embed.", "position.")):
        return -1
    return int(rest.split(".")[1]) if rest.startswith("blocks.") else depth


def stage_of(config: RunConfig, step: int) -> tuple[str, int]:
    """Stage of a step, and the step within it."""
    if step < config.reconstruct_steps:
        return "reconstruct", step
    return "align", step - config.reconstruct_steps


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up, then the schedule; every stage has its own.

    ``cosine`` falls to zero. ``plateau`` stays, and falls linearly over the last `optimizer.cooldown` of its steps: up
    to there it is the same for a run of any length (warmup-stable-decay, Hu 2024).
    """
    stage, local = stage_of(config, step)
    part = config.reconstruct if stage == "reconstruct" else config.align
    if config.optimizer.schedule == "plateau":
        warm = min(1.0, (local + 1) / max(part.warmup_steps, 1))
        left = (part.steps - local) / max(config.optimizer.cooldown * part.steps, 1)
        return part.learning_rate * min(warm, left)
    return part.learning_rate * warm_cosine(local, part.steps, part.warmup_steps)


def learning_rates(config: RunConfig, step: int) -> dict[str, float]:
    """Learning rate of each domain of `parameter_groups`.

    In alignment the projections learn at `align.head_factor` times the rate, and for the first `align.head_steps` steps
    they alone, without warm-up: until they say something their gradient would only disturb the encoder. A teacher that
    is not trained has rate 0.
    """
    stage, local = stage_of(config, step)
    rate, align = learning_rate(config, step), config.align
    if stage == "reconstruct":
        return {"kspace": rate, "image": rate, "heads": rate}
    if local < align.head_steps:
        return {"kspace": 0.0, "image": 0.0, "heads": align.learning_rate * align.head_factor}
    return {"kspace": rate, "image": rate if align.train_image_encoder else 0.0, "heads": rate * align.head_factor}


def warm_cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / max(warmup_steps, 1))
    share = max(0.0, step - warmup_steps) / max(steps - warmup_steps, 1)
    return warm * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


class ShardedEngine:
    """A DeepSpeed engine with the two verbs that objectives need, and `update`.

    DeepSpeed counts micro-batches in ``step()``: between two backward passes it only counts, after the last one it
    updates the weights. That last call is `update`, so that a loss can be looked at before it changes anything.

    With `optimizer.ema` it also keeps the moving average of all weights, sharded and placed as AdamW's state is.
    """

    def __init__(self, module: nn.Module, config: RunConfig, world_size: int, device: torch.device):
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed  # here and not above: it probes the machine at import

        if device.type == "cpu":
            # Else every first run compiles collectives that only inference calls; killed meanwhile, it leaves a lock
            # behind for which all later runs wait without a word.
            deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        self._deepspeed = deepspeed
        optimizer = torch.optim.AdamW(
            parameter_groups(module, config),
            lr=config.reconstruct.learning_rate,
            betas=config.optimizer.betas,
            fused=True,
        )
        self.wrapped, self.optimizer, _, _ = deepspeed.initialize(
            model=module.to(device),
            optimizer=optimizer,
            config=settings(config, world_size, sum(p.numel() for p in module.parameters())),
            dist_init_required=False,
        )
        self._pending = False
        self.average = Average(self._masters(), config.optimizer.ema) if config.optimizer.ema else None

    def __call__(self, inputs: Inputs, stage: str) -> dict[str, Tensor]:
        return self.wrapped(inputs, stage)

    def backward(self, loss: Tensor) -> None:
        if self._pending:
            self.wrapped.step()
        self.wrapped.backward(loss)
        self._pending = True

    def update(self, rates: Mapping[str, float]) -> None:
        """Change the weights by what `backward` accumulated, at the learning rate of their domain."""
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["domain"]] * group["share"]
        self.wrapped.step()
        self._pending = False
        if self.average is not None:
            self.average.update(self._masters())

    def gradient_norm(self) -> float:
        """Norm of the last update's gradient before clipping; NaN where DeepSpeed does not tell."""
        norm = self.wrapped.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are their moving average; as they are without `optimizer.ema`. All workers must enter it.

        They are exchanged in place, so it takes no more memory, and come back bit for bit. An error inside leaves the
        average in place: it ends the run, and a collective call here would wait for workers that have left.
        """
        if self.average is None:
            yield
            return
        self._exchange(self.average)
        yield
        self._exchange(self.average)

    def weights(self, prefix: str) -> dict[str, Tensor]:
        """Whole weights of a submodule on the CPU: the fp32 ones that AdamW updates, also of a bf16 engine.

        Every worker must call it, since they are gathered.
        """
        found = {}
        for name, parameter in self.wrapped.module.get_submodule(prefix).named_parameters():
            whole = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
            if whole is None:  # no ZeRO
                whole = self._copies().get(parameter, parameter)
            found[name] = whole.detach().to("cpu", torch.float32, copy=True)
        return found

    def save(self, folder: str) -> None:
        self.wrapped.save_checkpoint(folder, tag="engine")

    def load(self, folder: str) -> None:
        self.wrapped.load_checkpoint(folder, tag="engine")

    def _masters(self) -> list[Tensor]:
        """The fp32 weights that AdamW updates in this worker: its shares under ZeRO, everything without."""
        flat = getattr(self.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 hides them from param_groups
        return list(flat) if flat is not None else [p for g in self.optimizer.param_groups for p in g["params"]]

    def _copies(self) -> dict[Tensor, Tensor]:
        """bf16 weight -> the fp32 one that AdamW updates, of a bf16 engine without ZeRO."""
        pairs = zip(getattr(self.optimizer, "fp16_groups", ()), getattr(self.optimizer, "fp32_groups", ()), strict=True)
        return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}

    @torch.no_grad()
    def _exchange(self, average: Average) -> None:
        """Swap the weights and their average, also in what the model computes with."""
        average.exchange(self._masters())
        optimizer, stage = self.optimizer, self.wrapped.zero_optimization_stage()
        if stage == 3:
            optimizer.checkpoint_event_prologue()  # small weights are kept whole; they are gathered anew below
            for flat, master in zip(optimizer.fp16_partitioned_groups_flat, self._masters(), strict=True):
                flat.data.copy_(master.data)  # one and the same in fp32
            optimizer.checkpoint_event_epilogue()
        elif stage:
            optimizer.update_lp_params()
        else:
            for low, high in self._copies().items():
                low.copy_(high)
