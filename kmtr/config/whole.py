"""All settings together: what is refused of their combinations, and what of them a run is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import pydantic
from pydantic import Field

from kmtr.config.budget import check_lines
from kmtr.config.commands import Bench, Evaluate, Export, Ingest, Predict, Search, Shards, Simulate, Study, Verify
from kmtr.config.core import Section, changed, flatten, load, override
from kmtr.config.run import (
    MIN_ALIGNED_SUBJECTS,
    MIN_TEMPERATURE,
    Align,
    Augment,
    Data,
    Masked,
    Model,
    Optimizer,
    Plan,
    Run,
    Sampling,
    Storage,
    Task,
    Tracking,
    Train,
)
from kmtr.types import InputError


class RunConfig(Section):
    """Everything that a command does follows from one of these."""

    recipe: str = Field("", description="the recipe it came from")
    stage: Literal["both", "masked", "align", "task"] = Field(
        "both", description="pretraining stages, one after the other, or training of task.tasks"
    )
    seed: int = Field(0, ge=0, description="random seed of weights, order, patterns and hiding")
    data: Data = Data()
    plan: Plan = Plan()
    augment: Augment = Augment()
    sampling: Sampling = Sampling()
    model: Model = Model()
    masked: Masked = Masked()
    align: Align = Align()
    task: Task = Task()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    run: Run = Run()
    storage: Storage = Storage()
    tracking: Tracking = Tracking()
    shards: Shards = Shards()
    simulate: Simulate = Simulate()
    ingest: Ingest = Ingest()
    evaluate: Evaluate = Evaluate()
    predict: Predict = Predict()
    export: Export = Export()
    search: Search = Search()
    bench: Bench = Bench()
    verify: Verify = Verify()
    study: Study = Study()

    @pydantic.model_validator(mode="after")
    def _check(self) -> RunConfig:
        d, t = self.data, self.train
        sizes = t.workers.sizes(d.global_batch)
        if not sizes or d.global_batch % (sizes[-1] * t.accumulation):
            raise ValueError(
                f"data.global_batch: expected a multiple of train.workers * train.accumulation = "
                f"{sizes[-1] if sizes else t.workers} * {t.accumulation}, got {d.global_batch}"
            )
        self.check_lines(d.matrix[0])
        decides = self.stage == "task" or (self.align_steps and self.align.guard)
        if t.until % t.eval_every and decides:
            raise ValueError(
                f"train.until: expected a multiple of train.eval_every={t.eval_every}, since validations decide in "
                f"this run, got {t.until}"
            )
        if self.run.begin and not self.run.name:
            raise ValueError(
                "run.begin: expected a run.name beside it, since another beginning is another run, got none"
            )
        if d.frames % self.model.patch[0] or any(n % p for n, p in zip(d.matrix, self.model.patch[1:], strict=True)):
            raise ValueError(
                f"model.patch: expected a divisor of (data.frames, *data.matrix) = {(d.frames, *d.matrix)}, "
                f"got {self.model.patch}"
            )
        if self.model.coils > d.coils:
            raise ValueError(f"model.coils: expected at most data.coils={d.coils}, got {self.model.coils}")
        if t.eval_every % t.log_every:
            raise ValueError(
                f"train.eval_every: expected a multiple of train.log_every={t.log_every}, got {t.eval_every}"
            )
        if self.total_steps == 0:
            raise ValueError(
                "masked.steps, align.steps, task.steps: expected at least one step in the chosen stage, got 0"
            )
        if self.stage == "task" and not self.task.tasks:
            raise ValueError("task.tasks: expected one or more tasks, as phenotypes,diseases, got none")
        if 0 < self.align_steps <= self.align.head_steps:
            raise ValueError(
                f"align.steps: expected more than align.head_steps={self.align.head_steps}, in which the encoder does "
                f"not learn, got {self.align_steps}"
            )
        if self.align.learn_temperature and self.align.temperature <= MIN_TEMPERATURE:
            raise ValueError(
                f"align.temperature: expected more than {MIN_TEMPERATURE}, the least that is learnt, got "
                f"{self.align.temperature}"
            )
        if self.align.teacher == "components" and self.align.train_image_encoder:
            raise ValueError(
                "align.train_image_encoder: expected false with align.teacher=components, which are fixed, got true"
            )
        if self.align_steps and d.global_batch < MIN_ALIGNED_SUBJECTS:
            raise ValueError(
                f"data.global_batch: alignment needs at least {MIN_ALIGNED_SUBJECTS} distinct subjects as negatives, "
                f"got {d.global_batch}; use stage=masked"
            )
        return self

    def check_lines(self, lines: int, view: str = "") -> None:
        """Check that patterns of so many lines can be drawn at every R of training and evaluation.

        Args:
            view: that has so many, for the error.

        Raises:
            InputError: too few lines would be left.
        """
        how = self.sampling
        for key, accelerations in (("sampling", how.accelerations), ("evaluate", self.evaluate.accelerations)):
            what = f"{key}.accelerations" + (f": {view}" if view else "")
            for r in accelerations:
                check_lines(lines, r, how.acs_lines, how.family, what)

    def accumulation(self, workers: int) -> int:
        """Micro-batches per step and worker when so many workers train: no micro-batch is larger than at the most.

        Raises:
            ValueError: the workers do not share the global batch evenly.
        """
        if self.data.global_batch % workers:
            raise ValueError(
                f"workers: expected a divisor of data.global_batch={self.data.global_batch}, got {workers}"
            )
        most = self.train.workers.sizes(self.data.global_batch)[-1]
        largest = self.data.global_batch // (most * self.train.accumulation)
        share = self.data.global_batch // workers
        return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= largest)

    @property
    def masked_steps(self) -> int:
        return self.masked.steps if self.stage in ("both", "masked") else 0

    @property
    def align_steps(self) -> int:
        return self.align.steps if self.stage in ("both", "align") else 0

    @property
    def task_steps(self) -> int:
        return self.task.steps if self.stage == "task" else 0

    @property
    def has_components(self) -> bool:
        """True if components of the clean image are the teacher of alignment."""
        return self.align.steps > 0 and self.align.teacher == "components"

    @property
    def total_steps(self) -> int:
        return self.masked_steps + self.align_steps + self.task_steps

    def identity(self) -> dict[str, Any]:
        """Identity of a run: dotted key -> value (as in JSON) of all that changes its mathematics (data, order, method,
        optimizer, precision) and differs from its default.

        How it is executed (workers, ZeRO stage, accumulation, offload, loader) is no part of it: its numbers are the
        same within a published tolerance, so it may change when the run resumes.
        """
        unread = {"masked", "align"} if self.stage == "task" else {"task"}
        told = {
            key: value
            for key, value in changed(self).items()
            if is_identity(key) and key.partition(".")[0] not in unread
        }
        if self.stage == "task" and (self.task.keep == "best" or self.task.patience):
            told |= {key: value for key, value in changed(self).items() if key in _CHOOSING}
        return told | ({"train.bf16": True} if self.train.bf16 else {})

    @property
    def identity_format(self) -> int:
        """Format of `identity` for this stage."""
        return TASK_FORMAT + (self.task.begin == "mean") if self.stage == "task" else IDENTITY_FORMAT

    def run_name(self, digest: str) -> str:
        """`run.name`, or recipe and hash of the identity: the same command finds its run again.

        Args:
            digest: of the data, and of the pattern file where there is one.
        """
        if self.run.name:
            return self.run.name
        what = {"format": self.identity_format, "dataset": digest} | self.identity()
        return f"{self.recipe}-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]}"


IDENTITY_FORMAT, TASK_FORMAT = 1, 4
"""Formats of `RunConfig.identity`, of pretraining and of training on labels: another number renames all such runs. It
counts up where the same settings, or defaults that no identity names, give other numbers than before. Heads that begin
at the mean are one further: they have been scaled since (`tasks.phenotypes.OnVector.scaled`).
"""

_IDENTITY = {"stage", "seed", "data", "plan", "augment", "sampling", "model", "masked", "align", "task", "optimizer"}
"""Sections that change numbers."""

_NO_IDENTITY = {
    "data.root",  # their content counts, by its hash
    "data.more",
    "sampling.file",
    "task.encoder",
    "data.loader",  # how bytes are read, not which
    "data.prefetch",
    "data.readers",
    "data.read_cpus",
    "data.verify_pages",
    "data.cache",
    "data.cache_gib",
}


_CHOOSING = {"train.eval_every", "train.eval_subjects", "train.eval_seed", "evaluate.accelerations"}
"""Settings of validation: they change the numbers of a run on labels, whose weights it chooses."""


def is_identity(key: str) -> bool:
    return key.partition(".")[0] in _IDENTITY and key not in _NO_IDENTITY


RUN_SECTIONS = {"recipe", "train", "run", "storage", "tracking"} | _IDENTITY
"""Sections that a training run reads; of the others only `READ_BESIDES`."""
READ_BESIDES = {"evaluate.accelerations"}


def run_keys(config: RunConfig, besides: Iterable[str] = ()) -> dict[str, Any]:
    """Dotted key -> value of all that a training run reads, and of the sections of a command beside it."""
    sections = RUN_SECTIONS | set(besides)
    return {
        key: value for key, value in flatten(config).items() if key.partition(".")[0] in sections or key in READ_BESIDES
    }


def parse(words: Sequence[str], recipe: str, recipes: dict[str, Any]) -> RunConfig:
    """The configuration of ``RECIPE key=value ...``; `recipes` maps a name to a function returning a RunConfig."""
    if recipe not in recipes:
        raise InputError(f"recipe: expected one of {', '.join(recipes)}, got {recipe!r}")
    return override(recipes[recipe](), given(words))


def given(words: Sequence[str]) -> dict[str, Any]:
    """Settings as typed, ``key=value ...``.

    Raises:
        InputError: another word, or a key that is given twice.
    """
    changes: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"expected key=value, got {word!r}")
        if key in changes:
            raise InputError(f"{key}: given twice")
        changes[key] = value
    return changes


def from_json(text: str) -> RunConfig:
    return load(RunConfig, text)
