"""Components of the clean image as alignment's teacher: their scale, their slots, and what they never see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from inside import prepared, shown, terms
from torch import Tensor

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader import statistics
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.collate import collate
from kmtr.physics.cycle import SIDE, clean_parts
from kmtr.systems.components import PARTS, ComponentReader
from kmtr.tasks import STAGES, Model, Preparer
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
    found = ComponentReader(fitted, CPU).of(batch)
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
    teacher, batch = ComponentReader(fitted, CPU).of, everybody(taught, reader)
    whole = teacher(batch)
    rows = {name: getattr(batch, name)[:, 1:] for name in ("kspace", "acquired", "sampled", "padded", "extent")}
    part = replace(batch, slots=batch.slots[1:], **rows)
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
    before = shown(prepared(prepare, batch, "align"))
    noise = torch.randn_like(batch.kspace.real) * batch.kspace.abs().amax()
    dirty = torch.where(batch.sampled[:, :, None, :, :, None], batch.kspace, batch.kspace + noise)
    after = shown(prepared(prepare, replace(batch, kspace=dirty), "align"))
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
    module = Model(config)
    for stage in ("masked", "align"):
        readout = prepare.readout(STAGES[stage](config))
        assert readout is not None
        assert readout < 32 or stage == "align"
        with torch.no_grad():
            whole = terms(module, prepare, host.to(CPU), stage)
            cropped = terms(module, prepare, host.to(CPU, readout), stage)
        for name, value in whole.items():
            torch.testing.assert_close(cropped[name], value, rtol=1e-5, atol=1e-5)
    assert max(readout, SIDE) == readout


def test_nothing_of_images_is_built_and_a_trained_teacher_of_components_is_refused(
    taught: RunConfig,
) -> None:
    assert {".".join(name.split(".")[:2]) for name, _ in Model(taught).named_parameters()} == {
        "systems.kspace",
        "heads.masked",
        "heads.align",
    }
    assert set(Model(taught).heads["align"].sides) == {"kspace"}
    with pytest.raises(InputError, match=r"align\.train_image_encoder: expected false"):
        override(taught, {"align.train_image_encoder": True})
    assert resolve(taught)[0].align.teacher == "components"
