"""The command predict in one process, in place of Ray's, for promises that are not Ray's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kmtr
from kmtr.evaluate.predict import command
from kmtr.evaluate.predict.parts import Job, PartWriter


def predicted_here(patch: pytest.MonkeyPatch) -> list[int]:
    """Let `command.run` predict parts in this process.

    Returns:
        The numbers of those that it predicted, as they come.
    """
    computed: list[int] = []

    def predicted(job: Job, files: dict[str, bytes], missing: list[int], workers: int, gpu: bool) -> Any:
        model = kmtr.load_model(_files_to(files, Path(job.out).parent / "unpacked"))
        writer = PartWriter(job, model)
        for number in missing:
            computed.append(number)
            yield number, writer(number)

    patch.setattr(command, "predicted", predicted)
    patch.setattr(command, "start_ray", lambda: None)
    patch.setattr(command, "refuse_missing_gpu", lambda device: None)
    patch.setattr(command, "uses_gpus", lambda device: False)
    patch.setattr(command, "workers_of", lambda asked, gpu: 1)
    return computed


def _files_to(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
