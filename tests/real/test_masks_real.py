"""Segmentation on real hearts: geometry, contours, classes and loss fit each other if a model can learn these very
subjects by heart. Skipped where the samples are missing.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import torch
from cohort import write
from torch import Tensor

from kmtr.config import RunConfig, override
from kmtr.config.recipes import tiny
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader import statistics
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.collate import collate
from kmtr.data.sources import Options, read
from kmtr.metrics.dense import PHASES
from kmtr.physics.sampling import VALIDATION
from kmtr.tasks import Model, Preparer, accumulate, stages_of
from kmtr.train import start
from kmtr.types import UNLABELLED, Study

SHARED = Path(os.environ.get("KMTR_SHARED", Path(__file__).parents[2].parent / "shared" / "data"))
MATRIX = (96, 96)
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not all((SHARED / name).is_dir() for name in ("acdc_h5", "sunnybrook")),
    reason="real samples (KMTR_SHARED or ../shared/data) are missing",
)


def acdc(folder: Path) -> list[Study]:
    """The samples of ACDC, written as the challenge has them; their spacing is lost."""
    found = []
    for row in csv.DictReader((SHARED / "acdc_h5" / "summary.csv").read_text().splitlines()):
        name, frames = row["patient"], (int(row["ed_frame"]), int(row["es_frame"]))
        (folder / name).mkdir(parents=True)
        for number in frames:
            with h5py.File(SHARED / "acdc_h5" / f"{name}_frame{number:02d}.h5") as file:
                for key, ending in (("image", ""), ("label", "_gt")):
                    image = nibabel.Nifti1Image(np.asarray(file[key]).T, np.eye(4))
                    nibabel.save(image, folder / name / f"{name}_frame{number:02d}{ending}.nii")
        (folder / name / "Info.cfg").write_text(f"ED: {frames[0]}\nES: {frames[1]}\nGroup: {row['group']}\n")
        found.append(read(folder / name, Options(matrix=MATRIX)))
    return found


def sunnybrook() -> list[Study]:
    names = ("SC-HF-I-1", "SC-HF-I-4")
    return [read(SHARED / "sunnybrook" / name / f"{name}_4d.nii.gz", Options(matrix=MATRIX)) for name in names]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Both sources side by side: ACDC draws three classes at two frames, Sunnybrook two at two of twenty."""
    folder = tmp_path_factory.mktemp("real")
    write(folder / "acdc", {"train": acdc(folder / "layout")}, "float32")
    write(folder / "sunnybrook", {"train": sunnybrook()}, "float32")
    return override(
        tiny(),
        {
            "stage": "task",
            "task.tasks": "segmentation",
            "task.encoder": "none",
            "task.patch": (16, 16),
            "task.channels": 16,
            "data.root": str(folder / "acdc"),
            "data.more": (str(folder / "sunnybrook"),),
            "data.views": ("sax",),
            "data.sax_slices": 3,
            "data.frames": 20,
            "data.matrix": MATRIX,
            "data.global_batch": 12,
            "task.frames": 1,
            "data.loader": "threads",
            "model.patch": (4, 16, 16),
            "model.width": 64,
            "model.depth": 1,
            "model.decoder_width": 64,
            "model.readout_fraction": 0.25,
            "sampling.accelerations": (4,),
            "sampling.acs_lines": 8,
            "evaluate.accelerations": (4,),
            "train.workers": 1,
        },
    )


@dataclass
class Alone:
    """A model, its optimizer, and what an engine does with them, in one process.

    Attributes:
        parts: micro-batches of a step.
    """

    model: Model
    rate: float
    parts: int = 1
    optimizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), self.rate, betas=(0.9, 0.95), weight_decay=0.0)

    def __call__(self, inputs: Any, predict: bool = False) -> Any:
        return self.model(inputs, predict)

    def backward(self, loss: Tensor) -> None:
        (loss / self.parts).backward()

    def update(self, rate: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.rate
        self.optimizer.step()
        self.optimizer.zero_grad()


def batch_of(config: RunConfig, reader: Reader, prepare: Preparer, rows: Sequence[int], epoch: int | None) -> Batch:
    """Some subjects; `epoch` None: as validation sees them."""
    if epoch is None:
        return collate(reader.samples(rows), config, None, 0, prepare.wanted, VALIDATION).to(CPU)
    return collate(reader.samples(rows), config, None, epoch, prepare.wanted).to(CPU)


def learn(config: RunConfig, steps: int, rate: float = 2e-3) -> tuple[Model, Preparer, Reader]:
    """Train from scratch on all subjects, a cosine from the first step on."""
    reader = Dataset.open(config.data).reader("train", config.data)
    tables = statistics.fit(config, reader).tensors()
    tables |= start.task_tables(config, reader, tables)
    torch.manual_seed(0)
    engine, prepare, (stage,) = Alone(Model(config), rate), Preparer(config, tables, CPU), stages_of(config)
    order, size = np.random.default_rng(0), config.data.global_batch
    left: list[int] = []
    for step in range(steps):
        if len(left) < size:
            left = [*left, *order.permutation(len(reader)).tolist()]
        rows, left = left[:size], left[size:]
        accumulate(engine, [batch_of(config, reader, prepare, rows, step)], prepare, stage)
        engine.update(min(1.0, (step + 1) / 10) * 0.5 * (1 + np.cos(np.pi * step / steps)))
    return engine.model.eval(), prepare, reader


@torch.no_grad()
def scored(
    config: RunConfig, model: Model, prepare: Preparer, reader: Reader
) -> tuple[dict[str, Tensor], Batch, Tensor]:
    """Scores of all subjects, and their batch and predicted masks."""
    (stage,) = stages_of(config)
    batch = batch_of(config, reader, prepare, range(len(reader)), None)
    said = model(prepare(batch, stage), predict=True)["segmentation"]
    return prepare.tasks["segmentation"].judge(batch, said), batch, said["masks"]


def mean_dice(scores: dict[str, Tensor]) -> dict[str, float]:
    found = {name: float(values.nanmean()) for name, values in scores.items()}
    return {name: value for name, value in found.items() if np.isfinite(value)}


@pytest.mark.parametrize(
    ("steps", "least"),
    [pytest.param(40, 0.35, id="a little"), pytest.param(400, 0.8, id="well", marks=pytest.mark.full)],
)
def test_it_learns_real_hearts_by_heart(config: RunConfig, steps: int, least: float) -> None:
    model, prepare, reader = learn(config, steps)
    scores, _, _ = scored(config, model, prepare, reader)
    found = mean_dice(scores)
    assert np.mean(list(found.values())) > least, found


def test_the_mean_mask_is_no_rival(config: RunConfig) -> None:
    """What a model begins from, so that the bounds above say that something is learnt."""
    found = mean_dice(scored(config, *learn(config, 0))[0])
    assert np.mean(list(found.values())) < 0.3, found


def test_sources_draw_different_classes(config: RunConfig) -> None:
    """Nobody draws atria, Sunnybrook no right ventricle: it is unknown there, and scored where ACDC draws it."""
    scores, batch, masks = scored(config, *learn(config, 0))
    assert batch.contoured is not None
    assert batch.contoured[:10, 0].tolist() == 10 * [[True, True, True, True, False, False]]
    assert batch.contoured[10:, 0].tolist() == 2 * [[True, True, True, False, False, False]]
    assert set(mean_dice(scores)) == {
        f"dice_{name}_{phase}" for name in ("lv_cavity", "lv_myocardium", "rv") for phase in PHASES
    }
    assert scores["dice_rv_ed"][:10].isfinite().all()
    assert scores["dice_rv_ed"][10:].isnan().all()
    assert set(masks.unique().tolist()) <= {0, 1, 2, 3, UNLABELLED}
    assert torch.equal((masks == UNLABELLED).all(-1).all(-1), batch.padded)
    assert batch.masks is not None
    labelled = (batch.masks != UNLABELLED).any(-1).any(-1).any(1)
    assert labelled.sum(1).tolist() == 12 * [2], "end-diastole and end-systole, of two frames or of twenty"
