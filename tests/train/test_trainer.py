"""Numbers of workers that a run takes, and what it leans on inside of Ray Train."""

from __future__ import annotations

import inspect

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from kmtr.train import trainer


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


def test_ray_train_still_has_what_the_trainer_replaces() -> None:
    """A new version that moves it must be met here, not in a run."""
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
