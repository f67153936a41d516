"""What workers reserve of a cluster, and a GPU that none of its nodes has."""

from __future__ import annotations

import pytest
import torch

from kmtr.config import RunConfig, override
from kmtr.train import room
from kmtr.types import InputError


def test_workers_reserve_for_themselves_and_for_their_readers(small: RunConfig) -> None:
    config = override(small, {"data.loader": "ray", "train.cpus_per_worker": 1.0, "data.readers": 2})
    assert config.data.read_cpus == 0.5
    assert room.of_worker(config, gpus=True) == {"CPU": 1, "GPU": 1}
    assert room.reserved(config, 6, gpus=False) == {"CPU": 6 * (1 + 2 * 0.5)}
    assert room.reserved(config, 6, gpus=True) == {"CPU": 12, "GPU": 6}
    threads = override(config, {"data.loader": "threads"})
    assert room.reserved(threads, 6, gpus=True) == {"CPU": 6, "GPU": 6}, "threads of a worker reserve nothing"


def test_what_a_cluster_lacks_is_named() -> None:
    tenths = {"CPU": 3 * 0.1, "GPU": 2.0}  # more than 0.3 by rounding
    assert room.lacking(tenths, {"CPU": 0.3, "GPU": 2.0}) == []
    assert room.lacking(tenths, {"CPU": 0.2}) == ["CPU", "GPU"]


@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.usefixtures("cluster")
def test_a_gpu_that_no_node_has_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", raising=False)
    room.refuse_missing_gpu("cpu")
    room.refuse_missing_gpu("auto")
    with pytest.raises(InputError, match=r"train\.device: expected GPUs in the Ray cluster for cuda, got none"):
        room.refuse_missing_gpu("cuda")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")  # nodes are awaited
    room.refuse_missing_gpu("cuda")
