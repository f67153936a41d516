"""Components of the clean image as alignment's teacher: their scale, their slots, and what they never see."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader import statistics
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.collate import collate
from kmtr.model.teacher import PARTS, Components
from kmtr.physics.cycle import SIDE, clean_parts
from kmtr.tasks import STAGES, Preparer
from kmtr.tasks.pretraining import Pretraining
from kmtr.train.driver import resolve
from kmtr.types import InputError

CPU = torch.device("cpu")
TAUGHT = {"align.teacher": "components", "masked.image_weight": 0.0}


@pytest.fixture(scope="module")
def taught(small: RunConfig) -> RunConfig:
    return override(small, TAUGHT)


@pytest.fixture(scope="module")
def fitted(taught: RunConfig, reader: Reader) -> dict[str, Tensor]:
    return statistics.tables(taught, reader)


def everybody(config: RunConfig, reader: Reader) -> Batch:
    return collate(reader.samples(range(len(reader))), config).to(CPU)


def test_components_are_centred_uncorrelated_half_white_and_of_unit_variance(
    taught: RunConfig, fitted: dict[str, Tensor], reader: Reader
) -> None:
    batch = everybody(taught, reader)
    found = Components(fitted, CPU)(batch)
    assert found.shape == (len(reader), taught.data.slices, len(PARTS), taught.model.projection)
    assert not (batch.padded.all(-1)).any(), "all slots are filled, so that plain moments are the population's"
    for number, values in enumerate(clean_parts(batch.kspace, batch.padded)):
        part = found[:, :, number].double()
        torch.testing.assert_close(part.mean(0), torch.zeros_like(part[0]), rtol=0, atol=1e-4)
        x = part.flatten(0, 1)
        covariance = x.T @ x / len(x)
        assert float(covariance.trace()) == pytest.approx(1, abs=1e-3)
        off = covariance - covariance.diag().diag()
        assert float(off.abs().max()) < 1e-4
        centred = (values - values.mean(0)).double().flatten(0, 1)
        variance = torch.linalg.svdvals(centred).square()[: taught.model.projection] / len(centred)
        torch.testing.assert_close(covariance.diag(), variance.sqrt() / variance.sqrt().sum(), rtol=1e-3, atol=1e-4)


def test_a_batch_of_fewer_slices_has_its_components_in_its_slots(
    taught: RunConfig, fitted: dict[str, Tensor], reader: Reader
) -> None:
    teacher, batch = Components(fitted, CPU), everybody(taught, reader)
    whole = teacher(batch)
    part = SimpleNamespace(
        kspace=batch.kspace[:, 1:],
        padded=batch.padded[:, 1:],
        extent=batch.extent[:, 1:],
        slots=batch.slots[1:],
        same=True,
    )
    some = teacher(part)
    assert not some[:, 0].any()
    kept = clean_parts(part.kspace, part.padded)[0], clean_parts(batch.kspace, batch.padded)[0][:, 1:]
    # Images are scaled to unit RMS over a subject's slices, so that leaving one out changes all by one factor.
    factor = (kept[0].norm(dim=(1, 2)) / kept[1].norm(dim=(1, 2)))[:, None, None]
    mean = fitted["static_clean_mean"] @ fitted["static_clean_basis"]
    expected = (whole[:, 1:, 0] + mean[1:]) * factor - mean[1:]
    torch.testing.assert_close(some[:, 1:, 0], expected, rtol=1e-3, atol=1e-3)


def test_what_is_not_sampled_reaches_the_teacher_and_no_token(
    taught: RunConfig, fitted: dict[str, Tensor], batch: Batch
) -> None:
    prepare = Preparer(taught, fitted, CPU)
    before = prepare(batch, "align")
    noise = torch.randn_like(batch.kspace.real) * batch.kspace.abs().amax()
    dirty = torch.where(batch.sampled[:, :, None, :, :, None], batch.kspace, batch.kspace + noise)
    after = prepare(replace(batch, kspace=dirty), "align")
    assert before.all_lines is not None
    assert after.all_lines is not None
    assert before.clean is not None
    assert after.clean is not None
    torch.testing.assert_close(after.all_lines.values, before.all_lines.values, rtol=0, atol=0)
    assert not torch.allclose(after.clean, before.clean)


def test_only_the_central_readout_is_needed(taught: RunConfig, fitted: dict[str, Tensor], reader: Reader) -> None:
    """Losses from batches that were cropped to what a stage looks at are those of whole ones."""
    config = override(taught, {"model.readout_fraction": 0.5, "data.matrix": (32, 32)})
    prepare = Preparer(config, statistics.tables(config, reader), CPU)
    host = collate(reader.samples(range(8)), config)
    torch.manual_seed(0)
    module = Pretraining(config)
    for stage in STAGES:
        readout = prepare.readout(stage)
        assert readout is not None
        assert readout < 32 or stage == "align"
        with torch.no_grad():
            whole = module(prepare(host.to(CPU), stage), stage)
            cropped = module(prepare(host.to(CPU, readout), stage), stage)
        for name, value in whole.items():
            torch.testing.assert_close(cropped[name], value, rtol=1e-5, atol=1e-5)
    assert max(prepare.readout("align") or 0, SIDE) == prepare.readout("align")


def test_nothing_of_images_is_built_and_a_trained_teacher_of_components_is_refused(
    taught: RunConfig,
) -> None:
    assert not {name.split(".")[0] for name, _ in Pretraining(taught).named_parameters()} & {
        "image_encoder",
        "image_decoder",
        "image_heads",
    }
    with pytest.raises(InputError, match=r"align\.train_image_encoder: expected false"):
        override(taught, {"align.train_image_encoder": True})
    assert resolve(taught)[0].align.teacher == "components"
