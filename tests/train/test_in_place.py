"""A run in the process that asks for it: what a worker asks of Ray Train is answered there.

Whole runs, killed and resumed, are in tests/studies/test_hands.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray.train
from ray.train.v2._internal.util import _in_ray_train_worker

from kmtr.config import RunConfig, override
from kmtr.train import checkpoint, in_place
from kmtr.train.loop import newest


@pytest.fixture
def job(small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunConfig, Path]:
    monkeypatch.setattr(in_place, "_join", lambda: None)
    monkeypatch.setattr(checkpoint, "complete", lambda folder: (folder / "whole").is_file())
    (tmp_path / "train").mkdir()
    return override(small, {"train.workers": 1, "train.keep": 2}), tmp_path


def write(folder: Path, name: str, *, whole: bool = True) -> Path:
    place = folder / "train" / name
    place.mkdir()
    if whole:
        (place / "whole").touch()
    return place


def test_the_worker_finds_itself_alone_and_its_checkpoints_the_newest_kept(
    job: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = job
    first = write(folder, "checkpoint_2020-01-01_00-00-00.000000")
    write(folder, "checkpoint_2020-01-02_00-00-00.000000", whole=False)

    def worker(_: dict[str, Any]) -> dict[str, Any]:
        context = ray.train.get_context()
        assert (context.get_world_rank(), context.get_world_size(), context.get_local_world_size()) == (0, 1, 1)
        assert newest(folder) == first, "one to which a file is missing does not count"
        ray.train.report({"step": 1})
        for _ in range(3):
            ray.train.report(
                {"step": 2},
                checkpoint=ray.train.Checkpoint.from_directory("/"),
                checkpoint_upload_mode=ray.train.CheckpointUploadMode.SYNC,
                checkpoint_upload_fn=lambda _, name: write(folder, name),
            )
        return {"step": 2}

    monkeypatch.setattr(in_place, "train_worker", worker)
    ended = in_place.fit(config, {}, folder)
    assert ended.return_value == {"step": 2}
    left = sorted(path.name for path in (folder / "train").glob("checkpoint_2*"))
    assert len(left) == 3
    assert left[0] == "checkpoint_2020-01-02_00-00-00.000000", "half a checkpoint is nobody's to remove"
    assert ended.checkpoint is not None
    assert Path(ended.checkpoint.path).name == left[-1]
    assert not _in_ray_train_worker()


def test_ray_train_s_own_list_is_set_aside_so_that_its_workers_find_what_was_written_here(
    job: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = job
    (folder / "train" / checkpoint.LIST).write_text("{}")

    def failing(_: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("lost")

    monkeypatch.setattr(in_place, "train_worker", failing)
    with pytest.raises(RuntimeError, match="lost"):
        in_place.fit(config, {}, folder)
    assert not (folder / "train" / checkpoint.LIST).exists()
    assert (folder / "train" / checkpoint.ASIDE).exists()
    assert not _in_ray_train_worker()
    written = write(folder, "checkpoint_2026-01-01_00-00-00.000000")
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    assert newest(folder) == written
