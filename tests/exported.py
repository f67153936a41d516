"""An exported model without any training: initial weights, and heads that answer differently for every subject."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from kmtr.area_maps import AreaMaps
from kmtr.card import write_card
from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.exported import export_model
from kmtr.metrics.areas import AreaMap, features_of
from kmtr.metrics.from_phenotypes import Regressions
from kmtr.metrics.logistic import Logistic
from kmtr.metrics.ridge import Ridge
from kmtr.tasks import Model
from kmtr.tasks.views import slices_of
from kmtr.train import start

TARGETS = ("lvedv_ml", "lvef_pct")


def model_folder(
    folder: Path, config: RunConfig, tables: dict[str, torch.Tensor], tasks: tuple[str, ...] = ("phenotypes",)
) -> Path:
    """Write a model of these tasks for the dataset of `config`."""
    asked = {"stage": "task", "task.tasks": tasks, "task.targets": TARGETS, "task.encoder": "none"}
    config = override(config, asked)
    dataset = Dataset.open(config.data)
    torch.manual_seed(0)
    model = Model(config)
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tables = tables | start.task_tables(config, dataset.reader("train", config.data), tables)
    export_model(folder, config, model.state_dict(), tables, asdict(start.trained_on(config, dataset)))
    write_card(folder)
    return folder


def maps_of(config: RunConfig, labels: tuple[str, ...], accelerations: tuple[int, ...] = (2, 4)) -> AreaMaps:
    """Maps from all areas to `TARGETS`, and from these to DCM, with weights that nobody fitted; phenotypes among the
    labels are answered with the head.
    """
    draws, slices = np.random.default_rng(0), slices_of(config.data)
    count = features_of(slices)
    maps = {}
    for r in accelerations:
        mean, scale, weights = draws.uniform(0, 100, count), draws.uniform(50, 60, count), draws.standard_normal(count)
        ridges = {name: Ridge(mean, scale, weights * (1 + i), 100.0 + r, 1.0) for i, name in enumerate(TARGETS)}
        ill = Logistic(np.full(2, 100.0), np.full(2, 50.0), np.array([1.0, -1.0]), -2.0)
        maps[r] = AreaMap(slices, np.ones(count, bool), ridges, Regressions(TARGETS, {"dcm": ill}))
    both = Ridge(np.array([90.0, 110.0]), np.array([40.0, 20.0]), np.array([30.0, 5.0]), 120.0, 1.0)
    blends = {r: {name: both for name in labels if name in TARGETS} for r in maps}
    return AreaMaps(maps, {r: float(r) for r in maps}, labels, blends)
