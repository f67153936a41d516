"""U-Net, LI-Net- and KMAE-style systems, ResNet-50: what they see, their layers, losses in closed form, whole runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cohort import simulated, write
from forked_workers import instead_of_ray_train
from torch import Tensor, nn

import kmtr
from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.collate import collate
from kmtr.evaluate import finetune
from kmtr.evaluate.predictions import LINES, read
from kmtr.inputs import INPUTS, standardised
from kmtr.model.packing import Lengths
from kmtr.physics.sampling import VALIDATION
from kmtr.systems import resnet, system, unet
from kmtr.tasks import Model, Preparer, accumulate, stages_of
from kmtr.tasks.base import LOSS
from kmtr.tasks.losses import cross_entropy_and_dice
from kmtr.train import start
from kmtr.train.resolve import resolve
from kmtr.types import UNLABELLED, InputError

nets = pytest.importorskip("monai.networks.nets", reason="needs MONAI (the extra baselines)")

CPU = torch.device("cpu")
SEEN = ("zerofilled", "shared", "lowrank", "full")


@pytest.fixture(scope="module")
def config(small: RunConfig) -> RunConfig:
    asked = {"stage": "task", "task.encoder": "none", "task.steps": 4, "task.unet_width": 4, "task.system": "unet"}
    return override(small, asked | {"task.tasks": "segmentation"})


def ready(config: RunConfig, tables: dict[str, Tensor]) -> tuple[Model, Preparer, Any, Reader]:
    reader = Dataset.open(config.data).reader("train", config.data)
    torch.manual_seed(0)
    model, (stage,) = Model(config), stages_of(config)
    return model, Preparer(config, tables | start.task_tables(config, reader, tables), CPU), stage, reader


def batch_of(config: RunConfig, reader: Reader, prepare: Preparer, rows: range = range(4)) -> Batch:
    return collate(reader.samples(rows), config, None, 0, prepare.wanted, VALIDATION).to(CPU)


def elsewhere(batch: Batch) -> Batch:
    """The same subjects with other values wherever nothing was acquired."""
    noise = torch.randn_like(batch.kspace)
    return replace(batch, kspace=torch.where(batch.sampled[:, :, None, :, :, None], batch.kspace, noise))


# -------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("name", INPUTS)
def test_every_input_but_the_full_one_is_blind_to_what_was_not_acquired(name: str, batch: Batch) -> None:
    """Bit for bit."""
    assert not bool(batch.sampled.all())
    matrix = (batch.kspace.shape[-2], batch.kspace.shape[-1])
    seen, other = (standardised(name, one, matrix) for one in (batch, elsewhere(batch)))
    assert torch.equal(seen, other) == (name != "full")


@pytest.mark.parametrize("name", SEEN)
def test_an_input_has_mean_0_and_variance_1_whatever_the_scanner_s_scale(name: str, batch: Batch) -> None:
    batch = replace(batch, padded=batch.padded.clone())
    batch.padded[0, :, -1] = True
    batch.kspace[0, :, :, -1] = 0
    seen = standardised(name, batch, (16, 16))
    assert seen.shape[-2:] == (16, 16)
    for image, padded in zip(seen, batch.padded, strict=True):
        torch.testing.assert_close(image[~padded].mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
        torch.testing.assert_close(image[~padded].square().mean(), torch.tensor(1.0), atol=1e-4, rtol=0)
        assert not image[padded].any()
    louder = replace(batch, kspace=250 * batch.kspace)
    torch.testing.assert_close(standardised(name, louder, (16, 16)), seen, rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- U-Net


def test_stages_are_nnu_net_s() -> None:
    widths, strides = unet.plan((128, 128), 32)
    assert widths == [32, 64, 128, 256, 512, 512]
    assert strides == [(1, 1), *[(2, 2)] * 5]
    assert unet.plan((64, 16), 32)[1] == [(1, 1), (2, 2), (2, 2), (2, 1), (2, 1)]
    with pytest.raises(
        InputError, match=r"^data.matrix: expected at least 16 pixels for task.system=unet, got \(8, 8\)"
    ):
        unet.plan((8, 8), 32)
    with pytest.raises(
        InputError, match=r"^data.matrix: expected sizes that task.system=unet can halve down to 4 to 7"
    ):
        unet.plan((36, 36), 32)


def test_its_maps_are_those_of_dyn_unet() -> None:
    torch.manual_seed(0)
    ours = unet.PlainUNet((128, 128), 32)
    widths, strides = unet.plan((128, 128), 32)
    whole = nets.DynUNet(2, 1, 6, [3] * 6, strides, strides[1:], filters=widths, deep_supervision=False)
    heads = sum(p.numel() for p in whole.output_block.parameters())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in whole.parameters()) - heads
    for theirs, mine in (
        ("input_block", "first"),
        ("downsamples", "down"),
        ("bottleneck", "bottom"),
        ("upsamples", "up"),
    ):
        getattr(whole, theirs).load_state_dict(getattr(ours, mine).state_dict())
    images = torch.randn(2, 128, 128)
    found = ours(images[:, None], Lengths((2,), torch.tensor([2])))
    torch.testing.assert_close(found.levels[0], whole.skip_layers(images[:, None]), rtol=1e-4, atol=1e-5)
    assert [(m.shape[1], m.shape[2]) for m in found.levels] == [(32, 128), (64, 64), (128, 32), (256, 16)]
    assert found.deepest.shape == (2, 512, 4, 4)


LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.InstanceNorm2d, nn.LeakyReLU)


def run_through(network: nn.Module, run: Any) -> tuple[list[tuple[Any, ...]], list[nn.Module]]:
    """Layers of a network without its heads that `run` passes through, in the data's order: properties of each, and
    the layers.
    """
    said: list[tuple[Any, ...]] = []
    passed: list[nn.Module] = []

    def note(layer: Any, *_: object) -> None:
        passed.append(layer)
        names = {
            nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
            nn.ConvTranspose2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding"),
            nn.InstanceNorm2d: ("num_features", "eps", "affine", "track_running_stats"),
            nn.LeakyReLU: ("negative_slope",),
        }[type(layer)]
        said.append((type(layer).__name__, *(getattr(layer, name) for name in names)))

    heads = {layer for name, part in network.named_modules() if name.endswith("seg_layers") for layer in part.modules()}
    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, LAYERS) and m not in heads]
    run()
    for hook in hooks:
        hook.remove()
    return said, passed


@torch.no_grad()
def test_its_layers_are_those_of_nnu_net() -> None:
    """PlainConvUNet's, one by one in the data's order; with the same weights, the same masks. nnU-Net's convolutions
    have biases, which the norms behind them remove, and its transposed ones too.
    """
    architectures = pytest.importorskip(
        "dynamic_network_architectures.architectures.unet", reason="needs nnU-Net's dynamic-network-architectures"
    )
    torch.manual_seed(0)
    ours, (widths, strides) = unet.PlainUNet((128, 128), 32), unet.plan((128, 128), 32)
    theirs = architectures.PlainConvUNet(
        *(1, 6, widths, nn.Conv2d, 3, strides, 2, 6, 2, True, nn.InstanceNorm2d, {"eps": 1e-5, "affine": True}),
        *(None, None, nn.LeakyReLU, {"inplace": True}),
    )
    images, maps = torch.randn(2, 1, 128, 128), list[Tensor]()
    wanted, from_them = run_through(theirs, lambda: theirs(images))
    found, to_us = run_through(ours, lambda: ours.maps(images))
    assert found == wanted
    assert len(found) == 6 * 6 + 5 * (1 + 6), "two convolutions a stage with norm and slope, one upwards"
    for mine, other in zip(to_us, from_them, strict=True):
        if isinstance(mine, nn.Conv2d | nn.ConvTranspose2d):
            assert not other.bias.zero_().any()
            mine.weight.copy_(other.weight)
    head = theirs.decoder.seg_layers[-1]
    head.register_forward_hook(lambda layer, seen, out: maps.append(seen[0]))
    theirs(images)
    torch.testing.assert_close(ours.maps(images)[0][0], maps[0], rtol=1e-4, atol=1e-4)


def test_it_begins_at_the_mean_mask_and_its_loss_is_that_of_deep_supervision(
    config: RunConfig, tables: dict[str, Tensor]
) -> None:
    model, prepare, stage, reader = ready(config, tables)
    batch = batch_of(config, reader, prepare)
    asked = prepare(batch, stage)
    with torch.no_grad():
        said = model(asked, predict=True)["segmentation"]["masks"]
        begun = model(asked)["segmentation"][LOSS]
    prior = prepare.tables["mask_log_prior"]
    expected = prior[list(batch.slots)].argmax(1).to(torch.uint8)[None, :, None].expand(said.shape)
    assert torch.equal(
        said, torch.where(batch.padded[..., None, None], torch.tensor(UNLABELLED, dtype=torch.uint8), expected)
    )

    levels = len(model.heads["segmentation"].out)  # type: ignore[arg-type]
    torch.testing.assert_close(begun, of_the_mean_mask(asked.tasks["segmentation"], levels))


def of_the_mean_mask(known: Any, levels: int) -> Tensor:
    """Loss of the prior under deep supervision, over its own."""
    counts, extra = known.cells.lengths.counts, known.extra
    parts = [
        cross_entropy_and_dice(
            extra["prior"][..., :: 2**i, :: 2**i], extra["truth"][..., :: 2**i, :: 2**i], extra["drawn"], counts
        )
        for i in range(levels)
    ]
    weights = [2**-i / sum(2**-j for j in range(levels)) for i in range(levels)]
    found: Tensor = sum(w * part for w, part in zip(weights, parts, strict=True)) / extra["constant"]
    return found


def test_motion_is_the_frame_less_its_mean_over_the_cycle(config: RunConfig, batch: Batch) -> None:
    """At a scale of its own; the mean is over the frames that are there, and nothing comes of lines not acquired."""
    batch = replace(batch, padded=batch.padded.clone())
    batch.padded[0, :, -1] = True
    images = standardised("shared", batch, (16, 16))
    still, moves = unet.moving(images, ~batch.padded)
    torch.testing.assert_close(still[0, :, 0], images[0, :, :-1].mean(1))
    assert not moves[0, :, -1].any()
    for row, there in enumerate(~batch.padded):
        torch.testing.assert_close(moves[row][there].square().mean(), torch.tensor(1.0))
        apart = (images - still)[row][there]
        torch.testing.assert_close(moves[row][there] * apart.square().mean().sqrt(), apart, rtol=1e-4, atol=1e-5)
    asked = override(config, {"task.unet_motion": True, "task.input": "shared"})
    first = system("unet").module(asked).first
    assert first.conv1.conv.in_channels == 3  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "motion"), [("unet", False), ("unet", True), ("linet", False)])
def test_a_worker_without_anything_to_learn_from_has_all_gradients(
    name: str, motion: bool, config: RunConfig, tables: dict[str, Tensor]
) -> None:
    model, prepare, stage, reader = ready(override(config, {"task.system": name, "task.unet_motion": motion}), tables)
    batch = batch_of(config, reader, prepare)
    assert batch.masks is not None
    empty = replace(batch, masks=torch.full_like(batch.masks, UNLABELLED), epoch=torch.zeros_like(batch.key))
    out = model(prepare(empty, stage))["segmentation"][LOSS]
    assert not out.any()
    out.sum().backward()
    for name, weights in model.named_parameters():
        assert weights.grad is not None, name
        assert not weights.grad.any(), name


def test_its_vector_is_the_mean_over_a_subject_s_own_maps() -> None:
    deepest = torch.arange(12.0).reshape(3, 2, 2, 1)
    maps = unet.Maps((), deepest, Lengths((1, 2, 0), torch.tensor([1, 2, 0])))
    mean = deepest.mean((2, 3))
    torch.testing.assert_close(maps.vector, torch.stack([mean[0], mean[1:].mean(0), torch.zeros(2)]))


# -------------------------------------------------------------------------------------------------------- LI-Net-style


def taught(config: RunConfig, tables: dict[str, Tensor]) -> tuple[Any, ...]:
    """A LI-Net-style system, with batches as they are learnt from and as they are predicted."""
    changed = override(config, {"task.system": "linet", "task.frames": 1})
    model, prepare, stage, reader = ready(changed, tables)
    batch = batch_of(changed, reader, prepare)
    return model, prepare, stage, replace(batch, epoch=torch.zeros_like(batch.key)), batch


def test_li_net_learns_from_clean_images_and_predicts_from_zero_filled_ones(
    config: RunConfig, tables: dict[str, Tensor]
) -> None:
    model, prepare, stage, learning, batch = taught(config, tables)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.1)
    asked = [prepare(one, stage) for one in (batch, elsewhere(batch))]
    with torch.no_grad():
        said = [model(one, predict=True)["segmentation"]["masks"] for one in asked]
        losses = [model(prepare(one, stage))["segmentation"][LOSS] for one in (learning, elsewhere(learning))]
    assert torch.equal(*said), "blind to what was not acquired"
    assert len(set(said[0][~batch.padded].flatten().tolist())) > 1
    assert not torch.equal(*losses), "the clean image is not"
    reading = prepare(learning, stage).tasks["segmentation"].seen
    assert len(reading.arguments) == 7
    assert len(asked[0].tasks["segmentation"].seen.arguments) == 5


def test_li_net_s_loss_in_closed_form(config: RunConfig, tables: dict[str, Tensor]) -> None:
    """With every line acquired both ways agree, and the temporal model begins as the identity: no gap at step 0."""
    model, prepare, stage, learning, _ = taught(config, tables)
    module = model.systems["linet"]
    whole = replace(learning, sampled=learning.acquired)
    for batch, same in ((whole, True), (learning, False)):
        known = prepare(batch, stage).tasks["segmentation"]
        with torch.no_grad():
            found = module(*known.seen.arguments)
            loss = model(prepare(batch, stage))["segmentation"][LOSS]
        assert torch.allclose(found.lesson.gap, torch.zeros(()), atol=1e-9) == same
        assert found.lesson.known.all()
        wanted = of_the_mean_mask(known, len(found.levels)) + found.lesson.gap
        torch.testing.assert_close(loss, wanted, msg="both ways begin at the mean mask")
        images, _, rows, picked, cells, clean, _ = known.seen.arguments
        assert len(picked) == len(clean) == cells.total < len(images) == rows.total
        target = module._encoded(clean)
        for row in range(len(batch)):
            mine = cells.subject == row
            away = (found.deepest[mine] - target[mine]).square().sum() / target[mine].square().sum()
            torch.testing.assert_close(found.lesson.gap[row], away)


def test_li_net_s_latents_of_a_frame_depend_on_the_others_of_its_slice_alone(
    config: RunConfig, tables: dict[str, Tensor]
) -> None:
    model, prepare, stage, _, batch = taught(config, tables)
    module = model.systems["linet"]
    nn.init.normal_(module.out.weight, std=0.1)
    arguments = prepare(batch, stage).tasks["segmentation"].seen.arguments
    images, times, rows, *rest = arguments
    with torch.no_grad():
        before = module(*arguments).deepest
        other = images.clone()
        other[0] += torch.randn_like(images[0])
        after = module(other, times, rows, *rest).deepest
    first = rows.host[0]
    assert (before != after).flatten(1).any(1).tolist() == [i < first for i in range(len(images))]


# ----------------------------------------------------------------------------------------------------------- ResNet-50


def test_resnet_50_has_the_weights_of_the_library_s_and_knows_each_subject_alone() -> None:
    torch.manual_seed(0)
    ours = resnet.Stacked(6).eval()
    theirs = nets.resnet50(spatial_dims=2, n_input_channels=6, feed_forward=False)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    images = torch.randn(3, 2, 3, 32, 32)
    together = ours.train()(images).vector
    assert together.shape == (3, resnet.CHANNELS)
    for row in range(3):
        torch.testing.assert_close(ours(images[row : row + 1]).vector[0], together[row], rtol=1e-3, atol=1e-4)
    assert not list(ours.buffers()), "running statistics would differ between workers"


def test_its_reader_fills_the_grid_with_zeros(config: RunConfig, batch: Batch) -> None:
    changed = override(config, {"task.system": "resnet50", "task.input": "shared"})
    reading = system("resnet50").reader(changed, {}, CPU)(batch).settle()
    (images,) = reading.arguments
    assert images.shape == (len(batch), config.data.slices, config.data.frames, *config.data.matrix)
    seen = standardised("shared", batch, config.data.matrix)
    torch.testing.assert_close(images[:, list(batch.slots), : seen.shape[2]], seen)
    one = replace(
        batch,
        slots=batch.slots[:1],
        **{name: getattr(batch, name)[:, :1] for name in ("kspace", "acquired", "sampled", "padded", "extent")},
    )
    (images,) = system("resnet50").reader(changed, {}, CPU)(one).settle().arguments
    others = [slot for slot in range(config.data.slices) if slot != batch.slots[0]]
    assert not images[:, others].any()


# ---------------------------------------------------------------------------------------------------------- KMAE-style


def test_it_averages_each_slice_s_acquired_lines_and_is_blind_to_the_rest(
    config: RunConfig, tables: dict[str, Tensor]
) -> None:
    changed = override(config, {"task.system": "kmae", "task.tasks": "phenotypes", "task.targets": "lvedv_ml,lvef_pct"})
    _, prepare, _, reader = ready(changed, tables)
    torch.manual_seed(0)
    chosen = system("kmae")
    module, read_by = chosen.module(changed).eval(), chosen.reader(changed, {}, CPU)

    def said(batch: Batch) -> Tensor:
        with torch.no_grad():
            vector: Tensor = module(*read_by(batch).settle().arguments).vector
        return vector

    batch = batch_of(changed, reader, prepare)
    vectors = said(batch)
    assert vectors.shape == (len(batch), chosen.channels(changed))
    assert torch.equal(said(elsewhere(batch)), vectors)
    for row in range(len(batch)):
        (alone,) = said(batch_of(changed, reader, prepare, range(row, row + 1)))
        torch.testing.assert_close(alone, vectors[row], rtol=1e-4, atol=1e-5)
    last = list(batch.slots)[1:]
    fewer = {name: getattr(batch, name)[:, 1:] for name in ("kspace", "acquired", "sampled", "padded", "extent")}
    each = said(replace(batch, slots=tuple(last), **fewer)).unflatten(1, (changed.data.slices, -1))
    torch.testing.assert_close(each[:, last].mean(-1), torch.zeros(len(batch), len(last)), atol=1e-5, rtol=0)
    assert not each[:, batch.slots[0]].any(), "a slice that is not there"


# --------------------------------------------------------------------------------------------------------- whole runs


def test_settings_that_do_not_go_together_are_refused_in_one_line(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes, line in (
        (
            {"task.input": "acquired"},
            "task.input: expected zerofilled or shared or lowrank or full, which task.system=unet takes",
        ),
        (
            {"task.system": "kspace", "task.input": "full"},
            "task.input: expected acquired, which task.system=kspace takes",
        ),
        (
            {"task.tasks": "reconstruction"},
            "task.system: expected one that offers tokens or an image for reconstruction",
        ),
        ({"task.system": "resnet50"}, "task.system: expected one that offers tokens or maps for segmentation, kspace"),
        ({"task.tasks": "phenotypes"}, "task.tasks: expected segmentation among them, for which task.system=unet is"),
        (
            {"task.system": "xf", "task.tasks": "phenotypes"},
            "task.tasks: expected reconstruction among them, for which task.system=xf is",
        ),
    ):
        with pytest.raises(InputError, match="^" + line):
            resolve(override(config, changes))
    monkeypatch.setitem(sys.modules, "monai.networks", None)
    with pytest.raises(InputError, match=r"^task.system: unet needs MONAI, .* pip install 'kmtr\[baselines\]'"):
        resolve(config)


class Alone:
    """An engine of one process that averages over micro-batches, as DeepSpeed's does."""

    def __init__(self, model: Model, parts: int):
        self.model, self.parts = model, parts

    def __call__(self, inputs: Any, predict: bool = False) -> Any:
        return self.model(inputs, predict)

    def backward(self, loss: Tensor) -> None:
        (loss / self.parts).backward()


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("unet", "segmentation"),
        ("linet", "segmentation"),
        ("resnet50", "phenotypes"),
        ("kmae", "phenotypes"),
        ("xf", "reconstruction"),
        ("kgin", "reconstruction"),
    ],
)
def test_gradients_do_not_depend_on_micro_batches(
    name: str, tasks: str, config: RunConfig, tables: dict[str, Tensor]
) -> None:
    asked = {"task.system": name, "task.tasks": tasks, "task.targets": "lvedv_ml,lvef_pct"}
    model, prepare, stage, reader = ready(override(config, asked), tables)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.1)  # at zero nothing behind it would have a gradient
    found = []
    for parts in ([range(4)], [range(2), range(2, 4)]):
        model.zero_grad()
        micro = [replace(batch_of(config, reader, prepare, rows), real=4) for rows in parts]
        accumulate(Alone(model, len(parts)), micro, prepare, stage)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(list(model.parameters()))
    assert any(bool(gradient.any()) for gradient in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def hearts(small: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of a few steps on 24 hearts with labels and contours."""
    folder = tmp_path_factory.mktemp("baselines")
    asked = {
        "data.root": str(folder / "data"),
        "storage.root": str(folder / "runs"),
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "stage": "task",
        "task.tasks": "segmentation",
        "task.steps": 3,
        "task.unet_width": 4,
        "task.targets": "lvedv_ml,lvef_pct",
        "train.eval_every": 10,
        "train.log_every": 10,
        "evaluate.bootstrap": 20,
    }
    made = override(small, asked)
    split = {"train": range(12), "val": range(12, 18), "test": range(18, 24)}
    write(folder / "data", {name: [simulated(i, made) for i in rows] for name, rows in split.items()}, "float32")
    return made


KINDS: dict[str, dict[str, Any]] = {
    "one": {"train.workers": 1},
    "same": {"train.workers": 1},
    "other": {"train.workers": 1, "seed": 1},
    "many": {"train.workers": 2, "train.zero_stage": 3},
    "half": {"train.workers": 2, "train.zero_stage": 2, "train.bf16": True, "task.begin": "mean"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tasks", "title", "kinds"),
    [
        ("unet", "segmentation", "U-Net", ("one", "same", "other")),
        pytest.param("unet", "segmentation", "U-Net", tuple(KINDS), marks=pytest.mark.full),
        ("linet", "segmentation", "LI-Net-style", ("one",)),
        pytest.param("linet", "segmentation", "LI-Net-style", tuple(KINDS), marks=pytest.mark.full),
        ("resnet50", "phenotypes", "ResNet-50", ("one",)),
        pytest.param("resnet50", "phenotypes", "ResNet-50", tuple(KINDS), marks=pytest.mark.full),
        ("xf", "reconstruction", "x-f U-Net", ("one",)),
        pytest.param("xf", "reconstruction", "x-f U-Net", tuple(KINDS), marks=pytest.mark.full),
        pytest.param("kgin", "reconstruction", "k-GIN", tuple(KINDS), marks=pytest.mark.full),
        ("kmae", "phenotypes", "KMAE-style", ("one",)),
        pytest.param("kmae", "phenotypes", "KMAE-style", tuple(KINDS), marks=pytest.mark.full),
    ],
)
def test_a_run_ends_with_a_model_that_predicts_on_its_own(
    name: str, tasks: str, title: str, kinds: tuple[str, ...], hearts: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_ray_train(monkeypatch)
    monkeypatch.setattr(finetune, "start_ray", lambda: None)
    sees = "shared" if name in ("unet", "resnet50") else ""
    asked = override(hearts, {"task.system": name, "task.tasks": tasks, "task.input": sees})
    said = {what: finetune.run(override(asked, KINDS[what] | {"run.name": f"{name}-{what}"})) for what in kinds}
    tables = {what: read(Path(str(one["predictions"]))) for what, one in said.items()}
    ours = {
        what: [row["value"] for row in table.to_pylist() if row["system"] == title] for what, table in tables.items()
    }
    assert ours["one"]
    assert ours.get("same", ours["one"]) == ours["one"]
    assert ours.get("other") != ours["one"]
    scale = np.nanstd(ours["one"])
    for what in kinds[1:]:
        away = np.nanmean(np.abs(np.subtract(ours[what], ours["one"]))) / scale
        assert away < {"many": 0.02}.get(what, np.inf), what
        assert np.isfinite(ours[what]).any(), what
    named = {row["input"] for row in tables["one"].to_pylist() if row["system"] == title}
    assert named == {"temporally shared image" if sees else "zero-filled image" if name == "linet" else LINES}
    folder = Path(str(said["one"]["model"]))
    assert f"`{name}` on input `{sees or system(name).inputs[0]}`" in (folder / "README.md").read_text()
    study = simulated(20, hearts)
    found = kmtr.load_model(folder).predict(study, acceleration=4)
    if tasks == "segmentation":
        assert {view: masks.shape for view, masks in found["masks"].items()} == {
            view: (shown.kspace.shape[0], shown.kspace.shape[2], *hearts.data.matrix)
            for view, shown in study.views.items()
        }
        assert all(np.isin(masks, range(6)).all() for masks in found["masks"].values())
    elif tasks == "reconstruction":
        assert {view: image.shape for view, image in found["image"].items()} == {
            view: (shown.kspace.shape[0], shown.kspace.shape[2], *hearts.data.matrix)
            for view, shown in study.views.items()
        }
        assert all(np.isfinite(image).all() for image in found["image"].values())
    else:
        assert set(found) == {"lvedv_ml", "lvef_pct"}
        assert all(np.isfinite(value) for value in found.values())
