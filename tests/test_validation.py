"""What a run says of its encoder while it trains, on one worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from one_worker import CPU, PlainEngine

from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Dataset
from kmtr.tasks import Model, Preparer
from kmtr.train.validation import PretrainingValidation


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def said(config: RunConfig, tables: dict[str, torch.Tensor], module: Model) -> dict[str, float]:
    validate = PretrainingValidation(config, Dataset.open(config.data), Preparer(config, tables, CPU), 0, 1, CPU)
    return validate(PlainEngine(module.eval(), 1))[0]


def test_collapse_is_seen_with_labels_and_without(
    alone: None, small: RunConfig, tables: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = Model(small)
    probed = said(small, tables, module)
    parts = ("", "_static", "_dynamic")
    assert {f"val/{target}_r2{part}" for target in ("lvedv", "lvef", "lvm") for part in parts} <= probed.keys()
    assert 1 < probed["val/effective_rank"] < small.train.eval_subjects
    assert probed["val/embedding_deviation"] > 1e-3

    monkeypatch.setattr(Dataset, "labels", property(lambda self: {}))
    bare = said(small, tables, module)
    assert not any("r2" in name for name in bare)
    assert bare == pytest.approx({name: value for name, value in probed.items() if "r2" not in name})

    with torch.no_grad():
        for weight in module.systems["kspace"].parameters():
            weight.zero_()
    assert said(small, tables, module)["val/embedding_deviation"] < 1e-6
