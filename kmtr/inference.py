"""A model of tasks on its own: exported by training on labels, used without Ray, DeepSpeed or MLflow.

    model = kmtr.load_model("runs/<run>/model")
    model.predict(study)                      # {"lvedv_ml": 142.1, "dcm": 0.03, ...}

A folder of files that hold no code: ``model.safetensors`` (all weights, normalisation tables, moments of the labels),
``model.json`` (format, the settings that rebuild it, and the unit of each output), and ``areas.safetensors`` where the
model answers labels by the areas of its own masks (`area_maps`).
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import safetensors
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kmtr import area_maps
from kmtr.area_maps import AreaMaps
from kmtr.config import Data, RunConfig, most_lines
from kmtr.data.loader.batch import Batch, Wanted
from kmtr.encoder import batch_of, misfit, undersampled
from kmtr.exported import (
    AREAS_FORMAT,
    MODEL_FORMAT,
    MODEL_HEAD,
    MODEL_WEIGHTS,
    UNFIT,
    Trained,
    check_weights,
    model_files,
    read_weights,
    rebuilt,
    sha256,
)
from kmtr.inputs import of_images
from kmtr.tasks import Model, Preparer, Stage, stages_of
from kmtr.tasks.base import EMBEDDING
from kmtr.tasks.views import slices_of, views_of
from kmtr.types import PHENOTYPES, VIEWS, InputError, Study, first_line

Images = Callable[[Batch], Float[Tensor, "batch slice t y x"]]
UNMEASURED = "areas of masks are not known, since a slice or the size of a pixel is not"
R_TOLERANCE = 1.1
"""Ratio of a measured R to those of training, within which it counts as one of them: views differ in their lines."""


class TaskModel:
    """A fitted system with the heads of its tasks: batch or study -> predictions."""

    def __init__(
        self,
        config: RunConfig,
        weights: dict[str, Tensor],
        tables: dict[str, Tensor],
        device: torch.device,
        trained: Trained | None = None,
    ):
        self.config, self.tables, self.device, self.trained = config, tables, device, trained or Trained()
        self.areas: AreaMaps | None = None
        with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten, the caller's state stays
            self.module = Model(config).to(device).eval()
        self.module.load_state_dict(weights)
        self.prepare = Preparer(config, tables, device)
        (self.stage,) = stages_of(config)
        self.images: Images | None = None
        self.reads = ""

    def after(self, images: Images, reads: str) -> TaskModel:
        """This model of full images, on reconstructions: reconstruct, then analyse.

        Args:
            images: magnitude images of a batch on the matrix of the configuration, NaN where nothing is there.
            reads: their name in tables.
        """
        other = copy.copy(self)
        other.images, other.reads, other.areas = images, reads, None  # maps of areas were fitted on other masks
        return other

    @property
    def readout(self) -> int | None:
        """Central kx samples of a batch that are looked at; None: all."""
        return None if self.images is not None else self.prepare.readout(self.stage)

    @property
    def units(self) -> dict[str, str]:
        """Output -> its unit."""
        return {name: PHENOTYPES.get(name, "probability") for name in self.prepare.labels}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Predictions ``batch`` of every output by its head, fp32, in its unit."""
        return self._predict(batch, self.stage)

    @property
    def wanted(self) -> Wanted:
        """Columns of a batch that its answers need beside k-space."""
        return Wanted(spacing=True)

    @torch.no_grad()
    def answers(self, batch: Batch) -> tuple[dict[str, Tensor], Bool[Tensor, " batch"]]:
        """As a call; labels that the model knows better with the areas of its masks are answered with these.

        Returns:
            The predictions, and for whom the areas are known: of the others (no size of a pixel, a slice missing) all
            is said by the heads.
        """
        said, known = self(batch), torch.ones(len(batch), dtype=torch.bool)
        if self.areas is None:
            return said, known
        views = views_of(batch, self.config.data, said["masks"], said["masks"])
        heads = {name: said[name].tolist() for name in self.areas.labels}
        measured = [
            self.areas(each, r, {name: values[row] for name, values in heads.items()})
            for row, (each, r) in enumerate(zip(views, batch.true_acceleration.tolist(), strict=True))
        ]
        for name in self.areas.labels:
            values = torch.tensor([one[name] for one in measured], dtype=torch.float32)
            known &= values.isfinite()
            values = values.to(said[name].device)
            said[name] = torch.where(values.isfinite(), values, said[name])
        return said, known

    @torch.no_grad()
    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        """As a call, of the tasks on labels alone: nothing dense is decoded."""
        return self._predict(batch, self._of([name for name in self.stage.tasks if self.prepare.tasks[name].labels]))

    @torch.no_grad()
    def measured(self, batch: Batch) -> dict[str, Tensor]:
        """As a call, without images."""
        return self._predict(batch, self._of([name for name in self.stage.tasks if name != "reconstruction"]))

    @torch.no_grad()
    def masks(self, batch: Batch) -> dict[str, Tensor]:
        """As a call, of segmentation alone."""
        return self._predict(batch, self._of(["segmentation"]))

    def _of(self, tasks: Sequence[str]) -> Stage:
        return replace(self.stage, tasks={name: self.stage.tasks[name] for name in tasks})

    def _predict(self, batch: Batch, stage: Stage) -> dict[str, Tensor]:
        said = self.module(self.prepare(self._seen(batch), stage), predict=True)
        return {name: values for outputs in said.values() for name, values in outputs.items()}

    def _seen(self, batch: Batch) -> Batch:
        return batch if self.images is None else of_images(batch, self.images(batch))

    @torch.no_grad()
    def embed(self, batch: Batch) -> Float[Tensor, "batch channel"]:
        """Vectors of the system, from the lines that are `sampled`, fp32."""
        inputs = self.prepare.embedding(self._seen(batch), self.config.task.system)
        vector: Tensor = self.module(inputs)[EMBEDDING]["vector"]
        return vector.float()

    def predict(self, study: Study, acceleration: int | None = None) -> dict[str, Any]:
        """Predictions for one study: numbers in `units`; ``masks`` (uint8) and ``image`` (magnitude, in the study's
        numbers) by view group, ``slice t y x`` on the matrix of the configuration, with ``spacing_mm`` of their voxels
        (between slices, height, width) by view group, where it is known.

        Warns (`warnings`) of an R or of pixels that the model was not trained for, and where heads have to answer what
        the model knows better by the areas of its masks.

        Args:
            acceleration: undersample by a pattern of the configured family; None: use every line that the study has.

        Raises:
            InputError: the study lacks a view, or its matrix, coils or frames are not those that the model was trained
                on.
        """
        if wrong := self.misfit({name: view.kspace.shape for name, view in study.views.items()}, acceleration):
            raise InputError(f"study: {wrong}")
        batch = batch_of(study, self.config, acceleration, self.wanted).to(self.device, self.readout)
        for warning in filter(None, (self.doubts(batch, acceleration)[0], self.sizes(batch)[0])):
            warnings.warn(warning, stacklevel=2)
        said, measured = self.answers(batch)
        if self.areas is not None and not measured[0]:
            warnings.warn(f"{UNMEASURED}: {', '.join(self.areas.labels)} by the model's heads", stacklevel=2)
        found = {
            name: values[0].item() if values.ndim == 1 else by_view(self.config.data, batch, values.cpu().numpy(), 0)
            for name, values in said.items()
        }
        dense = [value for value in found.values() if isinstance(value, dict)]
        return found | ({"spacing_mm": spacing_of(self.config.data, batch, 0)} if dense else {})

    def misfit(self, shapes: Mapping[str, Sequence[int]], acceleration: int | None = None) -> str:
        """Reason why the model refuses a subject of these shapes (view -> ``slice coil t ky kx``); empty: it fits."""
        reason = misfit(shapes, undersampled(self.config, acceleration))
        return reason or self.trained.misfit(shapes, self.config.data.crop, self.config.data.frames)

    def doubts(self, batch: Batch, acceleration: int | None) -> list[str]:
        """`doubt` about each subject of a batch; of one that is undersampled already, about the R that it has."""
        own = ~(batch.complete | batch.padded).flatten(1).all(1)
        true = batch.true_acceleration.tolist()
        return [self.doubt(None if mine else acceleration, r) for mine, r in zip(own.tolist(), true, strict=True)]

    def sizes(self, batch: Batch) -> list[str]:
        """Warning about the size of each subject's pixels, in one line; empty: as in training, or unknown."""
        return [self.trained.misplaced(spacing_of(self.config.data, batch, row)) for row in range(len(batch))]

    def doubt(self, acceleration: int | None, true: float = 1.0) -> str:
        """Warning about an R that the model was not trained for, in one line; empty: it was.

        Args:
            acceleration: nominal R that is drawn; None: the study's own lines, of which `true` is R.
        """
        how = self.config.sampling
        least, most = min(how.accelerations), max(how.accelerations)
        if acceleration is None:
            lines = self.config.data.matrix[0]
            low, high = (lines / most_lines(lines, r, how.acs_lines, how.family) for r in (least, most))
            inside = low / R_TOLERANCE <= true <= high * R_TOLERANCE
        else:
            inside = least <= acceleration <= most
        if inside:
            return ""
        got = f"{true:.2f}" if acceleration is None else acceleration
        span = f"{least}" if least == most else f"{least} to {most}"
        return f"R = {got} is not among R = {span}, which the model was trained for"


def by_view(data: Data, batch: Batch, values: np.ndarray, row: int) -> dict[str, np.ndarray]:
    """One subject's dense output ``batch slice t ...`` by view group, without padding."""
    present = ~batch.padded[row].cpu().numpy()
    views = np.array([VIEWS[data.view_types[slot]] for slot in batch.slots])
    found = {}
    for view in dict.fromkeys(views.tolist()):
        slices = np.flatnonzero((views == view) & present.any(1))
        if len(slices):
            found[view] = values[row][np.ix_(slices, np.flatnonzero(present[slices[0]]))]
    return found


def spacing_of(data: Data, batch: Batch, row: int) -> dict[str, tuple[float, float, float]]:
    """View group -> distance of slices, height and width of a pixel of one subject in mm, where they are known."""
    if batch.spacing_mm is None:
        return {}
    found: dict[str, tuple[float, float, float]] = {}
    for slot, (between, height, width) in zip(batch.slots, batch.spacing_mm[row].tolist(), strict=True):
        if np.isfinite([between, height, width]).all():
            found.setdefault(VIEWS[data.view_types[slot]], (between, height, width))
    return found


def load_model(path: str | Path, device: str = "cpu") -> TaskModel:
    """The model in a folder that `export_model` wrote.

    Raises:
        InputError: no model there, or its files do not fit each other.
    """
    folder = Path(path)
    _complete(folder, (MODEL_WEIGHTS, MODEL_HEAD))
    try:
        head = json.loads((folder / MODEL_HEAD).read_text())
        written, settings = head["format"], head["settings"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"model: expected JSON with format and settings in {folder / MODEL_HEAD}") from None
    _complete(folder, model_files(head))
    if written not in (MODEL_FORMAT, AREAS_FORMAT):
        raise InputError(f"model: expected format {AREAS_FORMAT}, got {written}, in {folder}; fine-tune it anew")
    if head.get("sha256", digest := sha256(folder / MODEL_WEIGHTS)) != digest:
        raise InputError(
            f"model: expected the {MODEL_WEIGHTS} that was exported with {MODEL_HEAD}, got a damaged one or another "
            f"model's in {folder}; copy the folder anew"
        )
    try:
        trained = pydantic.TypeAdapter(Trained).validate_python(head.get("trained", {}))
    except pydantic.ValidationError:
        raise InputError(
            f"model: expected facts on its training in {folder / MODEL_HEAD}, got others; fine-tune it anew"
        ) from None
    weights, tables = read_weights(folder / MODEL_WEIGHTS, device)
    try:
        config = rebuilt(settings)
        check_weights(lambda: Model(config), weights)
        model = TaskModel(config, weights, tables, torch.device(device), trained)
        drawn = model.units if "segmentation" in model.prepare.tasks else {}
        model.areas = area_maps.read(folder, head, slices_of(config.data), drawn)
        return model
    except InputError:
        raise
    except (*UNFIT, OSError, safetensors.SafetensorError) as error:
        raise InputError(f"model: {folder} does not hold one: {first_line(error)}") from None


def _complete(folder: Path, names: Sequence[str]) -> None:
    """Refuse a model's folder that lacks one of its files."""
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"model: expected a folder with {' and '.join(names)}, got {folder} without {name}")
