"""Folders of exported encoders and models: weights and tables as safetensors, what rebuilds them as JSON. Neither holds
code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from kmtr.config import RunConfig, override, plain
from kmtr.files import replacing, write_atomic
from kmtr.types import DISEASES, PHENOTYPES, InputError, first_line

WEIGHTS, HEAD = "encoder.safetensors", "encoder.json"
KSPACE = "kspace"
"""System whose encoder `kmtr.load_encoder` reads."""
FORMAT = 1
"""Format of an encoder's folder; one of another format is refused."""
MODEL_WEIGHTS, MODEL_HEAD = "model.safetensors", "model.json"
AREAS = "areas.safetensors"
"""Maps beside a model that answers by the areas of its masks (`area_maps`); ``model.json`` says if there are any."""
MODEL_FORMAT, AREAS_FORMAT = 4, 5
"""Formats of a model's folder, of one with maps; one of another format is refused."""
_TASK = {"stage"} | {
    f"task.{name}"
    for name in (
        *("tasks", "system", "input", "unet_width", "unet_motion", "cascades", "targets", "diseases", "begin"),
        *("patch", "queries", "channels", "data_consistency"),
    )
}
"""Settings that rebuild a model, beside those that rebuild an encoder."""
_SHAPES = {f"data.{name}" for name in ("views", "sax_slices", "frames", "matrix", "coils", "crop")}


SIZE_TOLERANCE = 1.1
"""Ratio of the size of a pixel to those of training, within which it counts as one of them."""
UNFIT = (RuntimeError, KeyError, IndexError, TypeError, ValueError, ZeroDivisionError, OverflowError, MemoryError)
"""Errors of building from settings, weights and tables that do not fit each other."""


def write_folder(
    folder: Path, names: tuple[str, str], weights: dict[str, Tensor], tables: dict[str, Tensor], head: dict[str, Any]
) -> None:
    """Weights and tables, and their description as JSON with their ``sha256``, under these names, whole or not."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {f"weights.{k}": v.contiguous() for k, v in weights.items()}
    content |= {f"tables.{k}": torch.view_as_real(v) if v.is_complex() else v for k, v in tables.items()}
    (folder / names[1]).unlink(missing_ok=True)  # written last: a folder that has it is whole
    with replacing(folder / names[0]) as temporary:
        safetensors.torch.save_file({k: v.contiguous() for k, v in content.items()}, temporary)
        digest = sha256(Path(temporary))
    write_atomic(folder / names[1], json.dumps(head | {"sha256": digest}, indent=2))


def sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and tables that `write_folder` wrote into one file.

    Raises:
        InputError: the file holds something else.
    """
    try:
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "tables": {}}
        for name, tensor in safetensors.torch.load_file(path, device=device).items():
            kind, _, key = name.partition(".")
            parts[kind][key] = tensor
        tables = parts["tables"]
        return parts["weights"], tables | {"static_mean": torch.view_as_complex(tables["static_mean"].contiguous())}
    except (safetensors.SafetensorError, KeyError, RuntimeError) as error:
        raise InputError(f"{path.name}: {path.parent} does not hold one: {first_line(error)}") from None


def check_weights(build: Callable[[], torch.nn.Module], weights: dict[str, Tensor]) -> None:
    """Refuse weights of other shapes than the settings beside them say, before a network of those is built.

    Raises:
        ValueError: the first that differs.
    """
    with torch.device("meta"):
        wanted = {name: tuple(weight.shape) for name, weight in build().state_dict().items()}
    for name in (*wanted, *weights):
        stored = tuple(weights[name].shape) if name in weights else "none"
        if stored != wanted.get(name):
            raise ValueError(f"expected {name} of shape {wanted.get(name, 'none')}, got {stored}")


def rebuilds(key: str) -> bool:
    """True if an encoder of another value of this setting is another encoder."""
    return key == "seed" or key in _SHAPES or key.startswith(("sampling.", "model."))


def read_head(path: Path) -> RunConfig:
    """The settings that an encoder was exported with; all others have their defaults.

    Raises:
        InputError: another format, or a setting that this version does not know.
    """
    try:
        head = json.loads(path.read_text())
        written, settings = head.get("format"), head.get("settings")
    except (ValueError, AttributeError):
        raise InputError(f"encoder: expected JSON with format and settings in {path}, got something else") from None
    if written != FORMAT or not isinstance(settings, dict):
        raise InputError(f"encoder: expected format {FORMAT}, got {written}, in {path}; export it anew")
    return rebuilt(settings)


def rebuilt(settings: dict[str, Any]) -> RunConfig:
    """The configuration of exported settings; all others have their defaults.

    Raises:
        InputError: a setting that this version does not know.
    """
    if not isinstance(settings, dict):
        raise InputError(f"settings: expected names and values, got {type(settings).__name__}")
    scored = {"evaluate.accelerations": settings.get("sampling.accelerations", (1,))}
    return override(RunConfig(), settings | scored)


def system_of(path: Path) -> str:
    """The system that an encoder's head says it is of; those of before 2026-11-30 are of k-space."""
    return str(json.loads(path.read_text()).get("system", KSPACE))


def export_encoder(
    folder: Path, config: RunConfig, weights: dict[str, Tensor], tables: dict[str, Tensor], system: str = KSPACE
) -> None:
    """Write an encoder folder; `weights` of the module of `system`, `tables` of the statistics."""
    settings = {key: value for key, value in plain(config).items() if rebuilds(key)}
    write_folder(folder, (WEIGHTS, HEAD), weights, tables, {"format": FORMAT, "system": system, "settings": settings})


def export_model(
    folder: Path,
    config: RunConfig,
    weights: dict[str, Tensor],
    tables: dict[str, Tensor],
    trained: dict[str, Any] | None = None,
) -> None:
    """Write a model's folder; `weights` of `tasks.Model`, `tables` of the run, `trained` as `Trained` has it."""
    settings = {key: value for key, value in plain(config).items() if rebuilds(key) or key in _TASK}
    units = {name: PHENOTYPES.get(name, "probability") for name in (*PHENOTYPES, *DISEASES)}
    learnt = {"phenotypes": config.task.targets, "diseases": config.task.diseases}
    wanted = [name for task in config.task.tasks for name in learnt.get(task, ())]
    for name in (MODEL_HEAD, AREAS):  # of an earlier model
        (folder / name).unlink(missing_ok=True)
    head = {"format": MODEL_FORMAT, "settings": settings, "units": {name: units[name] for name in wanted}}
    write_folder(folder, (MODEL_WEIGHTS, MODEL_HEAD), weights, tables, head | {"trained": trained or {}})


def model_files(head: Mapping[str, Any]) -> list[str]:
    """Names of the files that make a model.

    Args:
        head: content of its ``model.json``.
    """
    return [MODEL_WEIGHTS, MODEL_HEAD, *([AREAS] if head.get("areas") is not None else [])]


@dataclass(frozen=True)
class Trained:
    """Facts about what a model was trained on; names no subject.

    Attributes:
        subjects: of the training split.
        labels: label -> training subjects that have it.
        shapes: view -> [least, greatest] ``slice coil t ky kx`` of the training subjects, axis by axis.
        dataset: digest of the data.
        spacing_mm: view -> [least, greatest] distance of slices, height and width of a pixel on the model's matrix.
        slice_order: of the short axis, in words.
        from_scratch: it began with initial weights, not with a pretrained encoder.
        steps: of the optimizer, on labels.
    """

    subjects: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, list[list[int]]] = field(default_factory=dict)
    dataset: str = ""
    spacing_mm: dict[str, list[list[float]]] = field(default_factory=dict)
    slice_order: str = ""
    from_scratch: bool = False
    steps: int = 0

    def misfit(self, shapes: Mapping[str, Sequence[int]], crop: bool, frames: int) -> str:
        """Reason why a subject is not of the kind that was trained on, in one line; empty: it is.

        Args:
            shapes: view -> ``slice coil t ky kx``.
            crop: the matrix is made that of the model, whatever it was.
            frames: that the model looks at; a subject that has so many may have fewer than those of training.
        """
        for view, (least, most) in self.shapes.items():
            if (there := shapes[view][2]) < (few := min(least[2], frames)):
                return f"{view}: expected at least {few} frames, as the model was trained on, got {there}"
            for what, first, last in (("coils", 1, 2), *(() if crop else (("a matrix", 3, 5),))):
                low, got, high = (tuple(shape[first:last]) for shape in (least, shapes[view], most))
                if not all(a <= b <= c for a, b, c in zip(low, got, high, strict=True)):
                    span = f"{_typed(low)}" if low == high else f"{_typed(low)} to {_typed(high)}"
                    return f"{view}: expected {what} of {span}, as the model was trained on, got {_typed(got)}"
        return ""

    def misplaced(self, spacing: Mapping[str, Sequence[float]]) -> str:
        """Warning about pixels of another size than those of training, in one line; empty: they are alike, or unknown.

        Args:
            spacing: view -> distance of slices, height and width of a pixel on the model's matrix.
        """
        for view, (least, most) in self.spacing_mm.items():
            got = spacing.get(view)
            if got is None:
                continue
            span = range(1, 3)  # in the plane: from slices, which views of one have not, no size is read off
            if not all(least[i] / SIZE_TOLERANCE <= got[i] <= most[i] * SIZE_TOLERANCE for i in span):
                sizes = [" x ".join(f"{size[i]:.2f}" for i in span) for size in (least, most, got)]
                return f"{view}: the model was trained on pixels of {sizes[0]} to {sizes[1]} mm, these have {sizes[2]}"
        return ""


def _typed(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
