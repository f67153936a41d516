"""What a model answers by the areas of its own masks, beside its files: ``areas.safetensors``, described in
``model.json``.

A model that draws masks often knows phenotypes better by these than by its head. The maps (`metrics.areas`) are fitted
once it is trained, one for each R, and validation subjects choose label by label what answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from kmtr.exported import AREAS, MODEL_HEAD
from kmtr.files import replacing, write_atomic
from kmtr.metrics.areas import AreaMap, features_of
from kmtr.metrics.from_phenotypes import Regressions
from kmtr.metrics.logistic import Logistic
from kmtr.metrics.ridge import Ridge

_ARRAYS = ("mean", "scale", "weights")


@dataclass(frozen=True)
class ByAreas:
    """Maps of a model, and what they answer.

    Attributes:
        maps: nominal R that they were fitted at -> map, of the same phenotypes and diseases each.
        labels: those that they answer in place of the model's heads.
        subjects: labelled subjects that they were fitted on.
    """

    maps: Mapping[int, AreaMap]
    labels: tuple[str, ...]
    subjects: int

    def at(self, true_acceleration: float, true: Mapping[int, float]) -> AreaMap:
        """The map of the R that is nearest in its logarithm.

        Args:
            true: nominal R -> true R of its patterns.
        """
        return self.maps[min(self.maps, key=lambda r: abs(math.log(true[r] / true_acceleration)))]


def export(folder: Path, found: ByAreas) -> None:
    """Put the maps beside the model in a folder; `read` finds them whole or not at all."""
    maps = list(found.maps.values())
    head = json.loads((folder / MODEL_HEAD).read_text())
    head.pop("areas", None)
    write_atomic(folder / MODEL_HEAD, json.dumps(head, indent=2))  # maps of an earlier model are none of this one
    tensors: dict[str, np.ndarray] = {}
    for r, one in found.maps.items():
        tensors[f"{r}.shown"] = np.asarray(one.shown)
        linear: dict[str, Ridge | Logistic] = {**one.ridges, **one.diseases.of}
        for name, fitted in linear.items():
            tensors |= {f"{r}.{name}.{key}": np.ascontiguousarray(getattr(fitted, key), np.float64) for key in _ARRAYS}
            tensors[f"{r}.{name}.bias"] = np.array(fitted.bias, np.float64)
    with replacing(folder / AREAS) as temporary:
        safetensors.numpy.save_file(tensors, temporary)
    head["areas"] = {
        "accelerations": list(found.maps),
        "answers": list(found.labels),
        "subjects": found.subjects,
        "phenotypes": list(maps[0].ridges),
        "diseases": list(maps[0].diseases.of),
        "seen": list(maps[0].diseases.phenotypes),
    }
    write_atomic(folder / MODEL_HEAD, json.dumps(head, indent=2))


def read(folder: Path, head: Mapping[str, Any], slices: Mapping[str, int], said: Collection[str]) -> ByAreas | None:
    """The maps beside a model; None: it has none.

    Args:
        head: content of ``model.json``.
        slices: of each view of the model.
        said: labels that the model says besides.

    Raises:
        ValueError, KeyError, TypeError, OSError, safetensors.SafetensorError: they do not fit the model, or each other.
    """
    about = head.get("areas")
    if about is None:
        return None
    tensors = safetensors.numpy.load_file(folder / AREAS)

    def fitted(r: int, name: str, features: int) -> dict[str, Any]:
        arrays = {key: _array(tensors, f"{r}.{name}.{key}", (features,)) for key in _ARRAYS}
        return arrays | {"bias": float(_array(tensors, f"{r}.{name}.bias", ()))}

    phenotypes, diseases = ([str(name) for name in about[kind]] for kind in ("phenotypes", "diseases"))
    labels, seen = (tuple(map(str, about[kind])) for kind in ("answers", "seen"))
    if not {*labels} <= {*phenotypes, *diseases} & {*said}:
        raise ValueError(f"areas: expected answers that model and maps have, got {', '.join(labels)}")
    maps = {}
    for r in map(int, about["accelerations"]):
        shown = _array(tensors, f"{r}.shown", (features_of(slices),), "b")
        count = int(shown.sum())
        ridges = {name: Ridge(**fitted(r, name, count), penalty=math.nan) for name in phenotypes}
        of = {name: Logistic(**fitted(r, name, len(seen))) for name in diseases}
        maps[r] = AreaMap(dict(slices), shown, ridges, Regressions(seen, of))
    if not maps or min(maps) < 1:
        raise ValueError(f"areas: expected maps of one R at least, got {list(maps)}")
    return ByAreas(maps, labels, int(about["subjects"]))


def _array(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], kind: str = "f") -> np.ndarray:
    """A tensor of a file, checked."""
    found = tensors[name]
    if found.shape != shape or found.dtype.kind != kind or not np.isfinite(found).all():
        raise ValueError(f"expected finite {name} of shape {shape}, got {found.dtype} of {found.shape}")
    return found
