"""Maps from the areas of a model's own masks to its answers, beside its files: ``areas.safetensors``, described in
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

from kmtr.exported import AREAS, AREAS_FORMAT, MODEL_FORMAT, MODEL_HEAD
from kmtr.files import replacing, write_atomic
from kmtr.metrics.areas import AreaMap, features_of
from kmtr.metrics.dense import Pair
from kmtr.metrics.from_phenotypes import Regressions
from kmtr.metrics.logistic import Logistic
from kmtr.metrics.ridge import Ridge

MOST_R = 1e6
"""R that counts for any higher one, such as that of a subject without a line."""
_ARRAYS = ("mean", "scale", "weights")


@dataclass(frozen=True)
class AreaMaps:
    """Maps of a model, and what they answer.

    Attributes:
        maps: nominal R that they were fitted at -> map, of the same phenotypes and diseases each.
        true: nominal R -> true R of its patterns.
        labels: those that they answer in place of the model's heads.
        blends: nominal R -> phenotype -> regression from what the map and the head say.
    """

    maps: Mapping[int, AreaMap]
    true: Mapping[int, float]
    labels: tuple[str, ...]
    blends: Mapping[int, Mapping[str, Ridge]]

    def nearest(self, true_acceleration: float) -> int:
        """The nominal R whose true one is nearest in its logarithm."""
        asked = math.log(min(true_acceleration, MOST_R))
        return min(self.maps, key=lambda r: abs(math.log(self.true[r]) - asked))

    def __call__(
        self, views: Mapping[str, Pair], true_acceleration: float, heads: Mapping[str, float]
    ) -> dict[str, float]:
        """Answers for one subject in their units; NaN where an area that counts is unknown.

        Args:
            views: its predicted masks.
            heads: label -> what its head says.
        """
        r = self.nearest(true_acceleration)
        found = self.maps[r](views)
        for label, both in self.blends[r].items():
            found[label] = float(both(np.array([[found[label], heads[label]]]))[0])
        return {label: found[label] for label in self.labels}


def remove(folder: Path) -> None:
    """Let the heads of the model in a folder answer all."""
    head = json.loads((folder / MODEL_HEAD).read_text())
    if head.pop("areas", None) is not None:
        write_atomic(folder / MODEL_HEAD, json.dumps(head | {"format": MODEL_FORMAT}, indent=2))
    (folder / AREAS).unlink(missing_ok=True)


def export(folder: Path, found: AreaMaps) -> None:
    """Put the maps beside the model in a folder; a command that is killed meanwhile leaves a model without."""
    remove(folder)
    tensors: dict[str, np.ndarray] = {}
    for r, one in found.maps.items():
        tensors[f"{r}.shown"] = np.asarray(one.shown)
        linear: dict[str, Ridge | Logistic] = {**one.ridges, **one.diseases.of}
        for name, fitted in linear.items():
            tensors |= _tensors(f"{r}.{name}", fitted)
        for name, both in found.blends[r].items():
            tensors |= _tensors(f"{r}.both.{name}", both)
    with replacing(folder / AREAS) as temporary:
        safetensors.numpy.save_file(tensors, temporary)
    first = next(iter(found.maps.values()))
    areas = {
        "accelerations": list(found.maps),
        "true": [found.true[r] for r in found.maps],
        "answers": list(found.labels),
        "both": list(next(iter(found.blends.values()))),
        "phenotypes": list(first.ridges),
        "diseases": list(first.diseases.of),
        "seen": list(first.diseases.phenotypes),
    }
    head = json.loads((folder / MODEL_HEAD).read_text()) | {"format": AREAS_FORMAT, "areas": areas}
    write_atomic(folder / MODEL_HEAD, json.dumps(head, indent=2))


def read(folder: Path, head: Mapping[str, Any], slices: Mapping[str, int], said: Collection[str]) -> AreaMaps | None:
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

    def fitted(name: str, features: int) -> dict[str, Any]:
        arrays = {key: _array(tensors, f"{name}.{key}", (features,)) for key in _ARRAYS}
        return arrays | {"bias": float(_array(tensors, f"{name}.bias", ()))}

    phenotypes, diseases = ([str(name) for name in about[kind]] for kind in ("phenotypes", "diseases"))
    labels, seen, both = (tuple(map(str, about[kind])) for kind in ("answers", "seen", "both"))
    if not {*labels} <= {*phenotypes, *diseases} & {*said} or not {*both} <= {*labels} & {*phenotypes}:
        raise ValueError(f"areas: expected answers that model and maps have, got {', '.join(labels)}")
    true = dict(zip(map(int, about["accelerations"]), map(float, about["true"]), strict=True))
    if not true or not all(1 <= r <= MOST_R for r in true.values()):
        raise ValueError(f"areas: expected a true R of each map, got {list(true.values())}")
    maps, blends = {}, {}
    for r in true:
        shown = _array(tensors, f"{r}.shown", (features_of(slices),), "b")
        count = int(shown.sum())
        ridges = {name: Ridge(**fitted(f"{r}.{name}", count), penalty=math.nan) for name in phenotypes}
        of = {name: Logistic(**fitted(f"{r}.{name}", len(seen))) for name in diseases}
        maps[r] = AreaMap(dict(slices), shown, ridges, Regressions(seen, of))
        blends[r] = {name: Ridge(**fitted(f"{r}.both.{name}", 2), penalty=math.nan) for name in both}
    return AreaMaps(maps, true, labels, blends)


def _tensors(name: str, fitted: Ridge | Logistic) -> dict[str, np.ndarray]:
    """A regression as arrays of a file."""
    arrays = {f"{name}.{key}": np.ascontiguousarray(getattr(fitted, key), np.float64) for key in _ARRAYS}
    return arrays | {f"{name}.bias": np.array(fitted.bias, np.float64)}


def _array(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], kind: str = "f") -> np.ndarray:
    """A tensor of a file, checked."""
    found = tensors[name]
    if found.shape != shape or found.dtype.kind != kind or not np.isfinite(found).all():
        raise ValueError(f"expected finite {name} of shape {shape}, got {found.dtype} of {found.shape}")
    return found
