"""The Ray Train trainer of a run: its number of workers may follow the cluster, and it says what it loses and awaits.

This file and `in_place.py` are the only ones that lean on the inside of Ray Train. Its elastic policy takes any number
of workers between two bounds. A global batch can be shared by its divisors only, so `DivisorPolicy` takes the largest
of those that there is room for; a worker more would have nothing to do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import ray.train
from ray.core.generated import gcs_pb2
from ray.exceptions import RayActorError, RayError
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    PreemptingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
)
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.util.placement_group import PlacementGroup, remove_placement_group

from kmtr.config import RunConfig
from kmtr.ray_start import described
from kmtr.train import checkpoint, room
from kmtr.train.loop import train_worker
from kmtr.train.progress import Sender
from kmtr.types import KmtrError, first_line, last_line

SAID_EVERY_S = 30.0
END_S = 3.0
ANSWER_S = 5.0
"""Time for an answer of Ray's own actors."""


def usable(room: int, sizes: Sequence[int]) -> int:
    """Largest of the numbers of workers that can be used, at most `room`; 0: none of them fits."""
    return max((size for size in sizes if size <= room), default=0)


class DivisorPolicy(ElasticScalingPolicy):
    """Ray Train's elastic policy, for numbers of workers that share the global batch evenly.

    It says when it waits for room, and when room is left over.

    Args:
        sizes: those numbers.
        progress: name of the progress actor.
        run: name of the run, which has one command at a time.
    """

    def __init__(self, scaling_config: ScalingConfig, sizes: Sequence[int], progress: str, run: str = ""):
        super().__init__(scaling_config)
        self.sizes, self.progress, self.run = tuple(sizes), progress, run
        self._said = ("", float("-inf"))

    def after_controller_start(self, train_run_context: Any) -> None:
        """Under the run's name: a controller in place of one that was lost, or of a command that was killed, takes over
        what that one had reserved, which else expires minutes later.
        """
        super().after_controller_start(SimpleNamespace(run_id=self.run))

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Workers are about to be started: from what there is now, since a node may have gone a moment ago."""
        self._maybe_send_resource_request()
        asked = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        try:
            ray.get(asked, timeout=ANSWER_S)
        except RayError:  # it starts again itself: look again
            return NoopDecision()
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, ResizeDecision):
            self._say(f"starting      {decision.num_workers} worker(s)", again_after_s=0.0)
        return decision

    def _count_possible_workers(self, *args: Any, **kwargs: Any) -> int:
        room = super()._count_possible_workers(*args, **kwargs)
        taken = usable(room, self.sizes)
        if taken == 0:
            self._say(f"waiting       for {self.sizes[0]} worker(s): the cluster has room for {room}", SAID_EVERY_S)
        elif taken < room:
            self._say(
                f"workers       room for {room}, {taken} taken: numbers that share the global batch evenly are "
                f"{', '.join(map(str, self.sizes))}"
            )
        return taken

    def _say(self, text: str, again_after_s: float = float("inf")) -> None:
        """Tell the driver, once, or again after a time."""
        last, when = self._said
        if text != last or time.monotonic() - when >= again_after_s:
            self._said = (text, time.monotonic())
            Sender(self.progress).say(f"               {text}")


class Told(ControllerCallback):
    """Says in the driver which workers were lost, and that there is no room for them; the next say where they go on.

    Args:
        progress: name of the progress actor.
        most: losses that the run survives.
    """

    def __init__(self, progress: str, most: int):
        self.progress, self.most = progress, most
        self.lost = 0
        self._said = float("-inf")

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        sender = Sender(self.progress)
        if isinstance(current_state, RestartingState):
            self.lost += 1
            sender.restarted()
            failures = getattr(current_state.training_failed_error, "worker_failures", {})
            sender.say(
                f"               lost          {lost(failures)}; all start again from the last checkpoint "
                f"(loss {self.lost} of at most {self.most})"
            )
        if isinstance(current_state, ResizingState):
            sender.restarted()
        if isinstance(current_state, PreemptingState):
            sender.save()
            ranks = ", ".join(map(str, sorted(current_state.preemption_info.preempted_ranks)))
            sender.say(f"               preemption    the node of worker {ranks} is about to be taken away; saving now")
        if isinstance(current_state, ReschedulingState) and time.monotonic() - self._said >= SAID_EVERY_S:
            self._said = time.monotonic()
            why = first_line(_inner(current_state.training_failed_error))
            sender.say(f"               waiting       for room for the workers; the cluster has {described()}: {why}")


def lost(failures: dict[int, Exception]) -> str:
    """Workers that were lost, and how, in words.

    Args:
        failures: rank -> what Ray says of it.
    """
    gone = (RayActorError, WorkerHealthCheckFailedError)
    dead = {rank: error for rank, error in failures.items() if isinstance(_inner(error), gone)}
    said = dead or failures
    if not said:
        return "the workers"
    ranks = ", ".join(map(str, sorted(said)))
    first = _inner(said[min(said)])
    if any(room.no_memory(_inner(error)) or room.no_memory(error) for error in said.values()):
        return f"worker {ranks}: killed, since its node had no memory left"
    if dead:
        return f"worker {ranks}: {'its process or node is' if len(dead) == 1 else 'their processes or nodes are'} gone"
    return f"worker {ranks}: {first_line(first)}"


def reason(error: Any) -> str:
    """Why Ray Train gave up, in one line.

    Args:
        error: ray.train.TrainingFailedError.
    """
    failures = getattr(error, "worker_failures", None)
    if not failures and room.no_memory(_inner(error)):
        return (
            "Ray killed a process of the run, since its node had no memory left: it needs more, or less other work "
            "beside it; the same command goes on from the last checkpoint"
        )
    if not failures:
        return last_line(_inner(error))
    return f"{lost(failures)}, once more than train.max_failures; the same command goes on from the last checkpoint"


def _inner(error: BaseException) -> BaseException:
    return getattr(error, "base_exc", getattr(error, "controller_failure", error))


class Trainer(TorchTrainer):
    """TorchTrainer with `DivisorPolicy` where the number of workers is a range. It leaves signals alone.

    Args:
        sizes, progress, run: of `DivisorPolicy`.
        kwargs: of TorchTrainer.
    """

    def __init__(self, *args: Any, sizes: Sequence[int], progress: str, run: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._policy = (tuple(sizes), progress, run)
        self.controller: Any = None

    def _initialize_and_run_controller(self, **controller: Any) -> Any:
        if len(self._policy[0]) > 1:
            assert isinstance(controller["scaling_policy"], ElasticScalingPolicy), "Ray Train has changed: trainer.py"
            controller["scaling_policy"] = DivisorPolicy(self.scaling_config, *self._policy)
        return super()._initialize_and_run_controller(**controller)

    def _register_sigint_handler(self, controller: Any) -> None:
        """No handler: Ray Train's ends the command with status 0, and nothing is saved (`progress.Display`)."""
        self.controller = controller

    def end(self) -> None:
        """End the controller, with which its workers end, and give them a moment for that."""
        if self.controller is not None:
            ray.kill(self.controller)
            time.sleep(END_S)


def trainer_of(config: RunConfig, job: dict[str, Any], folder: Path, callbacks: list[Any]) -> Trainer:
    """The trainer of a run: a fixed number of workers, or as many as share the batch and have room."""
    train = config.train
    use_gpu = room.uses_gpus(train.device)
    sizes = train.workers.sizes(config.data.global_batch)
    scaling: dict[str, Any] = {"use_gpu": use_gpu, "resources_per_worker": room.of_worker(config, gpus=use_gpu)}
    if len(sizes) == 1:
        scaling |= {"num_workers": sizes[0]}
    else:
        scaling |= {
            "num_workers": (sizes[0], sizes[-1]),
            "elastic_resize_monitor_interval_s": train.resize_every_s,
        }
    return Trainer(
        train_worker,
        train_loop_config=job,
        torch_config=torch_config(config, use_gpu),
        scaling_config=ScalingConfig(**scaling),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(max_failures=train.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=train.keep),
            callbacks=[*callbacks, Told(job["progress"], train.max_failures)],
        ),
        sizes=sizes,
        progress=job["progress"],
        run=str(folder),
    )


def fit(config: RunConfig, job: dict[str, Any], folder: Path, callbacks: list[Any], say: Callable[[str], None]) -> Any:
    """Train to the end; where the controller of the workers is lost, by a new one, as often as workers may be lost.

    Args:
        say: a line for people.

    Returns:
        Ray Train's result.

    Raises:
        ray.train.TrainingFailedError: workers were lost too often.
        KmtrError: the controller was.
    """
    most = config.train.max_failures
    for number in range(most + 1):
        if why := set_aside(folder):
            say(f"               repaired      Ray Train's list of checkpoints {why}; the checkpoints are looked at")
        trainer = trainer_of(config, job, folder, callbacks)
        try:
            return trainer.fit()
        except KeyboardInterrupt:
            trainer.end()
            raise
        except RayActorError:  # workers' are within a TrainingFailedError
            trainer.end()
            Sender(job["progress"]).restarted()
            for _ in range(20):  # the cluster hears of its death a moment later
                if release_orphans():
                    break
                time.sleep(0.5)
            say(
                "               lost          the controller of the workers; all start again from the last checkpoint "
                f"(loss {number + 1} of at most {most})"
            )
    raise KmtrError(
        f"the controller of its workers was lost {most + 1} times, expected at most train.max_failures={most}"
    )


def set_aside(folder: Path) -> str:
    """Rename Ray Train's own list of a run's checkpoints if its controller can't read it, and would end each time.

    It is written in place, so that a full disk or a kill leaves a part of it, and each version of Ray refuses another
    one's. Workers find the checkpoints without it (`kmtr.train.loop.newest`).

    Returns:
        Why; empty: it can be read, or there is none.
    """
    path = folder / "train" / checkpoint.LIST
    if not path.is_file():
        return ""
    try:
        known = json.loads(path.read_bytes())["ray_version"]
        why = "" if known == ray.__version__ else f"is of Ray {known}"
    except (ValueError, KeyError, TypeError):
        why = "is half written"
    if why:
        path.replace(path.with_name(checkpoint.ASIDE))
    return why


def torch_config(config: RunConfig, use_gpu: bool) -> TorchConfig:
    """The process group: gloo for tensors on the host beside NCCL. No operation in it waits for longer than
    `train.hang_s`, after which the watch has ended the workers already (`kmtr.train.watch`).
    """
    seconds = int(config.train.hang_s) + 60 if config.train.hang_s else 24 * 3600
    return TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=seconds)


def release_orphans() -> int:
    """Give back what dead Train controllers of this job reserved, and return how many reservations that were.

    A controller may be lost, and Tune stops a trial by ending its process, with which the controller inside dies. But a
    placement group lives until its job ends. Ray Train has a cleaner for this that asks the dashboard, which a local
    Ray does not run (and which it does not find where several Rays share a machine): the workers' CPUs then stay
    reserved and whoever comes next waits for ever. Who created a placement group is not in Ray's public table, so this
    reads the table below it.
    """
    job = ray.get_runtime_context().get_job_id()
    kind = gcs_pb2.PlacementGroupTableData
    released = 0
    for raw in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = kind.FromString(raw)
        by_actor = set(group.creator_actor_id) - {0xFF}  # all ones: created by a driver
        if by_actor and group.creator_actor_dead and group.state != kind.REMOVED and group.creator_job_id.hex() == job:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            released += 1
    return released
