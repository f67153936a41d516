"""Checkpoints: all that a run needs to go on, hashed by whoever wrote it, readable by any number of workers.

state-rankNN.safetensors     pieces of weights, AdamW's moments, EMA and best weights of one worker (`state`)
checkpoint.json              format, step, what the run knows of itself, the model's shapes, how it was executed
sha256-rankNN.json           hashes of the files of one worker

Nothing in it is unpickled. `export_encoder_from` makes an encoder of it without a model or a process group.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import torch

from kmtr.config import RunConfig
from kmtr.exported import KSPACE, Trained, export_encoder, export_model
from kmtr.train import state
from kmtr.train.engine import ShardedEngine
from kmtr.train.state import CheckpointError

FORMAT = 1
"""Format number of a checkpoint; another is refused."""
HEAD = "checkpoint.json"
LIST, ASIDE = "checkpoint_manager_snapshot.json", "checkpoint_manager_snapshot.aside"
"""Ray Train's list of a run's checkpoints, beside them, and its name where Ray Train could not read it."""


@dataclass
class Progress:
    """Progress of a run, and its memory across restarts.

    Attributes:
        step: optimizer steps done, skipped ones included: the place in the data's order and in the schedule.
        skipped: of those, steps whose gradient was not finite.
        metrics: of the last validation; a run that was killed behind its last step still ends with them.
        reference: validation metrics at the end of masked reconstruction, for alignment's guard.
        stopped: the guard ended alignment, or patience training on labels.
        best_step: step of the best validation of training on labels (`choice`); 0: there was none. Where its weights
            are kept, the checkpoint has them as well.
        best: metrics of that validation.
        worse: validations since.
        layouts: [first step, how it was executed] of each change (`layout_of`), the present one last.
    """

    step: int = 0
    skipped: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    reference: dict[str, float] = field(default_factory=dict)
    stopped: bool = False
    best_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    worse: int = 0
    layouts: list[tuple[int, dict[str, Any]]] = field(default_factory=list)


_PROGRESS = pydantic.TypeAdapter(Progress)


def layout_of(config: RunConfig, world: int) -> dict[str, Any]:
    """Execution of a run by so many workers: what may change when it resumes, since its numbers stay the same."""
    train = config.train
    return {
        "workers": world,
        "zero_stage": train.zero_stage,
        "accumulation": config.accumulation(world),
        "offload": train.offload,
        "loader": config.data.loader,
    }


@dataclass(frozen=True)
class Part:
    """A worker's part of a checkpoint, copied; training may go on meanwhile.

    Attributes:
        head: of the checkpoint, as JSON; empty but for the first worker's.
    """

    rank: int
    state: state.Content
    head: str

    def write(self, folder: Path) -> None:
        """Into the folder of the checkpoint, or one of its own: the parts come together by name."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"state-rank{self.rank:02d}.safetensors", *([HEAD] if self.head else [])]
        self.state.write(folder / names[0])
        if self.head:
            (folder / HEAD).write_text(self.head)
        hashes = {name: _sha256(folder / name) for name in names}
        (folder / f"sha256-rank{self.rank:02d}.json").write_text(json.dumps(hashes))


def collect(engine: ShardedEngine, progress: Progress, config: RunConfig, rank: int, world: int) -> Part:
    """This worker's part of a checkpoint of this moment."""
    head = ""
    if rank == 0:
        known = {
            "format": FORMAT,
            "workers": world,
            "ema": bool(config.optimizer.ema),
            "model": engine.shapes(),
            "progress": asdict(progress),
        }
        head = json.dumps(known)
    return Part(rank, engine.collect(), head)


def save(folder: Path, engine: ShardedEngine, progress: Progress, config: RunConfig, rank: int, world: int) -> None:
    """Write this worker's part of the checkpoint into a folder."""
    collect(engine, progress, config, rank, world).write(folder)


class DamagedError(CheckpointError):
    """A checkpoint of which something is missing or changed: an earlier one may be whole."""


def verify(folder: Path, model: dict[str, list[int]], config: RunConfig, rank: int, world: int) -> Progress:
    """Check that a checkpoint is whole and of this model (`check_whole`, `fitting`)."""
    check_whole(folder, rank, world)
    return fitting(folder, model, config)


def complete(folder: Path) -> bool:
    """True if no file of a checkpoint is missing; what is in them is not looked at."""
    try:
        workers = read_head(folder)["workers"]
    except CheckpointError:
        return False
    return len(list(folder.glob("sha256-rank*.json"))) == len(states(folder)) == workers


def check_whole(folder: Path, rank: int, world: int) -> None:
    """Check that all files of a checkpoint are as they were written; each worker hashes its share of them.

    Raises:
        DamagedError: a file that is missing or changed.
        CheckpointError: another format.
    """
    head = read_head(folder)
    step = head["progress"]["step"]
    lists = sorted(folder.glob("sha256-rank*.json"))
    if len(lists) != head["workers"]:
        raise DamagedError(
            f"checkpoint at step {step}: expected the files of {head['workers']} workers, got those of {len(lists)}"
        )
    hashed = sorted((name, str(digest)) for part in lists for name, digest in _json(part).items())
    wanted = {HEAD, *(f"state-rank{rank:02d}.safetensors" for rank in range(head["workers"]))}
    if lacking := sorted(wanted - {name for name, _ in hashed}):
        raise DamagedError(f"checkpoint at step {step}: expected a hash of {lacking[0]}, got none; refused")
    for name, digest in hashed[rank::world]:
        if Path(name).name != name or not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise DamagedError(f"checkpoint at step {step}: {name} is missing or changed; refused")


def fitting(folder: Path, model: dict[str, list[int]], config: RunConfig) -> Progress:
    """Progress of a checkpoint that is whole.

    Args:
        model: weight -> shape, of `ShardedEngine.shapes`.

    Raises:
        CheckpointError: it is another model's, or lacks the average that the settings ask for.
    """
    head = read_head(folder)
    _same_model(head["model"], model)
    if config.optimizer.ema and not head["ema"]:
        raise CheckpointError(
            f"optimizer.ema: expected 0, since the run's checkpoint has no average, got {config.optimizer.ema}; "
            "or start anew with run.fresh=true"
        )
    try:
        return _PROGRESS.validate_python(head["progress"])
    except pydantic.ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, wrong["loc"]))
        raise DamagedError(f"checkpoint: {HEAD} is damaged: {where}: {wrong['msg']}") from None


def back_from(folder: Path) -> list[Path]:
    """A checkpoint and those that the run wrote before it, newest first."""
    return sorted((one for one in folder.parent.glob("checkpoint_*") if one.name <= folder.name), reverse=True)


def restore(folder: Path, engine: ShardedEngine) -> None:
    """Fill the engine from a checkpoint that `verify` passed on all workers.

    Raises:
        CheckpointError: part of a weight is in no file.
    """
    engine.load(states(folder))


def states(folder: Path) -> list[Path]:
    """The files of all workers that wrote."""
    return sorted(folder.glob("state-rank*.safetensors"))


def read_head(folder: Path) -> dict[str, Any]:
    """Head of a checkpoint, as `save` wrote it.

    Raises:
        DamagedError: there is none, or it can't be read.
        CheckpointError: it is of another format.
    """
    head = _json(folder / HEAD)
    if head.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint: expected format {FORMAT}, got {head.get('format', 'that of an earlier version')}; "
            "start anew with run.fresh=true"
        )
    kinds = {"workers": int, "ema": bool, "model": dict, "progress": dict}
    if any(type(head.get(key)) is not kind for key, kind in kinds.items()) or "step" not in head["progress"]:
        raise DamagedError(f"checkpoint: {HEAD} is damaged; refused")
    return head


def _json(path: Path) -> dict[str, Any]:
    """Content of a JSON file.

    Raises:
        DamagedError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise DamagedError(f"checkpoint: {path.name} is missing or damaged; refused")
    return content


def export_encoder_from(
    folder: Path, target: Path, config: RunConfig, tables: dict[str, torch.Tensor], system: str = KSPACE
) -> None:
    """The encoder of a checkpoint, of its EMA where the run keeps one: of k-space as `kmtr.load_encoder` reads it, of
    another system for training on labels alone.
    """
    model = read_head(folder)["model"]
    kind = state.AVERAGE if config.optimizer.ema else state.WEIGHT
    export_encoder(target, config, state.whole(states(folder), kind, model, f"systems.{system}"), tables, system)


def export_model_from(
    folder: Path, target: Path, config: RunConfig, tables: dict[str, torch.Tensor], trained: Trained
) -> None:
    """The whole model of a checkpoint as `kmtr.load_model` reads it: of the best validation where the run keeps that
    (`task.keep`), else of the last step, of its EMA where there is one.
    """
    head = read_head(folder)
    model = head["model"]
    kind = state.AVERAGE if config.optimizer.ema else state.WEIGHT
    if config.task.keep == "best" and head["progress"]["best_step"]:
        kind = state.BEST
    weights = {
        f"{part}.{name}": weight
        for part in ("systems", "heads")
        for name, weight in state.whole(states(folder), kind, model, part).items()
    }
    export_model(target, config, weights, tables, asdict(trained))


def _same_model(stored: dict[str, list[int]], built: dict[str, list[int]]) -> None:
    for name in (*built, *stored):
        if stored.get(name) != built.get(name):
            raise CheckpointError(
                f"checkpoint: expected {name} of shape {built.get(name, 'none, the model has no such weight')}, got "
                f"{stored.get(name, 'none')}: it is another model's; take that one's settings, or run.fresh=true"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
