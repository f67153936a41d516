"""What the k-space encoder sees at low resolution (`model.centre`): of visible lines alone, and in its embedding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import kmtr
from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader import statistics
from kmtr.data.loader.batch import Batch
from kmtr.exported import export_encoder
from kmtr.model.tokenizers import Centre
from kmtr.physics.cycle import static_dynamic
from kmtr.physics.fourier import crop_or_pad, magnitude_image
from kmtr.physics.lines import shared_centre
from kmtr.systems import system
from kmtr.tasks import Model, Preparer, accumulate, stages_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(small: RunConfig) -> RunConfig:
    return override(small, {"model.centre": 8, "stage": "masked", "align.steps": 0, "masked.image_weight": 0.0})


@pytest.fixture(scope="module")
def fitted(config: RunConfig, reader: Reader) -> dict[str, Tensor]:
    return statistics.tables(config, reader)


def test_with_all_lines_it_is_the_image_of_the_central_ones(batch: Batch) -> None:
    image, mean = shared_centre(batch.kspace, batch.acquired, batch.padded, 8)
    expected = magnitude_image(crop_or_pad(batch.kspace, (8, 8), (-2, -1))).flatten(3)
    ratio = image / expected
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio), rtol=1e-4, atol=1e-6)
    rms = image.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mean[:, :, 0], image.mean(2))


def test_the_population_has_unit_variance_in_what_stands_still_and_in_what_moves(
    config: RunConfig, reader: Reader, batch: Batch, fitted: dict[str, Tensor]
) -> None:
    whole = replace(batch, sampled=batch.acquired)
    seen = Centre(config.model, fitted, CPU)(whole, whole.acquired)
    still = seen.mean(2, keepdim=True)
    assert float(still.square().mean().sqrt()) == pytest.approx(1, abs=0.3)  # 8 of the 24 subjects
    assert float((seen - still).square().mean().sqrt()) == pytest.approx(1, abs=0.3)


def test_lines_that_may_not_be_seen_change_no_bit(config: RunConfig, batch: Batch, fitted: dict[str, Tensor]) -> None:
    """Of masked pretraining too: hidden lines reach neither the image nor the encoder."""
    reader = system("kspace").reader(config, fitted, CPU)
    shown = batch.sampled & (torch.arange(batch.sampled.shape[-1]) % 3 > 0)
    module = system("kspace").module(config)
    noise = torch.randn(batch.kspace.shape, dtype=batch.kspace.dtype, generator=torch.Generator().manual_seed(0))
    other = replace(batch, kspace=torch.where(shown[:, :, None, :, :, None], batch.kspace, noise))
    found = [module(*reader(each, shown=shown).settle().arguments).vector for each in (batch, other)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], module(*reader(batch).settle().arguments).vector), "else nothing was tried"


def test_it_is_part_of_the_embedding_and_has_a_gradient(
    config: RunConfig, batch: Batch, fitted: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    model, prepare, (stage,) = Model(config), Preparer(config, fitted, CPU), stages_of(config)
    reading = prepare.embedding(batch)
    vector = model(reading)["embedding"]["vector"]
    assert vector.shape[1] == system("kspace").channels(config)
    low = Centre(config.model, fitted, CPU)(batch, batch.sampled)
    kept = vector.unflatten(1, (config.data.slices, -1))[..., 3 * config.model.width :]
    expected = torch.cat(static_dynamic(low, batch.padded), dim=-1)
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)

    class Plain:
        def __call__(self, inputs: object, predict: bool = False) -> object:
            return model(inputs, predict)

        def backward(self, loss: Tensor) -> None:
            loss.backward()

    accumulate(Plain(), [replace(batch, epoch=torch.zeros_like(batch.key))], prepare, stage)
    gradient = model.systems["kspace"].low.weight.grad
    assert gradient is not None
    assert gradient.any()


def test_an_exported_encoder_has_it(config: RunConfig, batch: Batch, fitted: dict[str, Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = system("kspace").module(config)
    export_encoder(tmp_path, config, module.state_dict(), fitted)
    encoder = kmtr.load_encoder(tmp_path)
    reading = system("kspace").reader(config, fitted, CPU)(batch).settle()
    np.testing.assert_allclose(encoder.features(batch), module(*reading.arguments).vector.detach(), rtol=1e-5)
