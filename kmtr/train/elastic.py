"""A trainer whose number of workers follows the cluster: the only file that leans on the inside of Ray Train.

Ray Train's elastic policy takes any number of workers between two bounds. A global batch can be shared by its divisors
only, so `DivisorPolicy` takes the largest of those that there is room for; a worker more would have nothing to do.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, ResizeDecision

from kmtr.train.progress import Sender

SAID_EVERY_S = 30.0


def usable(room: int, sizes: Sequence[int]) -> int:
    """Largest of the numbers of workers that can be used, at most `room`; 0: none of them fits."""
    return max((size for size in sizes if size <= room), default=0)


class DivisorPolicy(ElasticScalingPolicy):
    """Ray Train's elastic policy, for numbers of workers that share the global batch evenly.

    It says when it waits for room, and when room is left over.

    Args:
        sizes: those numbers.
        progress: name of the progress actor.
    """

    def __init__(self, scaling_config: ScalingConfig, sizes: Sequence[int], progress: str):
        super().__init__(scaling_config)
        self.sizes, self.progress = tuple(sizes), progress
        self._said = ("", float("-inf"))

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Workers are about to be started: from what there is now, since a node may have gone a moment ago."""
        self._maybe_send_resource_request()
        ray.get(self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True))
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


class ElasticTrainer(TorchTrainer):
    """TorchTrainer with `DivisorPolicy` in place of Ray Train's own.

    Args:
        sizes, progress: of `DivisorPolicy`.
        kwargs: of TorchTrainer; its ``scaling_config.num_workers`` is (least, most).
    """

    def __init__(self, *args: Any, sizes: Sequence[int], progress: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._policy = (tuple(sizes), progress)

    def _initialize_and_run_controller(self, **controller: Any) -> Any:
        assert isinstance(controller["scaling_policy"], ElasticScalingPolicy), "Ray Train has changed: see elastic.py"
        controller["scaling_policy"] = DivisorPolicy(self.scaling_config, *self._policy)
        return super()._initialize_and_run_controller(**controller)
