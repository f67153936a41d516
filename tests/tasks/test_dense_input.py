"""Segmentation and reconstruction on what data sets are really like: what they refuse before a run starts, smaller
subjects, cropped ones, several coils, scanners that undersampled, and contours of a few subjects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cohort import simulated, write
from torch import Tensor

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader import statistics
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.collate import collate
from kmtr.exported import HEAD, WEIGHTS, export_encoder
from kmtr.inputs import full_image
from kmtr.physics.sampling import VALIDATION
from kmtr.tasks import Model, Preparer, accumulate, priors, stages_of
from kmtr.tasks.base import LOSS
from kmtr.train import start
from kmtr.train.resolve import resolve
from kmtr.types import UNLABELLED, InputError, Study, View

CPU = torch.device("cpu")


def changed(study: Study, change: Callable[[View], View]) -> Study:
    return replace(study, views={name: change(view) for name, view in study.views.items()})


def without_contours(view: View) -> View:
    return replace(view, segmentation=None, contoured=None)


def at_odd_frames(view: View) -> View:
    assert view.segmentation is not None
    contours = view.segmentation.copy()
    contours[:, ::2] = UNLABELLED
    return replace(view, segmentation=contours)


def every_other_line(view: View) -> View:
    slices, _, frames, lines, _ = view.kspace.shape
    sampled = np.zeros((slices, frames, lines), bool)
    sampled[..., ::2] = True
    return replace(view, kspace=np.where(sampled[:, None, ..., None], view.kspace, 0), sampled=sampled)


def dense(config: RunConfig, root: Path, **changes: Any) -> RunConfig:
    """Both tasks from scratch on the dataset in `root`."""
    asked = {"stage": "task", "task.tasks": "segmentation,reconstruction", "task.encoder": "none", "task.steps": 4}
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    return override(config, asked | {"data.root": str(root), "task.channels": 8} | keys)


def ready(config: RunConfig, head: float = 0.0) -> tuple[Model, Preparer, Any, Reader]:
    """Model, preparer, stage, and the training subjects; `head`: SD of the last layers' weights, instead of 0."""
    reader = Dataset.open(config.data).reader("train", config.data)
    tables = statistics.fit(config, reader).tensors()
    tables |= start.task_tables(config, reader, tables)
    torch.manual_seed(0)
    model, (stage,) = Model(config), stages_of(config)
    if head:
        for task in model.heads.values():
            torch.nn.init.normal_(task.out.weight, std=head)  # type: ignore[union-attr, arg-type]
    return model, Preparer(config, tables, CPU), stage, reader


def batch_of(config: RunConfig, reader: Reader, prepare: Preparer) -> Batch:
    """All subjects as a validation sees them."""
    rows = range(len(reader))
    return collate(reader.samples(rows), config, None, 0, prepare.wanted, VALIDATION).to(CPU)


@pytest.fixture(scope="module")
def plain(small: RunConfig) -> list[Study]:
    return [simulated(i, small) for i in range(8)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task__patch": (7, 8)}, r"task\.patch: expected even divisors of data\.matrix=\(32, 32\), got \(7, 8\)"),
        ({"task__patch": (8, 6)}, r"task\.patch: expected even divisors .* got \(8, 6\)"),
        ({"task__patch": (0, 8)}, r"task\.patch: expected even divisors .* got \(0, 8\)"),
        ({"task__patch": (1, 1)}, r"task\.patch: expected even divisors .* got \(1, 1\)"),
        (
            {"task__system": "components"},
            r"task\.system: expected one that offers tokens or maps for segmentation, .*, got components",
        ),
        (
            {"task__system": "kspce"},
            r"task\.system: expected one of kspace, image, unet, linet, resnet50, xf, kgin, kmae, components, got "
            "'kspce'",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_before_a_run_starts(
    small: RunConfig, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says) as error:
        resolve(dense(small, Path(small.data.root), **changes))
    assert "\n" not in str(error.value)
    assert not list(Path(small.storage.root).glob("*/identity.json")), "no folder of a run was begun"


def test_a_dataset_without_contours_or_without_whole_images_is_refused(
    small: RunConfig, plain: list[Study], tmp_path: Path
) -> None:
    write(tmp_path / "plain", {"train": [changed(study, without_contours) for study in plain]})
    write(tmp_path / "fast", {"train": [changed(study, every_other_line) for study in plain]})
    write(tmp_path / "between", {"train": [changed(study, at_odd_frames) for study in plain]})
    contours = "expected subjects with contours in the chosen views, slices and frames .* got none among 8 training"
    for name, task, says in (
        ("plain", "segmentation", contours),
        ("between", "segmentation", contours),
        ("fast", "reconstruction", "expected subjects that the scanner sampled fully .* got none among 8 training"),
    ):
        with pytest.raises(InputError, match=rf"task\.tasks: {says}") as error:
            resolve(dense(small, tmp_path / name, task__tasks=task, data__frames=2))
        assert "\n" not in str(error.value)
    resolve(dense(small, tmp_path / "between", task__tasks="segmentation"))
    resolve(dense(small, tmp_path / "plain", task__tasks="reconstruction"))
    resolve(dense(small, tmp_path / "fast", task__tasks="segmentation"))


def test_an_encoder_that_does_not_fit_is_refused(small: RunConfig, tables: dict[str, Tensor], tmp_path: Path) -> None:
    export_encoder(tmp_path / "whole", small, {}, tables)
    other = {"data.frames": 8, "model.patch": (2, 8, 8)}
    export_encoder(tmp_path / "longer", override(small, other), {}, tables)
    for name, lost in (("headless", HEAD), ("empty", WEIGHTS)):
        export_encoder(tmp_path / name, small, {}, tables)
        (tmp_path / name / lost).unlink()
    resolve(dense(small, Path(small.data.root), task__encoder=str(tmp_path / "whole")))
    for name, says in (
        ("longer", r"data\.frames: expected 8, as the encoder in .* has it, got 4; take"),
        ("headless", r"task\.encoder: expected a folder with encoder\.safetensors and encoder\.json"),
        ("empty", r"task\.encoder: expected a folder with encoder\.safetensors and encoder\.json"),
    ):
        with pytest.raises(InputError, match=says) as error:
            resolve(dense(small, Path(small.data.root), task__encoder=str(tmp_path / name)))
        assert "\n" not in str(error.value)


def test_a_few_contoured_among_many_are_found(small: RunConfig, plain: list[Study], tmp_path: Path) -> None:
    """As in a biobank: the mean mask is that of those who are contoured, however rare they are."""
    studies = [changed(simulated(i, small), without_contours) for i in range(8, 48)]
    studies[29], studies[11] = plain[0], plain[1]
    write(tmp_path, {"train": studies})
    config = dense(small, tmp_path, task__tasks="segmentation")
    reader = Dataset.open(config.data).reader("train", config.data)
    rows = list(range(len(reader)))
    assert sorted(start.usable(config, reader, rows, "masks")) == [11, 29]
    both = priors.mask_log_prior(config.data, start.averaged(config, reader, [11, 29], "masks"))
    assert torch.equal(start.task_tables(config, reader, {})["mask_log_prior"], both)


def test_a_batch_without_any_contour_has_a_gradient_of_zero(
    small: RunConfig, plain: list[Study], tmp_path: Path
) -> None:
    """All weights have one: workers whose subjects differ exchange the same gradients."""
    write(tmp_path, {"train": [*plain[:2], *(changed(study, without_contours) for study in plain[2:])]})
    config = dense(small, tmp_path, task__tasks="segmentation")
    model, prepare, stage, reader = ready(config, head=0.1)

    class Plain:
        def __call__(self, inputs: Any, predict: bool = False) -> Any:
            return model(inputs, predict)

        def backward(self, loss: Tensor) -> None:
            loss.backward()

    batch = batch_of(config, reader, prepare)
    learning = replace(batch, epoch=torch.zeros_like(batch.key))[2:]
    out = accumulate(Plain(), [replace(learning, real=6)], prepare, stage)
    assert float(out.sums["loss"]) == 0
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert not weight.grad.any(), name


def smaller(view: View) -> View:
    """The first slice and the first two frames."""
    assert view.segmentation is not None
    return replace(
        view, kspace=np.ascontiguousarray(view.kspace[:1, :, :2]), segmentation=view.segmentation[:1, :2].copy()
    )


def test_padding_is_predicted_as_nothing(small: RunConfig, plain: list[Study], tmp_path: Path) -> None:
    write(tmp_path, {"train": [changed(plain[0], smaller), *plain[1:]]})
    config = dense(small, tmp_path)
    model, prepare, stage, reader = ready(config, head=0.5)
    batch = batch_of(config, reader, prepare)
    assert batch.padded[0].tolist() == [[False, False, True, True], [True] * 4, [False, False, True, True]]
    said = model(prepare(batch, stage), predict=True)
    masks, image = said["segmentation"]["masks"], said["reconstruction"]["image"]
    assert torch.equal((masks == UNLABELLED).all(-1).all(-1), batch.padded)
    assert torch.equal((masks == UNLABELLED).any(-1).any(-1), batch.padded)
    assert torch.equal(image.isnan().all(-1).all(-1), batch.padded)
    assert torch.equal(image.isnan().any(-1).any(-1), batch.padded)
    scores = prepare.tasks["segmentation"].judge(batch, {"masks": batch.masks})
    assert all(bool(((values == 1) | values.isnan()).all()) for values in scores.values())
    assert float(scores["dice_lv_cavity_ed"][0]) == 1


def test_the_matrix_may_be_cropped(small: RunConfig, plain: list[Study], tmp_path: Path) -> None:
    """Masks and images are those of the cropped image, pixel by pixel."""
    write(tmp_path, {"train": plain}, "float32")
    config = dense(small, tmp_path, data__matrix=(24, 24), data__crop=True, task__queries="position")
    model, prepare, stage, reader = ready(config)
    batch = batch_of(config, reader, prepare)
    said = model(prepare(batch, stage), predict=True)
    assert said["segmentation"]["masks"].shape == said["reconstruction"]["image"].shape == (8, 3, 4, 24, 24)
    whole = override(config, {"data.matrix": (32, 32), "data.crop": False})
    uncropped = collate(reader.samples(range(8)), whole, None, 0, prepare.wanted, VALIDATION).to(CPU)
    inside = slice(4, 28)
    assert batch.masks is not None
    assert uncropped.masks is not None
    assert torch.equal(batch.masks, uncropped.masks[..., inside, inside])
    expected = full_image(uncropped, (32, 32))[..., inside, inside]
    torch.testing.assert_close(full_image(batch, (24, 24)), expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
    scores = prepare.tasks["reconstruction"].judge(batch, {"image": expected})
    assert float(scores["ssim"].min()) > 0.9999


def test_all_lines_of_all_coils_put_back_are_the_image(small: RunConfig, tmp_path: Path) -> None:
    """Data consistency with three coils, and with one beside it in the same batch, whatever the network says."""
    three = override(small, {"simulate.coils": 3, "data.coils": 3})
    write(tmp_path, {"train": [*(simulated(i, three) for i in range(6)), *(simulated(i, small) for i in range(6, 8))]})
    config = dense(three, tmp_path, task__tasks="reconstruction", task__data_consistency=True, task__queries="position")
    model, prepare, stage, reader = ready(config, head=0.5)
    batch = batch_of(config, reader, prepare)
    assert set(batch.extent[:, 0, 0].tolist()) == {1, 3}
    truth = full_image(batch, config.data.matrix)
    complete = replace(batch, sampled=batch.acquired)
    for given, best in ((batch, False), (complete, True)):
        with torch.no_grad():
            image = model(prepare(given, stage), predict=True)["reconstruction"]["image"]
        error = float((image - truth).abs().max() / truth.max())
        assert (error < 1e-3) is best, error


def test_what_the_scanner_undersampled_is_no_truth(small: RunConfig, plain: list[Study], tmp_path: Path) -> None:
    """Beside fully sampled subjects: neither learnt from, nor scored, nor part of what the mean image's loss is."""
    fast = [changed(study, every_other_line) for study in plain[4:]]
    write(tmp_path / "both", {"train": [*plain[:4], *fast]}, "float32")
    write(tmp_path / "full", {"train": plain[:4]}, "float32")
    both, full = (dense(small, tmp_path / name, task__tasks="reconstruction") for name in ("both", "full"))
    resolve(both)
    model, prepare, stage, reader = ready(both, head=0.5)
    batch = batch_of(both, reader, prepare)
    given = prepare(replace(batch, epoch=torch.zeros_like(batch.key)), stage)
    with torch.no_grad():
        loss = model(given)["reconstruction"][LOSS]
        said = model(prepare(batch, stage), predict=True)["reconstruction"]
    assert (loss[:4] > 0).all()
    assert not loss[4:].any()
    for values in prepare.tasks["reconstruction"].judge(batch, said).values():
        assert values[:4].isfinite().all()
        assert values[4:].isnan().all()
    mean = {"image_mean": torch.ones(3, 32, 32)}
    constants = [
        start.task_tables(one, Dataset.open(one.data).reader("train", one.data), mean)["image_constant"]
        for one in (both, full)
    ]
    torch.testing.assert_close(*constants, rtol=1e-5, atol=0)


def test_a_class_that_nobody_draws_is_never_predicted(small: RunConfig, plain: list[Study], tmp_path: Path) -> None:
    """Short axes with both ventricles, half of them the left alone; long axes without contours."""

    def ventricles(view: View, classes: tuple[int, ...]) -> View:
        assert view.segmentation is not None
        known = np.isin(view.segmentation, (0, *classes, UNLABELLED))
        return replace(view, segmentation=np.where(known, view.segmentation, np.uint8(0)), contoured=classes)

    def drawn(number: int, study: Study) -> Study:
        sax = ventricles(study.views["sax"], (1, 2) if number % 2 else (1, 2, 3))
        return replace(study, views={"sax": sax, "lax_4ch": without_contours(study.views["lax_4ch"])})

    write(tmp_path, {"train": [drawn(i, study) for i, study in enumerate(plain)]})
    config = dense(small, tmp_path, task__tasks="segmentation")
    model, prepare, stage, reader = ready(config, head=0.2)
    masks = model(prepare(batch_of(config, reader, prepare), stage), predict=True)["segmentation"]["masks"]
    assert set(masks[:, :2].unique().tolist()) == {0, 1, 2, 3}
    assert set(masks[:, 2].unique().tolist()) == {0}
