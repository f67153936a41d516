"""Numbers of workers that a run takes, and what it leans on inside of Ray Train."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    PreemptingState,
    ReschedulingState,
    RestartingState,
)
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from kmtr.train import checkpoint, loop, trainer


@pytest.mark.parametrize(("room", "taken"), [(1, 0), (2, 2), (3, 2), (4, 4), (5, 4), (7, 4), (8, 8), (9, 8)])
def test_the_largest_divisor_that_there_is_room_for(room: int, taken: int) -> None:
    assert trainer.usable(room, (2, 4, 8)) == taken


def test_room_that_is_left_over_and_a_wait_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    now = [0.0]

    class Recorder:
        def __init__(self, name: str):
            assert name == "progress"

        def say(self, line: str) -> None:
            said.append(line.strip())

    monkeypatch.setattr(trainer, "Sender", Recorder)
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    scaling = ScalingConfig(num_workers=(2, 8), resources_per_worker={"CPU": 0.5})
    policy = trainer.DivisorPolicy(scaling, (2, 4, 8), "progress")

    def count(*cpus: float) -> int:
        return policy._count_possible_workers({f"node{i}": {"CPU": n} for i, n in enumerate(cpus)})

    assert count(1, 1) == 4
    assert said == []
    assert [count(1.5, 1), count(1.5, 1)] == [4, 4]
    assert len(said) == 1
    assert said[0].startswith("workers       room for 5, 4 taken: numbers that share the global batch evenly are 2, 4")
    assert [count(0.5), count(0.5)] == [0, 0]
    assert len(said) == 2
    assert said[1] == "waiting       for 2 worker(s): the cluster has room for 1"
    now[0] += trainer.SAID_EVERY_S
    assert count(0.5) == 0
    assert len(said) == 3


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        ({1: ActorDiedError()}, "worker 1: its process or node is gone"),
        ({2: ActorDiedError(), 0: ActorDiedError()}, "worker 0, 2: their processes or nodes are gone"),
        ({1: WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())}, "worker 1: its process"),
        ({0: RuntimeError("Connection closed by peer"), 1: ActorDiedError()}, "worker 1: its process or node is gone"),
        (
            {1: OutOfMemoryError("the node is running low on memory")},
            "worker 1: killed, since its node had no memory left",
        ),
        ({1: ValueError("a reason\nadvice")}, "worker 1: a reason"),
        ({}, "the workers"),
    ],
)
def test_who_was_lost_is_said_in_words(failures: dict[int, Exception], said: str) -> None:
    assert trainer.lost(failures).startswith(said)
    assert "\n" not in trainer.lost(failures)
    if failures:
        told = trainer.reason(WorkerGroupError("two\nlines", failures))
        assert told.startswith(said)
        assert "once more than train.max_failures" in told


def test_a_process_that_is_killed_for_memory_is_said_without_ray_s_advice() -> None:
    advice = "2 worker(s) were killed due to the node running low on memory.\nRefer to the documentation on how"
    for error in (OutOfMemoryError(advice), RuntimeError(advice)):
        told = trainer.reason(error)
        assert told.startswith("Ray killed a process of the run, since its node had no memory left")
        assert "\n" not in told
    assert trainer.reason(RuntimeError("a traceback\nthe reason")) == "the reason"


def test_losses_are_told_and_counted_and_a_wait_for_room_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    now = [100.0]

    class Recorder:
        def __init__(self, name: str):
            assert name == "progress"

        def say(self, line: str) -> None:
            said.append(line.strip())

        def restarted(self) -> None:
            said.append("restarted")

        def save(self) -> None:
            said.append("saved")

    monkeypatch.setattr(trainer, "Sender", Recorder)
    monkeypatch.setattr(trainer, "described", lambda: "1 node(s), 2 CPUs, 0 GPUs")
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    told = trainer.Told("progress", most=3)
    running = InitializingState()
    error = WorkerGroupError("lost", {1: ActorDiedError()})
    for count in (1, 2):
        told.after_controller_state_update(running, RestartingState(error))
        line = "lost          worker 1: its process or node is gone; all start again from the last checkpoint"
        assert said[-2:] == ["restarted", f"{line} (loss {count} of at most 3)"]
    taken = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"n": [3, 1]})
    told.after_controller_state_update(running, PreemptingState(taken, 0.0))
    assert said[-2:] == ["saved", "preemption    the node of worker 1, 3 is about to be taken away; saving now"]
    del said[-2:]
    waiting = ReschedulingState(ControllerError(WorkerGroupStartupTimeoutError(2)))
    for _ in range(3):
        told.after_controller_state_update(running, waiting)
    assert len(said) == 5
    assert said[-1].startswith("waiting       for room for the workers; the cluster has 1 node(s), 2 CPUs, 0 GPUs: ")
    now[0] += trainer.SAID_EVERY_S
    told.after_controller_state_update(running, waiting)
    assert len(said) == 6


def test_ray_train_still_has_what_the_trainer_replaces() -> None:
    """A new version that moves it must be met here, not in a run."""
    start = inspect.getsource(DataParallelTrainer._initialize_and_run_controller)
    assert "self._register_sigint_handler(controller)" in start
    assert "ray.get(controller.run.remote())" in start
    assert 'self._requester_id = f"train-{train_run_context.run_id}"' in inspect.getsource(
        ElasticScalingPolicy.after_controller_start
    )
    assert "print_to_stdstream(" in inspect.getsource(ray._private.worker.listen_error_messages)
    fit = inspect.getsource(DataParallelTrainer.fit)
    assert "scaling_policy=create_scaling_policy(self.scaling_config)" in fit
    assert "self._initialize_and_run_controller(" in fit
    assert list(inspect.signature(ElasticScalingPolicy._count_possible_workers).parameters) == [
        "self",
        "reserved_resources",
    ]
    for name in ("make_decision_for_running_worker_group", "make_decision_for_non_running_worker_group"):
        assert "self._count_possible_workers(reserved_resources)" in inspect.getsource(
            getattr(ElasticScalingPolicy, name)
        )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is half written"),
        (b'{"ray_version": "2.60', "is half written"),
        (b"[1]", "is half written"),
        (b'{"ray_version": "1.0"}', "is of Ray 1.0"),
        (json.dumps({"ray_version": ray.__version__}).encode(), ""),
    ],
)
def test_a_list_that_ray_train_can_not_read_is_set_aside_and_not_the_checkpoints(
    content: bytes, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.train

    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    place = tmp_path / "train"
    for name, step, files in (("checkpoint_1", 3, 2), ("checkpoint_2", 6, 2), ("checkpoint_3", 9, 1)):
        (place / name).mkdir(parents=True)
        head = {"format": checkpoint.FORMAT, "workers": 2, "ema": False, "model": {}, "progress": {"step": step}}
        (place / name / checkpoint.HEAD).write_text(json.dumps(head))
        for rank in range(files):  # the last one was being written
            (place / name / f"sha256-rank{rank:02d}.json").write_text("{}")
            (place / name / f"state-rank{rank:02d}.safetensors").touch()
    assert trainer.set_aside(tmp_path) == ""
    assert loop.newest(tmp_path) is None  # Ray Train knows of none, and nothing says that it has forgotten one
    (place / checkpoint.LIST).write_bytes(content)
    assert trainer.set_aside(tmp_path) == why
    assert loop.newest(tmp_path) == (place / "checkpoint_2" if why else None)
    assert (place / checkpoint.LIST).is_file() is not bool(why)
    assert trainer.set_aside(tmp_path) == ""
