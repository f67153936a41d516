"""Room for the workers of a run: whether they have GPUs, what they reserve of the cluster, and whether it has that."""

from __future__ import annotations

import os

from kmtr.config import RunConfig
from kmtr.types import InputError

Resources = dict[str, float]
"""Ray's resource (``CPU``, ``GPU``) -> how much of it."""


def uses_gpus(device: str) -> bool:
    """True if workers of this `train.device` have a GPU each. Ray must be up."""
    import ray

    return device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)


def refuse_missing_gpu(device: str) -> None:
    """Refuse ``train.device=cuda`` on a cluster without GPUs, before anything waits for one. Ray must be up.

    Not where RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S is set: there nodes with GPUs may still be starting.

    Raises:
        InputError: there is none.
    """
    import ray

    if os.environ.get("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"):
        return
    if device == "cuda" and not ray.cluster_resources().get("GPU", 0):
        raise InputError(
            "train.device: expected GPUs in the Ray cluster for cuda, got none; use train.device=auto or cpu, or start "
            "a node with a GPU"
        )


def of_worker(config: RunConfig, *, gpus: bool) -> Resources:
    """Reserved by a worker for itself."""
    return {"CPU": config.train.cpus_per_worker} | ({"GPU": 1.0} if gpus else {})


def reserved(config: RunConfig, workers: int, *, gpus: bool) -> Resources:
    """Reserved by so many workers and, where Ray Data reads for them, their readers."""
    data, one = config.data, of_worker(config, gpus=gpus)
    if data.loader == "ray":
        one["CPU"] += data.readers * data.read_cpus
    return {kind: workers * number for kind, number in one.items()}


def lacking(wanted: Resources, have: Resources) -> list[str]:
    """Resources of which there are too few."""
    return [kind for kind, number in wanted.items() if number > have.get(kind, 0) + 1e-6]


def no_memory(error: BaseException) -> bool:
    """True if Ray killed a process since its node had no memory left."""
    from ray.exceptions import OutOfMemoryError

    return isinstance(error, OutOfMemoryError) or "low on memory" in str(error)
