"""The image encoder as a system of tasks: pretraining leaves it, training on labels starts from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forked_workers import instead_of_ray_train

import kmtr
from kmtr.config import RunConfig, override
from kmtr.exported import MODEL_WEIGHTS, WEIGHTS, read_weights
from kmtr.train import driver, start
from kmtr.train.folder import IMAGE_ENCODER
from kmtr.train.resolve import resolve
from kmtr.types import InputError


@pytest.mark.slow
def test_it_starts_from_what_pretraining_leaves(
    small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_ray_train(monkeypatch)
    asked = {"storage.root": str(tmp_path), "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db", "train.workers": 1}
    asked |= {"masked.steps": 2, "align.steps": 0, "masked.image_weight": 1.0, "train.eval_every": 10}
    config = override(small, asked)
    before = driver.fit(config, quiet=True)
    left = Path(before.folder) / IMAGE_ENCODER
    task = {"stage": "task", "task.tasks": "phenotypes", "task.targets": "lvedv_ml", "task.steps": 1}
    task |= {"task.system": "image", "task.learning_rate": 1e-12}
    found, _ = resolve(override(config, task))
    assert found.task.encoder == str(left), "of the finished pretraining with these settings"
    outcome = driver.fit(override(config, task | {"task.encoder": str(left)}), quiet=True)
    trained = read_weights(Path(outcome.encoder) / MODEL_WEIGHTS)[0]
    pretrained, tables = read_weights(left / WEIGHTS)
    assert tables.keys() <= read_weights(Path(before.encoder) / WEIGHTS)[1].keys()
    assert {name for name in trained if name.startswith("systems.")} == {f"systems.image.{n}" for n in pretrained}
    for name, weight in pretrained.items():
        torch.testing.assert_close(trained[f"systems.image.{name}"], weight, rtol=0, atol=1e-9)
    scratch, _ = resolve(override(config, task | {"masked.image_weight": 0.0}))
    assert scratch.task.encoder == start.NONE

    for system, folder, line in (
        ("image", before.encoder, "expected the encoder of task.system=image, got that of kspace"),
        ("kspace", str(left), "expected the encoder of task.system=kspace, got that of image"),
    ):
        with pytest.raises(InputError, match=f"^task.encoder: {line}"):
            resolve(override(config, task | {"task.system": system, "task.encoder": folder}))
    with pytest.raises(InputError, match=r"^encoder: expected one of k-space, got one of image in"):
        kmtr.load_encoder(left)
