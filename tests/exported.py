"""An exported model without any training: initial weights, and heads that answer differently for every subject."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from kmtr.card import write_card
from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.exported import export_model
from kmtr.tasks import Model
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
