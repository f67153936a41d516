"""Prediction by Ray Data's own actors, whole and killed half way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from exported import model_folder
from killed_command import killed_when
from test_predict import asked, content
from torch import Tensor

import kmtr
from kmtr.config import RunConfig
from kmtr.evaluate.predict import command
from kmtr.evaluate.predict.parts import Done, Job, PartWriter

pytestmark = pytest.mark.ray


def test_killed_half_way_it_ends_with_the_bytes_of_one_process(
    cluster: None, small: RunConfig, tables: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = model_folder(tmp_path / "model", small, tables), tmp_path / "ray"
    words = asked(model, small.data.root, out, "predict.embeddings=true", "predict.workers=2")
    killed_when(lambda: any(out.glob("parts/*.json")), ["jobs/predict.py", *words])
    assert not (out / "refused.json").exists()
    time.sleep(0.5)  # the actors of the killed job end too
    written = [path for path in out.glob("p*s/*") if path.suffix != ".tmp"]  # what was cut off is swept away
    before = {path: path.stat().st_mtime_ns for path in written}
    said = command.run(words)
    assert said["workers"] == 2
    assert said["computed"] < said["parts"] == 11
    kept = [path for path, changed in before.items() if path.stat().st_mtime_ns == changed]
    assert len([path for path in kept if path.suffix == ".json"]) == 11 - said["computed"]

    loaded, threads = kmtr.load_model(model), torch.get_num_threads()

    def alone(job: Job, files: dict[str, bytes], missing: Sequence[int], *_: object) -> Iterator[tuple[int, Done]]:
        writer = PartWriter(job, loaded)
        yield from ((number, writer(number)) for number in missing)

    monkeypatch.setattr(command, "predicted", alone)
    torch.set_num_threads(1)
    command.run(asked(model, small.data.root, tmp_path / "one", "predict.embeddings=true"))
    torch.set_num_threads(threads)
    assert content(out) == content(tmp_path / "one")
