"""Hands of a study: what is made at the same time, and rows that do not depend on who makes them, or who dies."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from kmtr.config import RunConfig, override
from kmtr.studies import hands, tasks
from kmtr.studies.hands import Done, Finished, Needs, ready
from kmtr.studies.task_rows import FILE, FLOORS, PRETRAINED, SCRATCH, Asked
from kmtr.studies.task_study import Study
from kmtr.train.progress import Sender
from kmtr.types import KmtrError, StoppedError

ROWS = [Asked(0, name, ("segmentation",), 0) for name in ("a", "b", "c")]
A, B, C = ROWS


def test_a_row_waits_for_those_that_it_needs_and_for_what_another_one_is_making() -> None:
    free = {one: Needs() for one in ROWS}
    assert ready(ROWS, free, []) == A
    assert ready([], {}, []) is None
    behind = free | {A: Needs(after=frozenset([B]))}
    assert ready(ROWS, behind, []) == B, "not before another one that waits"
    assert ready([A, C], behind, [B]) == C, "nor while it is being made"
    assert ready([A], behind, []) == A, "one that is done, or not asked for, keeps nobody back"
    same = {one: Needs(makes=frozenset(["pretraining"])) for one in (A, B)} | {C: Needs(makes=frozenset(["speed"]))}
    assert ready([B, C], same, [A]) == C
    assert ready([B], same, [A]) is None
    assert ready([B], same, [C]) == B


def test_what_needs_a_row_that_failed_is_left_out_with_what_needs_that() -> None:
    needs = {A: Needs(), B: Needs(after=frozenset([A])), C: Needs(after=frozenset([B]))}
    assert hands.left_out([A], [C, B], needs.__getitem__) == [C, B]
    assert hands.left_out([A], ROWS[1:], lambda _: Needs()) == []
    assert hands.left_out([B], [C], needs.__getitem__) == [C]


def test_lines_are_passed_on_whole() -> None:
    said: list[str] = []
    stream = hands._Lines(said.append)
    for piece in ("a", "b\nc", "\n\n", "  d  \n", "e"):
        print(piece, end="", file=stream)
    assert said == ["ab", "c", "  d"]


SMALL = {
    "train.workers": 1,
    "train.threads": 1,
    "train.cpus_per_worker": 2,
    "train.eval_every": 100,
    "train.checkpoint_every": 1,
    "train.max_failures": 1,
    "masked.steps": 2,
    "align.steps": 0,
    "study.seeds": (0,),
    "study.task_labels": (12,),
    "study.single_labels": (12,),
    "task.tasks": ("segmentation",),
    "task.steps": 3,
    "task.frames": 1,
    "evaluate.accelerations": (2, 4),
    "evaluate.bootstrap": 20,
}


def dying(study: Study, asked: Asked, done: Done) -> Finished:
    """A row; the process of the one from scratch is killed once, in the step behind the first checkpoint."""
    from kmtr.studies import tasks as unchanged
    from kmtr.train import start, step
    from kmtr.train.folder import run_folder

    died, backward = Path(study.config.storage.root) / "died", step.accumulate
    if asked.start != SCRATCH:
        return unchanged.make(study, asked, done)
    begun = run_folder(study.settings(asked, start.NONE), study.dataset)[1] / "train"

    def killed(*arguments: Any) -> Any:
        found = backward(*arguments)
        if not died.exists() and [*begun.glob("checkpoint_2*")]:
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    step.accumulate = killed  # type: ignore[assignment]
    try:
        return unchanged.make(study, asked, done)
    finally:
        step.accumulate = backward


def failing(study: Study, asked: Asked, done: Done) -> Finished:
    raise KmtrError(f"row {asked.start}: no more")


def interrupt_after_checkpoints(root: Path) -> None:
    """Ctrl-C once training on labels has written a few."""
    while len([*root.glob("tiny-*/train/checkpoint_2*")]) < 5:
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)


class Plain:
    """A hand without a screen, of a study that is no more than its settings."""

    def __init__(self, study: Study, number: int, threads: int, progress: str):
        self.study = study

    def here(self) -> None:
        pass

    def make(self, function: Any, asked: Asked, done: Done) -> Finished:
        found: Finished = function(self.study, asked, done)
        return found


def meeting(study: Study, asked: Asked, done: Done) -> Finished:
    """A row that makes what the other one needs too, and goes on once that one is being made."""
    root = Path(study.config.storage.root)
    (root / "shared").touch()
    (root / asked.start).touch()
    until = time.monotonic() + 60
    while len([*root.glob("[ab]")]) < 2:
        if time.monotonic() > until:
            raise KmtrError("the other row was not begun")
        time.sleep(0.1)
    return Finished(asked, {}, {})


def failing_alone(study: Study, asked: Asked, done: Done) -> Finished:
    """The second row fails; the first one ends after that."""
    root = Path(study.config.storage.root)
    (root / asked.start).touch()
    if asked.start == "b":
        raise KmtrError("row b: no more")
    while not (root / "b").exists():
        time.sleep(0.1)
    return Finished(asked, {}, {})


def failing_beside(study: Study, asked: Asked, done: Done) -> Finished:
    """The second row fails once the first one is under way; that one goes on until it is told to stop."""
    root = Path(study.config.storage.root)
    (root / asked.start).touch()
    while len([*root.glob("[ab]")]) < 2:
        time.sleep(0.1)
    if asked.start == "b":
        raise KmtrError("row b: no more")
    while not (root / "told").exists():
        time.sleep(0.1)
    (root / "saved").touch()
    return Finished(asked, {}, {})


class Listening(Plain):
    """A hand that hears when the study is to stop."""

    def __init__(self, study: Study, number: int, threads: int, progress: str):
        super().__init__(study, number, threads, progress)
        self.sender = Sender(progress)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while not (self.sender.beat(0, 0, "") or {}).get("stop"):
            time.sleep(0.2)
        (Path(self.study.config.storage.root) / "told").touch()


def made_by(config: RunConfig, folder: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Rows of a study without times, and their files of values."""
    own = override(config, {"storage.root": str(folder / "runs"), "study.rows": str(folder / "rows")})
    said = tasks.run(own)
    assert said["missing"] == 0
    lines = [json.loads(line) for line in (folder / "rows" / FILE).read_text().splitlines()]
    for row in lines:
        for name in ("row_s", "training_s", "pretraining_s", "date"):
            row.pop(name, None)
    values = {path.name: path.read_bytes() for path in (folder / "rows").glob("*.parquet")}
    return sorted(lines, key=lambda row: (row["start"], row["tasks"])), values


@pytest.fixture
def config(cluster: None, small: RunConfig, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes can't import tests
    return override(small, SMALL)


@pytest.mark.ray
def test_a_row_is_begun_as_soon_as_what_it_needs_is_there_not_when_the_row_that_made_it_ends(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hands, "LOOK_S", 0.2)
    study: Any = SimpleNamespace(
        config=override(config, {"storage.root": str(tmp_path)}), rows=SimpleNamespace(read=dict)
    )
    monkeypatch.setattr(hands, "Hand", Plain)

    def needs(asked: Asked) -> Needs:
        return Needs(makes=frozenset() if (tmp_path / "shared").exists() else frozenset(["shared"]))

    ended = [one.asked for one in hands.side_by_side(study, [A, B], meeting, needs)]
    assert sorted(ended) == [A, B]


@pytest.mark.ray
def test_a_row_that_fails_leaves_the_others_going_on_but_for_those_that_need_it(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study: Any = SimpleNamespace(
        config=override(config, {"storage.root": str(tmp_path)}), rows=SimpleNamespace(read=dict)
    )
    monkeypatch.setattr(hands, "Hand", Plain)
    after = {C: Needs(after=frozenset([B]))}
    last = Asked(0, "d", ("segmentation",), 0)
    found = hands.side_by_side(study, [A, B, C, last], failing_alone, lambda one: after.get(one, Needs()))
    ended = []
    with pytest.raises(KmtrError, match=r"^row b: no more$"):
        ended.extend(one.asked for one in found)
    assert sorted(ended) == [A, last]
    said = capsys.readouterr().out
    assert f"[{B.title}] failed, and is left out: row b: no more" in said
    assert f"[{C.title}] is left out: it needs the row that failed" in said


@pytest.mark.ray
def test_rows_under_way_are_saved_when_too_many_fail(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study: Any = SimpleNamespace(
        config=override(config, {"storage.root": str(tmp_path)}), rows=SimpleNamespace(read=dict)
    )
    monkeypatch.setattr(hands, "Hand", Listening)
    monkeypatch.setattr(hands, "MOST_FAILED", 0)
    with pytest.raises(KmtrError, match="row b: no more"):
        list(hands.side_by_side(study, [A, B], failing_beside, lambda _: Needs()))
    assert (tmp_path / "saved").exists()
    assert f"[{B.title}] failed: row b: no more; the rows under way are saved" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ray
def test_two_hands_of_which_one_is_killed_make_the_rows_of_one_process(
    config: RunConfig,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "make", dying)
        rows, values = made_by(config, tmp_path / "hands")
    said = capsys.readouterr().out
    assert "3 row(s), 2 at once" in said
    assert "lost: its process is gone; it goes on from its last checkpoint" in said
    assert "[seed 0, scratch, segmentation, 12 labels]   step      1  goes on" in said
    assert [row["start"] for row in rows] == [FLOORS, PRETRAINED, SCRATCH]
    request.getfixturevalue("without_ray")
    alone, same = made_by(config, tmp_path / "alone")
    assert rows == alone
    assert values == same


@pytest.mark.full
@pytest.mark.ray
def test_a_row_that_fails_ends_the_study_and_ctrl_c_saves_what_is_trained(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "make", failing)
        with pytest.raises(KmtrError, match=r"^row (pretrained|scratch): no more$"):
            made_by(config, tmp_path / "failing")

    root = tmp_path / "longer"
    threading.Thread(target=interrupt_after_checkpoints, args=(root,), daemon=True).start()
    with pytest.raises(StoppedError):
        tasks.run(override(config, {"task.steps": 4000, "storage.root": str(root)}))
    said = capsys.readouterr().out
    assert "stopping      saving a checkpoint first" in said
    assert "lost" not in said
