"""A dataset in the raw layout of nnU-Net v2, so that nnU-Net itself can be trained on what the systems here see.

    OUT/Dataset001_kmtr/imagesTr/train00001_sax_ed_0000.nii.gz    image, axes x y slice
                        labelsTr/train00001_sax_ed.nii.gz         classes as kmtr.types.SEGMENTATION_CLASSES
                        imagesTs, labelsTs                        the test split
                        dataset.json, splits_final.json           what nnU-Net reads; its fold: train and val

A case is one view of one subject at end-diastole or end-systole of the truth. Subjects are numbered in the order of
their split; no file names one. UNLABELLED pixels become nnU-Net's ``ignore`` label.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import patterns, pipeline
from kmtr.data.loader.batch import Wanted
from kmtr.data.sources import optional
from kmtr.evaluate.predict.dense import nifti
from kmtr.files import write_atomic
from kmtr.inputs import standardised
from kmtr.metrics.dense import PHASES
from kmtr.metrics.segmentation import extreme_frames
from kmtr.physics.sampling import VALIDATION
from kmtr.progress import Bar
from kmtr.tasks.views import views_of
from kmtr.types import SEGMENTATION_CLASSES, UNLABELLED, InputError

CHUNK = 16
IGNORE = len(SEGMENTATION_CLASSES)
FOLDERS = {"train": "Tr", "val": "Tr", "test": "Ts"}
"""Split -> ending of the folders."""


@dataclass
class Written:
    """Cases written, and those left out.

    Attributes:
        cases: split -> their names.
        ignored: a case has pixels of which nothing is known.
        left_out: views of subjects of which no mask shows the cavity, or the size of a pixel or the image is unknown.
        undrawn: classes that the source of some case does not draw.
    """

    cases: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in FOLDERS})
    ignored: bool = False
    left_out: int = 0
    undrawn: set[int] = field(default_factory=set)


def run(config: RunConfig) -> dict[str, Any]:
    """Write the dataset; what the last line on stdout says. The same command writes the same bytes.

    Raises:
        InputError: no folder is named, it holds something else, there is no such R, nothing is contoured, or nibabel is
            not installed.
    """
    if not config.export.out or "://" in config.export.out:
        raise InputError(f"export.out: expected a local folder, got {config.export.out!r}")
    optional("nibabel")
    r = config.export.acceleration
    if r:
        config = override(config, {"sampling.accelerations": (r,)})
        patterns.check(config)
    elif config.export.input != "full":
        raise InputError(f"export.acceleration: expected an R for export.input={config.export.input}, got 0")
    dataset = Dataset.open(config.data)
    folder = Path(config.export.out) / f"Dataset{config.export.number:03d}_kmtr"
    about = folder / "kmtr.json"
    asked = {"data": dataset.digest, "input": config.export.input, "acceleration": r, "seed": config.seed}
    asked |= {"sampling": config.sampling.model_dump(mode="json"), "shape": config.data.model_dump(mode="json")}
    if folder.exists() and not (about.is_file() and json.loads(about.read_text()) == json.loads(json.dumps(asked))):
        raise InputError(f"export.out: expected no other dataset in {folder}, which exists; take another export.number")
    for kind in ("images", "labels"):
        for ending in dict.fromkeys(FOLDERS.values()):
            (folder / f"{kind}{ending}").mkdir(parents=True, exist_ok=True)
    write_atomic(about, json.dumps(asked, indent=1))
    found = Written()
    total = sum(dataset.rows(split) for split in FOLDERS)
    bar, before = Bar("export: subjects"), 0
    for split in FOLDERS:
        for done in _cases(config, dataset, split, folder, found):
            bar(before + done, total)
        before += dataset.rows(split)
    _describe(folder, found)
    for split, cases in found.cases.items():
        print(f"export: {len(cases)} cases of {split}")
    if found.left_out:
        print(
            f"export: {found.left_out} views left out: no mask shows the LV cavity, or the size of a pixel or the full "
            "image is unknown"
        )
    if found.undrawn:
        names = ", ".join(SEGMENTATION_CLASSES[value] for value in sorted(found.undrawn))
        print(f"export: note: not every source draws {names}; there background may be one of these classes")
    return {"dataset": str(folder), "cases": {split: len(names) for split, names in found.cases.items()}}


def _cases(config: RunConfig, dataset: Dataset, split: str, folder: Path, found: Written) -> Iterator[int]:
    """Write the cases of a split; number of subjects that are done, after each batch."""
    reader = dataset.reader(split, config.data)
    rows, number = list(range(len(reader))), 0
    for host in pipeline.read_in_order(reader, rows, CHUNK, config, Wanted(masks=True), VALIDATION):
        batch = host.to(torch.device("cpu"))
        assert batch.masks is not None
        images = standardised(config.export.input, batch, config.data.matrix)
        if config.export.input == "full":
            images = images.masked_fill(~batch.complete[..., None, None], torch.nan)
        for views in views_of(batch, config.data, batch.masks, images):
            number += 1
            for view, pair in views.items():
                frames = extreme_frames(pair.truth)
                if frames is None or pair.spacing_mm is None or not np.isfinite(pair.predicted[:, frames]).all():
                    found.left_out += 1
                    continue
                drawn = set(range(1, IGNORE)) if pair.contoured is None else set(pair.contoured)
                found.undrawn |= set(range(1, IGNORE)) - drawn
                for phase, t in zip(PHASES, frames, strict=True):
                    name = f"{split}{number:05d}_{view}_{phase}"
                    truth = np.where(pair.truth[:, t] == UNLABELLED, IGNORE, pair.truth[:, t]).astype(np.uint8)
                    found.ignored |= bool((truth == IGNORE).any())
                    image, ending = pair.predicted[:, t].astype(np.float32), FOLDERS[split]
                    write_atomic(folder / f"images{ending}" / f"{name}_0000.nii.gz", _file(image, pair.spacing_mm))
                    write_atomic(folder / f"labels{ending}" / f"{name}.nii.gz", _file(truth, pair.spacing_mm))
                    found.cases[split].append(name)
        yield number


def _file(values: np.ndarray, spacing_mm: tuple[float, float, float]) -> bytes:
    return nifti(values[:, None], spacing_mm, 0.0, still=True)


def _describe(folder: Path, found: Written) -> None:
    """nnU-Net's own two files.

    Raises:
        InputError: there is no case to train on.
    """
    train = [*found.cases["train"], *found.cases["val"]]
    if not train:
        raise InputError("data.root: expected training subjects whose masks show the LV cavity, got none")
    labels = {name: value for value, name in enumerate(SEGMENTATION_CLASSES)}
    said = {
        "channel_names": {"0": "MR"},
        "labels": labels | ({"ignore": IGNORE} if found.ignored else {}),
        "numTraining": len(train),
        "file_ending": ".nii.gz",
    }
    write_atomic(folder / "dataset.json", json.dumps(said, indent=1))
    fold = {"train": found.cases["train"], "val": found.cases["val"]}
    write_atomic(folder / "splits_final.json", json.dumps([fold], indent=1))
