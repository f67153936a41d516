"""The x-f U-Net and k-GIN: where they begin, what they leave alone, what they cannot see, and that they learn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.collate import collate
from kmtr.inference import TaskModel
from kmtr.inputs import Shared, known_image
from kmtr.model.packing import Lengths
from kmtr.physics.sampling import VALIDATION
from kmtr.systems.kgin import PLANES, Interpolation, envelope
from kmtr.systems.xf import Cascade
from kmtr.tasks import Model, Preparer, stages_of
from kmtr.tasks.base import LOSS
from kmtr.tasks.reconstruction import Reconstruction
from kmtr.tasks.segmentation import Segmentation
from kmtr.train import start
from kmtr.types import InputError

pytest.importorskip("monai", reason="needs MONAI (the extra baselines)")

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["xf", "kgin"])
def config(small: RunConfig, request: pytest.FixtureRequest) -> RunConfig:
    asked = {
        "stage": "task",
        "task.encoder": "none",
        "task.steps": 4,
        "task.unet_width": 4,
        "task.system": request.param,
    }
    return override(small, asked | {"task.tasks": "reconstruction"})


@pytest.fixture(scope="module")
def known(config: RunConfig, tables: dict[str, Tensor]) -> tuple[Preparer, Reader]:
    reader = Dataset.open(config.data).reader("train", config.data)
    return Preparer(config, tables | start.task_tables(config, reader, tables), CPU), reader


@pytest.fixture
def ready(config: RunConfig, known: tuple[Preparer, Reader]) -> tuple[Model, Preparer, Any, Reader]:
    torch.manual_seed(0)
    model, (stage,) = Model(config), stages_of(config)
    return model, known[0], stage, known[1]


def batch_of(config: RunConfig, reader: Reader, prepare: Preparer) -> Batch:
    return collate(reader.samples(range(4)), config, None, 0, prepare.wanted, VALIDATION).to(CPU)


def stirred(model: nn.Module) -> nn.Module:
    """Other weights where a network begins at zero."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.1)
    return model


def elsewhere(batch: Batch) -> Batch:
    noise = torch.randn_like(batch.kspace)
    return replace(batch, kspace=torch.where(batch.sampled[:, :, None, :, :, None], batch.kspace, noise))


def test_it_begins_at_the_temporally_shared_image(
    config: RunConfig, ready: tuple[Model, Preparer, Any, Reader]
) -> None:
    model, prepare, stage, reader = ready
    batch = batch_of(config, reader, prepare)
    with torch.no_grad():
        said = model(prepare(batch, stage), predict=True)["reconstruction"]["image"]
    seen = Shared.of(batch, config.data.matrix)
    wanted = seen.image * seen.unit[:, None, None, None, None]
    there = ~batch.padded
    torch.testing.assert_close(said[there], wanted[there], rtol=1e-3, atol=1e-4 * float(wanted.max()))
    assert not list(model.heads["reconstruction"].parameters())


def test_acquired_lines_stay_whatever_its_weights_with_several_coils_too(small: RunConfig) -> None:
    torch.manual_seed(0)
    kspace = torch.randn(2, 3, 2, 4, 32, 32, dtype=torch.complex64)
    sampled = torch.rand(2, 3, 4, 32) < 0.5
    sampled[1, 2] = False  # a slice that is not there
    present = torch.ones(2, 3, dtype=torch.bool)
    own = override(small, {"data.matrix": (32, 32), "data.coils": 3, "data.frames": 4, "model.patch": (2, 8, 8)})
    exists = torch.ones(2, 3, 32, 32, dtype=torch.bool)
    exists[0, 0, :8] = False  # a slice of a smaller matrix
    sampled[0, 0, :, :8] = False
    mask = (sampled[:, :, None, :, :, None] | ~exists[:, :, None, None]).expand(kspace.shape)
    more = envelope((32, 32)), Lengths.of([sampled.transpose(0, 1).flatten(0, 1)])[0]
    for module, arguments in ((Cascade((32, 32), 4, 4, 2), ()), (Interpolation(own), more)):
        begun = module(kspace, sampled, present, exists, *arguments).kspace
        torch.testing.assert_close(begun, kspace)
        found = stirred(module)(kspace, sampled, present, exists, *arguments).kspace
        assert torch.equal(found[mask], kspace[mask])
        assert bool((found[~mask] != kspace[~mask]).all())


@pytest.mark.parametrize("plane", PLANES)
def test_tokens_of_a_plane_lead_back_to_k_space(plane: Any) -> None:
    k = torch.randn(2, 3, 4, 8, 12, dtype=torch.complex64)
    apart, together = plane
    pieces = apart(k)
    assert torch.equal(together(pieces, k.shape), k)
    one = pieces.clone()
    one[:, 0] += 1
    changed = (together(one, k.shape) != k).any(0).any(0)  # t ky kx
    assert changed.sum() == pieces.shape[2] / 2 / 3, "a token is a line, a column, or a patch of all frames"


def test_it_is_blind_to_what_was_not_acquired_and_to_the_scanner_s_scale(
    config: RunConfig, ready: tuple[Model, Preparer, Any, Reader]
) -> None:
    model, prepare, stage, reader = ready
    stirred(model)
    batch = batch_of(config, reader, prepare)
    assert not bool(batch.sampled.all())
    asked = [batch, elsewhere(batch), replace(batch, kspace=250 * batch.kspace)]
    with torch.no_grad():
        said, other, louder = (model(prepare(b, stage), predict=True)["reconstruction"]["image"] for b in asked)
    there = ~batch.padded
    assert torch.equal(said[there], other[there])
    torch.testing.assert_close(louder[there], 250 * said[there], rtol=1e-3, atol=250 * 1e-4 * float(said[there].max()))


def test_it_learns_better_images_than_it_begins_with(
    config: RunConfig, ready: tuple[Model, Preparer, Any, Reader]
) -> None:
    """Of four subjects, by heart."""
    model, prepare, stage, reader = ready
    asked = prepare(batch_of(config, reader, prepare), stage)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        loss = model(asked)["reconstruction"][LOSS].sum()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_a_batch_of_fewer_frames_says_what_a_padded_one_says(
    config: RunConfig, ready: tuple[Model, Preparer, Any, Reader]
) -> None:
    model, prepare, stage, reader = ready
    stirred(model)
    batch = batch_of(config, reader, prepare)
    last = {name: getattr(batch, name).clone() for name in ("kspace", "acquired", "sampled", "padded")}
    last["padded"][:, :, 2:], last["acquired"][:, :, 2:], last["sampled"][:, :, 2:] = True, False, False
    last["kspace"][:, :, :, 2:] = 0
    short = {name: last[name][:, :, :2] for name in ("acquired", "sampled", "padded")}
    short |= {"kspace": last["kspace"][:, :, :, :2]}
    with torch.no_grad():
        padded, cut = (
            model(prepare(replace(batch, **fields), stage), predict=True)["reconstruction"]["image"]
            for fields in (last, short)
        )
    assert cut.shape[2] == 2
    torch.testing.assert_close(cut, padded[:, :, :2], equal_nan=True, rtol=1e-4, atol=1e-5)


def test_a_worker_without_anything_to_learn_from_has_all_gradients(
    config: RunConfig, ready: tuple[Model, Preparer, Any, Reader]
) -> None:
    """Nobody's image is known: the scanner undersampled all of them."""
    model, prepare, stage, reader = ready
    batch = batch_of(config, reader, prepare)
    nobody = replace(batch, acquired=batch.sampled, epoch=torch.zeros_like(batch.key))
    out = model(prepare(nobody, stage))["reconstruction"][LOSS]
    assert not out.any()
    out.sum().backward()
    for name, weights in model.named_parameters():
        assert weights.grad is not None, name
        assert not weights.grad.any(), name


def test_it_offers_nothing_for_masks(config: RunConfig) -> None:
    with pytest.raises(InputError, match=r"^task.system: expected one that offers tokens or maps for segmentation, "):
        Segmentation(override(config, {"task.tasks": "segmentation"})).check()
    with pytest.raises(InputError, match=r"^task.frozen: expected false, since (xf|kgin) has no head"):
        Reconstruction(override(config, {"task.frozen": True})).check()


def test_a_model_of_full_images_after_a_perfect_reconstruction_says_what_it_says_of_them(
    config: RunConfig, tables: dict[str, Tensor]
) -> None:
    """And not what it says of others."""
    own = override(config, {"task.system": "unet", "task.input": "full", "task.tasks": "segmentation"})
    reader = Dataset.open(own.data).reader("train", own.data)
    known = tables | start.task_tables(own, reader, tables)
    torch.manual_seed(0)
    alone = TaskModel(own, stirred(Model(own)).state_dict(), known, CPU)
    batch = batch_of(own, reader, alone.prepare)
    after = alone.after(lambda one: known_image(one, own.data.matrix), "the truth")
    for name, said in alone(batch).items():
        assert torch.equal(after(batch)[name], said)
    blurred = alone.after(lambda one: Shared.of(one, own.data.matrix).image, "the temporally shared image")
    assert not torch.equal(blurred(batch)["masks"], alone(batch)["masks"])
    assert alone.readout == after.readout is None
