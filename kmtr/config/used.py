"""Settings that each command reads: the one table that its ``--help`` is made from.

Every command takes every setting, so that one line of settings serves all commands of a run; what it does not read
changes nothing.
"""

from __future__ import annotations

from typing import Any

from kmtr.config.core import keys
from kmtr.config.whole import READ_BESIDES, RUN_SECTIONS, RunConfig

_TRAINING = RUN_SECTIONS | READ_BESIDES
_SCORING = {f"evaluate.{name}" for name in ("subjects", "dense", "mapped", "bootstrap")}
"""Settings that scoring a model of tasks reads besides."""

USED: dict[str, set[str]] = {
    "simulate": {"data.root", "data.views", "data.sax_slices", "data.frames", "data.matrix", "shards", "simulate"},
    "ingest": {"seed", "data.root", "shards", "ingest"},
    "verify": {"seed", "data", "plan", "sampling", "model.patch", "evaluate.accelerations", "storage", "verify"},
    "doctor": _TRAINING,
    "pretrain": _TRAINING - {"task"},
    "finetune": (_TRAINING - {"stage"}) | _SCORING,
    "evaluate": (RUN_SECTIONS - {"train"}) | {"train.device", "train.bf16", "evaluate"},  # of train: the run's identity
    "demo": (_TRAINING - {"stage"}) | {"evaluate", "shards", "simulate"},
    "predict": {"data.root", "data.verify_pages", "data.cache", "data.cache_gib", "train.device", "predict"}
    | {"storage.root", "tracking.uri"},  # of a model in MLflow's registry: the store
    "export": {"seed", "data", "sampling", "export"},
    "send": {"storage.root", "tracking.uri"},
    "study": _TRAINING | _SCORING | {"study"},
    "search": _TRAINING | {"search"},
    "bench": (RUN_SECTIONS - {"run", "tracking"}) | {"shards", "bench"},
}
"""Command -> sections, and single keys where it reads no more of a section."""


def settings_of(command: str) -> list[tuple[str, Any]]:
    """Dotted key and pydantic field of all that a command reads, in the order of the configuration."""
    used = USED[command]
    return [(key, info) for key, info in keys(RunConfig) if key in used or key.partition(".")[0] in used]
