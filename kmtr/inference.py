"""A model of tasks on its own: exported by training on labels, used without Ray, DeepSpeed or MLflow.

    model = kmtr.load_model("runs/<run>/model")
    model.predict(study)                      # {"lvedv_ml": 142.1, "dcm": 0.03, ...}

A folder of two files that hold no code: ``model.safetensors`` (all weights, normalisation tables, moments of the
labels) and ``model.json`` (format, the settings that rebuild it, and the unit of each output).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kmtr.config import RunConfig, override
from kmtr.data.loader.batch import Batch
from kmtr.encoder import batch_of
from kmtr.exported import MODEL_FORMAT, MODEL_HEAD, MODEL_WEIGHTS, read_weights
from kmtr.tasks import Model, Preparer, stages_of
from kmtr.types import PHENOTYPES, VIEWS, InputError, Study, first_line


class TaskModel:
    """A fitted system with the heads of its tasks: batch or study -> predictions."""

    def __init__(self, config: RunConfig, weights: dict[str, Tensor], tables: dict[str, Tensor], device: torch.device):
        self.config, self.device = config, device
        self.module = Model(config).to(device).eval()
        self.module.load_state_dict(weights)
        self.prepare = Preparer(config, tables, device)
        (self.stage,) = stages_of(config)

    @property
    def readout(self) -> int | None:
        """Central kx samples of a batch that are looked at; None: all."""
        return self.prepare.readout(self.stage)

    @property
    def units(self) -> dict[str, str]:
        """Output -> its unit."""
        return {name: PHENOTYPES.get(name, "probability") for name in self.prepare.labels}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Predictions ``batch`` of every output, fp32, in its unit."""
        said = self.module(self.prepare(batch, self.stage), predict=True)
        return {name: values for outputs in said.values() for name, values in outputs.items()}

    def predict(self, study: Study, acceleration: int | None = None) -> dict[str, Any]:
        """Predictions for one study: numbers in `units`; ``masks`` (uint8) and ``image`` (magnitude, in the study's
        numbers) by view group, ``slice t y x`` on the matrix of the configuration.

        Args:
            acceleration: undersample by a pattern of the configured family; None: use every line that the study has.

        Raises:
            InputError: the study lacks a view, or its matrix or coils are not those that the model was trained on.
        """
        batch = batch_of(study, self.config, acceleration).to(self.device, self.readout)
        said = {name: values[0].cpu().numpy() for name, values in self(batch).items()}
        present = ~batch.padded[0].cpu().numpy()
        views = np.array([VIEWS[self.config.data.view_types[slot]] for slot in batch.slots])
        found: dict[str, Any] = {}
        for name, values in said.items():
            found[name] = float(values) if values.ndim == 0 else {}
            for view in dict.fromkeys(views.tolist()) if values.ndim else ():
                slices = np.flatnonzero((views == view) & present.any(1))
                if len(slices):
                    found[name][view] = values[np.ix_(slices, np.flatnonzero(present[slices[0]]))]
        return found


def load_model(path: str | Path, device: str = "cpu") -> TaskModel:
    """The model in a folder that `export_model` wrote.

    Raises:
        InputError: no model there, or its files do not fit each other.
    """
    folder = Path(path)
    for name in (MODEL_WEIGHTS, MODEL_HEAD):
        if not (folder / name).is_file():
            raise InputError(
                f"model: expected a folder with {MODEL_WEIGHTS} and {MODEL_HEAD}, got {folder} without {name}"
            )
    try:
        head = json.loads((folder / MODEL_HEAD).read_text())
        written, settings = head["format"], head["settings"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"model: expected JSON with format and settings in {folder / MODEL_HEAD}") from None
    if written != MODEL_FORMAT:
        raise InputError(f"model: expected format {MODEL_FORMAT}, got {written}, in {folder}; export it anew")
    scored = {"evaluate.accelerations": settings.get("sampling.accelerations", (1,))}
    config = override(RunConfig(), settings | scored)
    weights, tables = read_weights(folder / MODEL_WEIGHTS, device)
    try:
        return TaskModel(config, weights, tables, torch.device(device))
    except RuntimeError as error:
        raise InputError(f"model: {folder} does not hold one: {first_line(error)}") from None
