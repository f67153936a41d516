"""The folder of a run: its name, what it is, and whether it is finished."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kmtr import tracking
from kmtr.config import RunConfig, plain
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import patterns
from kmtr.exported import WEIGHTS
from kmtr.files import write_atomic
from kmtr.types import InputError

RESULT, IDENTITY = "result.json", "identity.json"
SPEED, SPEED_BEFORE = "speed/subjects_per_s", "subjects_per_s"
"""Metric of a run, subjects/s over all workers, and its name until 2026-11."""
SPEED_CPU = "speed/subjects_per_cpu_s"
"""The same by the processor's time of a worker, on CPUs: other work on the machine changes it little."""
MASKED_ENCODER = "encoder-masked"
"""Encoder of the end of masked pretraining, in a run's folder."""
IMAGE_ENCODER = "encoder-image"
"""Image encoder of a pretraining that had one (`masked.image_weight`), in a run's folder."""
STATISTICS = "statistics.safetensors"
"""Tables of normalisation and of tasks, fitted once for a run."""


@dataclass(frozen=True)
class Outcome:
    """Result of a finished run.

    Attributes:
        run_id: of the MLflow run.
        name: of the run, its folder in storage.root.
        folder: everything that the run wrote.
        encoder: folder of the exported encoder, for `kmtr.load_encoder`; of `stage=task` the model's, for
            `kmtr.load_model`.
        metrics: of the last validation, and ``step``; with ``align_stopped`` (the step at which the guard ended
            alignment) encoder and metrics are those of the end of masked reconstruction. Of `stage=task` those of the
            model that is left, what chose it (`choice.result`), and ``task_stopped`` where patience ended the run.
            Of a run that pauses (`train.until`), of the last validation; `encoder` is empty then.
        reused: it was finished before; nothing was trained.
    """

    run_id: str
    name: str
    folder: str
    encoder: str
    metrics: dict[str, float]
    reused: bool = False


def run_folder(config: RunConfig, dataset: Dataset) -> tuple[str, Path]:
    """Name and folder of the run that this configuration resumes; with ``run.fresh=true`` those of a new one.

    A run started anew gets ``.2``, ``.3``, ... behind its name, and is the one resumed from then on: nothing is
    deleted.

    Raises:
        InputError: a run of that name is another one: the first key that differs is named.
    """
    base = config.run_name(content_digest(config, dataset))
    root = Path(config.storage.root)
    number = 1
    while (root / (f"{base}.{number + 1}")).is_dir():
        number += 1
    if config.run.fresh and (root / _numbered(base, number)).is_dir():
        number += 1
    name = _numbered(base, number)
    _check_same(name, root / name, identity_of(config, dataset))
    return name, root / name


def identity_of(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """Identity of the run, as its folder keeps it."""
    begun = {"run.begin": config.run.begin} if config.run.begin else {}
    digest = content_digest(config, dataset)
    return {"format": config.identity_format, "dataset": digest, "settings": config.identity() | begun}


def begin(folder: Path, config: RunConfig, dataset: Dataset) -> None:
    """Make the folder of a run, or find it again."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / IDENTITY, identity_of(config, dataset))


def finished(folder: Path) -> Outcome | None:
    """The outcome of a run that ended well, or None."""
    path = folder / RESULT
    return Outcome(**json.loads(path.read_text()) | {"reused": True}) if path.is_file() else None


def finish(outcome: Outcome) -> None:
    """Keep the outcome: from now on the run is finished."""
    write_json(Path(outcome.folder) / RESULT, asdict(outcome))


def speeds(folder: Path, metric: str = SPEED) -> list[tuple[int, float]]:
    """(step, subjects/s over all workers) that a run logged, in order.

    Args:
        metric: `SPEED` or `SPEED_CPU`.
    """
    logged = tracking.history(folder / "spool")
    return logged.get(metric) or (logged.get(SPEED_BEFORE, []) if metric == SPEED else [])


def by_setting(text: str, folder: Path) -> str:
    """An error in one line: a full disk by the setting that names its place, others as they are."""
    if "No space left on device" not in text:
        return text
    return f"storage.root: no room left in {folder}; make some, and the same command goes on ({text})"


def write_json(path: Path, content: Any) -> None:
    """The whole file or none of it."""
    write_atomic(path, json.dumps(content))


def content_digest(config: RunConfig, dataset: Dataset) -> str:
    """Digest of all content that changes a run's numbers: data, pattern file, the encoder that it starts from."""
    start = ""
    if config.stage == "task" and config.task.encoder not in ("", "none"):
        with (Path(config.task.encoder) / WEIGHTS).open("rb") as file:
            start = hashlib.file_digest(file, "sha256").hexdigest()
    return dataset.digest + patterns.digest(config.sampling) + start


def _numbered(base: str, number: int) -> str:
    return base if number == 1 else f"{base}.{number}"


def _check_same(name: str, folder: Path, wanted: dict[str, Any]) -> None:
    """Refuse a folder of another run, as one that `run.name` names may be."""
    path = folder / IDENTITY
    if not path.is_file():
        return
    known = json.loads(path.read_text())
    advice = "take another run.name, or run.fresh=true"
    if known["format"] != wanted["format"]:
        raise InputError(f"run {name}: written under another format of its settings ({known['format']}); {advice}")
    old, new = known["settings"], wanted["settings"]
    defaults = plain(RunConfig())
    for key in sorted({*old, *new}):
        before, now = old.get(key, defaults.get(key)), new.get(key, defaults.get(key))
        if before != now:
            raise InputError(f"{key}: run {name} has {_typed(before)}, got {_typed(now)}; {advice}")
    if known["dataset"] != wanted["dataset"]:
        raise InputError(f"data.root: run {name} learnt from other data (or another sampling.file); {advice}")


def _typed(value: Any) -> str:
    """As on a command line."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
