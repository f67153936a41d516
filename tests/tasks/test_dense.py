"""Segmentation and reconstruction: their losses in closed form, where they begin, and what they must not see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.collate import collate
from kmtr.inputs import Shared, full_image
from kmtr.metrics import images
from kmtr.physics.fourier import fft2c
from kmtr.physics.sampling import PATTERN, VALIDATION
from kmtr.tasks import Model, Preparer, accumulate, priors, stages_of
from kmtr.tasks.base import LOSS
from kmtr.tasks.dense import Asked
from kmtr.tasks.losses import absolute_and_structural, cross_entropy_and_dice
from kmtr.tasks.reconstruction import consistent
from kmtr.train import start
from kmtr.types import UNLABELLED

CPU = torch.device("cpu")
ALL = "phenotypes,diseases,segmentation,reconstruction"


@pytest.fixture(scope="module")
def config(small: RunConfig) -> RunConfig:
    asked = {"stage": "task", "task.tasks": "segmentation,reconstruction", "task.encoder": "none", "task.steps": 4}
    return override(small, asked | {"task.patch": (8, 8), "task.channels": 8})


@pytest.fixture(scope="module")
def reader_of(config: RunConfig) -> Reader:
    return Dataset.open(config.data).reader("train", config.data)


@pytest.fixture(scope="module")
def fitted(config: RunConfig, reader_of: Reader, tables: dict[str, Tensor]) -> dict[str, Tensor]:
    return tables | start.task_tables(config, reader_of, tables)


def ready(config: RunConfig, fitted: dict[str, Tensor], head: float = 0.0) -> tuple[Model, Preparer, Any]:
    """Model, preparer and stage; `head`: SD of the weights at which the last layers begin, instead of 0."""
    torch.manual_seed(0)
    model, (stage,) = Model(config), stages_of(config)
    for task in model.heads.values():
        if head and hasattr(task, "out"):
            torch.nn.init.normal_(task.out.weight, std=head)
    return model, Preparer(config, fitted, CPU), stage


def batch_of(
    config: RunConfig, reader: Reader, prepare: Preparer, rows: range = range(4), purpose: int = VALIDATION
) -> Batch:
    epoch = 0 if purpose == PATTERN else None
    host = collate(reader.samples(rows), config, None, 0, prepare.wanted, purpose)
    batch = host.to(CPU)
    return batch if epoch is None else replace(batch, epoch=torch.zeros_like(batch.key))


def two_cells() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, truth, drawn classes and counts of two subjects with a cell of 2 x 2 pixels each."""
    logits = torch.zeros(2, 6, 2, 2)
    truth = torch.tensor([[[0, 1], [1, 2]], [[0, 0], [3, UNLABELLED]]], dtype=torch.uint8)
    return logits, truth, torch.ones(2, 6, dtype=torch.bool), torch.tensor([1, 1])


def test_the_loss_of_equal_probabilities_in_closed_form() -> None:
    loss = cross_entropy_and_dice(*two_cells())
    p = 1 / 6
    overlap = [
        np.mean([(2 * p * n + 1) / (4 * p + n + 1) for n in (2, 1, 0, 0, 0)]),
        np.mean([(2 * p * n + 1) / (3 * p + n + 1) for n in (0, 0, 1, 0, 0)]),
    ]
    np.testing.assert_allclose(loss, [np.log(6) + 1 - overlap[0], np.log(6) + 1 - overlap[1]], rtol=1e-6)


def test_a_right_answer_costs_nothing_and_an_empty_subject_neither() -> None:
    _, truth, drawn, _ = two_cells()
    right = 50 * torch.nn.functional.one_hot(truth.long().clamp(max=5), 6).movedim(-1, 1).float()
    loss = cross_entropy_and_dice(right, truth, drawn, torch.tensor([1, 1, 0]))
    np.testing.assert_allclose(loss, 0, atol=1e-6)


def test_the_background_of_a_source_may_be_what_it_does_not_draw() -> None:
    """Only classes 1 and 2 are drawn: a background pixel that is called 3 is no error, one called 1 is."""
    drawn = torch.tensor([[True, True, True, False, False, False]])
    truth = torch.zeros(1, 2, 2, dtype=torch.uint8)
    losses = []
    for said in (0, 3, 1):
        logits = torch.zeros(1, 6, 2, 2)
        logits[:, said] = 50
        losses.append(float(cross_entropy_and_dice(logits, truth, drawn, torch.tensor([1]))))
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses[1] == pytest.approx(0, abs=1e-6)
    assert losses[2] > 40


def test_where_one_class_alone_is_contoured_the_rest_is_not_that_class() -> None:
    """As at the end-systole of the Sunnybrook data: beside the cavity may be anything but cavity."""
    truth = torch.full((1, 2, 2), UNLABELLED, dtype=torch.uint8)
    truth[0, 0, 0] = 1
    drawn = torch.tensor([[True, True, True, False, False, False]])
    found = []
    for beside in (0, 2, 3, 1):
        logits = torch.zeros(1, 6, 2, 2)
        logits[:, beside] = 50
        logits[0, :, 0, 0] = 50 * torch.eye(6)[1]
        found.append(float(cross_entropy_and_dice(logits, truth, drawn, torch.tensor([1]))))
    assert found[:3] == pytest.approx([0, 0, 0], abs=1e-6)
    assert found[3] > 30


def test_unlabelled_pixels_change_no_bit_of_loss_or_gradient() -> None:
    logits, truth, drawn, counts = two_cells()
    found = []
    for value in (0.0, 7.0):
        changed = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        changed[1, :, 1, 1] = value * torch.arange(6)
        changed.requires_grad_(True)
        loss = cross_entropy_and_dice(changed, truth, drawn, counts)
        loss.sum().backward()
        assert changed.grad is not None
        found.append((loss.detach(), changed.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert not found[0][1][1, :, 1, 1].any()
    found[1][1][1, :, 1, 1] = 0
    assert torch.equal(found[0][1], found[1][1])


def test_the_image_loss_is_that_of_the_metrics() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(3, 16, 16, generator=generator)
    guess = truth + 0.1 * torch.randn(3, 16, 16, generator=generator)
    peak = torch.stack([truth[:2].max(), truth[2].max()])
    loss = absolute_and_structural(guess, truth, peak, torch.tensor([2, 1]))
    for subject, cells in enumerate((slice(0, 2), slice(2, 3))):
        a, b, top = guess[cells].numpy(), truth[cells].numpy(), float(peak[subject])
        expected = np.abs(a - b).mean() / top + 1 - images.ssim(a, b, top)
        assert float(loss[subject]) == pytest.approx(expected, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(absolute_and_structural(guess, truth, peak, torch.tensor([2, 1])), loss)


def test_step_zero_is_the_mean_mask_and_the_shared_image(
    config: RunConfig, reader_of: Reader, fitted: dict[str, Tensor]
) -> None:
    model, prepare, stage = ready(config, fitted)
    batch = batch_of(config, reader_of, prepare)
    said = model(prepare(batch, stage), predict=True)
    prior = priors.mask_log_prior(config.data, start.averaged(config, reader_of, range(len(reader_of)), "masks"))
    mean = prior.argmax(1).to(torch.uint8)[list(batch.slots), None].expand(said["segmentation"]["masks"].shape)
    there = ~batch.padded
    assert torch.equal(said["segmentation"]["masks"][there], mean[there])
    votes = torch.zeros(6, *mean.shape[3:], dtype=torch.int64)
    for row in range(len(reader_of)):
        one = batch_of(config, reader_of, prepare, range(row, row + 1))
        assert one.masks is not None
        votes += torch.stack([(one.masks[0, 0] == value).sum(0) for value in range(6)])
    assert torch.equal(mean[0, 0, 0].long(), votes.argmax(0)), "the class that most frames have"
    lines = override(config, {"task.queries": "position"})
    alone, prepare, stage = ready(lines, fitted)
    image = alone(prepare(batch, stage), predict=True)["reconstruction"]["image"]
    flat = fitted["image_mean"][list(batch.slots), None]
    ratio = image / flat
    assert float(ratio[there].std(dim=(-2, -1)).max()) < 1e-4, "the population's mean image, scaled"


def test_a_query_sees_what_moves_at_a_scale_of_its_own(
    config: RunConfig, reader_of: Reader, fitted: dict[str, Tensor]
) -> None:
    """Frame and mean about the population's mean image, and the frame less the mean, of variance 1 over all."""
    _, prepare, stage = ready(config, fitted)
    batch = batch_of(config, reader_of, prepare)
    asked = prepare(batch, stage).tasks["segmentation"]
    frame, mean, moving = asked.on_grid(asked.shown, 0.0).unbind(3)
    there = (~batch.padded)[..., None, None]
    sd, own = prepare.tables["image_sd"], prepare.tables["moving_sd"]
    assert 0 < float(own) < float(sd)
    torch.testing.assert_close(moving, (frame - mean) * there * sd / own, rtol=1e-3, atol=1e-3)
    assert float(moving.sum(2).abs().max()) < 1e-3, "the mean over the cycle does not move"
    squares, pixels = 0.0, 0
    for each in start.averaged(config, reader_of, range(len(reader_of)), "masks"):
        seen = Shared.of(each, config.data.matrix).image
        for image, padded in zip(seen, each.padded, strict=True):
            for slice_, absent in zip(image, padded, strict=True):
                squares += float((slice_[~absent] - slice_[~absent].mean(0)).double().square().sum())
                pixels += slice_[~absent].numel()
    assert float(own) == pytest.approx((squares / pixels) ** 0.5, rel=1e-4)


def test_the_loss_of_a_constant_answer_is_one(config: RunConfig, reader_of: Reader, fitted: dict[str, Tensor]) -> None:
    asked = override(config, {"task.queries": "position"})
    model, prepare, stage = ready(asked, fitted)
    batch = batch_of(asked, reader_of, prepare, range(len(reader_of)))
    out = model(prepare(batch, stage))
    assert float(out["segmentation"][LOSS].mean()) == pytest.approx(1, abs=0.02)
    assert float(out["reconstruction"][LOSS].mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("queries", ["shared", "position"])
def test_lines_that_were_not_acquired_change_no_bit_of_a_prediction(
    config: RunConfig, reader_of: Reader, fitted: dict[str, Tensor], queries: str
) -> None:
    asked = override(config, {"task.queries": queries, "task.data_consistency": True})
    model, prepare, stage = ready(asked, fitted, head=0.5)
    batch = batch_of(asked, reader_of, prepare)
    noise = torch.randn(batch.kspace.shape, dtype=batch.kspace.dtype, generator=torch.Generator().manual_seed(0))
    other = replace(batch, kspace=torch.where(batch.sampled[:, :, None, :, :, None], batch.kspace, noise))
    assert not torch.equal(other.kspace, batch.kspace)
    found = [model(prepare(each, stage), predict=True) for each in (batch, other)]
    assert torch.equal(found[0]["segmentation"]["masks"], found[1]["segmentation"]["masks"])
    assert torch.equal(
        found[0]["reconstruction"]["image"].nan_to_num(), found[1]["reconstruction"]["image"].nan_to_num()
    )
    beside = full_image(batch, asked.data.matrix)
    assert not torch.equal(beside, full_image(other, asked.data.matrix)), "else nothing was tried"


def test_acquired_lines_are_put_back() -> None:
    generator = torch.Generator().manual_seed(0)
    coils = torch.randn(2, 3, 16, 16, dtype=torch.complex64, generator=generator)
    kspace = fft2c(coils)
    total = coils.abs().square().sum(1).sqrt()
    none, every = torch.zeros(2, 16, dtype=torch.bool), torch.ones(2, 16, dtype=torch.bool)
    guess = torch.rand(2, 16, 16, generator=generator)
    torch.testing.assert_close(consistent(guess, kspace, none), guess, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(consistent(guess, kspace, every), total, rtol=1e-4, atol=1e-5)


def test_in_training_a_few_frames_of_those_that_are_labelled(
    config: RunConfig, reader_of: Reader, fitted: dict[str, Tensor]
) -> None:
    asked = override(config, {"task.tasks": "segmentation", "task.frames": 1})
    _, prepare, stage = ready(asked, fitted)
    batch = batch_of(asked, reader_of, prepare, purpose=PATTERN)
    assert batch.masks is not None
    batch.masks[0, :, 1:] = UNLABELLED
    batch.masks[1] = UNLABELLED
    cells: Asked = prepare(batch, stage).tasks["segmentation"]
    frames = [set(cells.place[2][cells.place[0] == row].tolist()) for row in range(4)]
    assert frames[0] == {0}
    assert frames[1] == set()
    assert len(frames[2]) == len(frames[3]) == 1
    drawn = set()
    for epoch in range(12):
        again = replace(batch, epoch=torch.full_like(batch.key, epoch))
        chosen: Asked = prepare(again, stage).tasks["segmentation"]
        drawn |= set(chosen.place[2][chosen.place[0] == 2].tolist())
    assert len(drawn) > 1, "another one in another epoch"
    out = Model(asked)(prepare(batch, stage))["segmentation"][LOSS]
    assert float(out[1]) == 0


def test_one_batch_is_two_micro_batches_and_tasks_share_one_reading(
    config: RunConfig, reader_of: Reader, tables: dict[str, Tensor]
) -> None:
    asked = override(config, {"task.tasks": ALL, "task.diseases": ("dcm",), "task.targets": ("lvedv_ml",)})
    fitted = tables | start.task_tables(asked, reader_of, tables)

    class Plain:
        def __init__(self) -> None:
            self.model, self.prepare, self.stage = ready(asked, fitted, head=0.1)
            self.parts = 1

        def __call__(self, inputs: Any, predict: bool = False) -> Any:
            return self.model(inputs, predict)

        def backward(self, loss: Tensor) -> None:
            (loss / self.parts).backward()

    grads = []
    for parts in (1, 2):
        engine = Plain()
        engine.parts = parts
        calls = []
        engine.model.systems["kspace"].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        batch = batch_of(asked, reader_of, engine.prepare, purpose=PATTERN)
        micro = [batch[i : i + 4 // parts] for i in range(0, 4, 4 // parts)]
        accumulate(engine, micro, engine.prepare, engine.stage)
        assert len(calls) == parts, "one pass of the encoder for all tasks"
        grads.append({name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5)
