"""What runs could not send is sent by a command of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmtr import tracking
from kmtr.config import RunConfig, override
from kmtr.owner import owning
from kmtr.tracking.store import client
from kmtr.train import send
from kmtr.types import InputError

pytestmark = pytest.mark.slow

AWAY = "http://127.0.0.1:9"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    changes = {"storage.root": str(tmp_path / "runs"), "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"}
    return override(RunConfig(), changes)


def left_behind(config: RunConfig, name: str) -> str:
    """Id of a run that could send nothing: 3 points, a file and its end."""
    run_id = tracking.open_run(config, name=name)
    folder = Path(config.storage.root) / name / "spool"
    spool = tracking.Spool(folder, AWAY, run_id)
    for step in range(3):
        spool.metrics(step, {"loss": 1.0 / (step + 1)})
    file = folder.parent / "note.txt"
    file.write_text("hello")
    spool.artifact(file)
    spool.end("FINISHED")
    assert spool.close(0.1) == 5
    return run_id


def test_all_runs_of_a_folder_are_sent_and_ended(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [left_behind(config, name) for name in ("one", "two")]
    store = client(tracking.tracking_uri(config))
    assert [store.get_run(run_id).info.status for run_id in ids] == ["RUNNING", "RUNNING"]
    with owning(Path(config.storage.root) / "two", "run two"):
        assert send.run(config) == {"runs": 1, "sent": 5, "left": 0}
    assert "send: two: a command is at work on it" in capsys.readouterr().out
    assert [store.get_run(run_id).info.status for run_id in ids] == ["FINISHED", "RUNNING"]
    assert send.run(config) == {"runs": 1, "sent": 5, "left": 0}
    for run_id in ids:
        assert store.get_run(run_id).info.status == "FINISHED"
        assert tracking.recorded(tracking.tracking_uri(config), run_id, ["loss"])["loss"] == [
            (0, 1.0),
            (1, 0.5),
            (2, pytest.approx(1 / 3)),
        ]
        assert [file.path for file in store.list_artifacts(run_id)] == ["note.txt"]
    assert send.run(config) == {"runs": 0, "sent": 0, "left": 0}


def test_what_can_t_be_sent_stays_and_is_counted(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left_behind(config, "one")
    monkeypatch.setattr(send, "WAIT_S", 0.5)
    away = override(config, {"tracking.uri": AWAY})
    assert send.run(away) == {"runs": 1, "sent": 0, "left": 5}
    assert "send: one: 0 of 5 records sent" in capsys.readouterr().out
    assert send.run(config)["left"] == 0


def test_a_folder_without_runs_is_one_line(config: RunConfig) -> None:
    with pytest.raises(InputError, match=r"^storage\.root: expected a folder with runs"):
        send.run(config)
