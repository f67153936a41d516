"""One process equals many: losses and gradients do not depend on how the global batch is divided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import one_worker
import processes
import pytest
import torch
from cohort import simulated, write
from inside import terms
from one_worker import CPU, PlainEngine, step
from safetensors.torch import load_file
from torch import Tensor

from kmtr.config import RunConfig, override
from kmtr.data.loader.batch import Batch
from kmtr.tasks import Model, Preparer, base, stages_of, tasks_of
from kmtr.tasks.align import contrastive
from kmtr.tasks.base import Sums
from kmtr.types import InputError, Study

Tables = dict[str, Tensor]
CHANGES: dict[str, dict[str, object]] = {
    "masked": {},
    "align": {},
    "align, teacher trained": {"align.train_image_encoder": True},
    "align alone": {"align.masked_weight": 0.0, "align.static_weight": 1.0},
    "align, temperature learnt": {"align.learn_temperature": True, "align.chunk": 2},
}
CASES = [(name.split(",")[0].split()[0], micro, CHANGES[name]) for name in CHANGES for micro in (1, 2, 4)]


def uneven_cohort(config: RunConfig) -> list[Study]:
    """Eight subjects: one twice, one without long axis, one with a single short-axis slice, one with fewer frames."""
    studies = [simulated(i, config) for i in range(7)]
    studies.append(studies[2])
    studies[1] = replace(studies[1], views={"sax": studies[1].views["sax"]})
    studies[4] = simulated(4, override(config, {"data.sax_slices": 1}))
    studies[6] = simulated(6, override(config, {"data.frames": 2}))
    return studies


@pytest.fixture(scope="module")
def folder(small: RunConfig, tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of every case, by one process and by two."""
    path = tmp_path_factory.mktemp("processes")
    config = override(small, {"data.root": str(path / "data"), "train.workers": 1})
    write(path / "data", {"train": uneven_cohort(config)}, "float32")
    one_worker.one_and_two(config, tables, path, CASES)
    return path


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{n}-{m}" for n in CHANGES for m in (1, 2, 4)])
@pytest.mark.parametrize("world", [1, 2])
def test_one_process_equals_many(folder: Path, number: int, world: int) -> None:
    whole = load_file(folder / f"1-{number // 3 * 3}.safetensors")  # one process, one micro-batch
    divided = load_file(folder / f"{world}-{number}.safetensors")
    assert divided.keys() == whole.keys()
    largest = max(float(g.abs().max()) for name, g in whole.items() if not name.startswith("logged."))
    assert largest > 1e-3
    for name, value in whole.items():
        limit = 1e-5 * (max(1.0, float(value.abs())) if name.startswith("logged.") else max(1.0, largest))
        torch.testing.assert_close(divided[name], value, rtol=0, atol=limit, msg=name)


def test_stages_train_what_they_should(folder: Path) -> None:
    def trained(number: int) -> set[str]:
        result = load_file(folder / f"1-{number}.safetensors")
        names = [k for k, g in result.items() if not k.startswith("logged.") and g.any()]
        return {".".join(name.split(".")[:2]) for name in names}

    kspace, image = {"systems.kspace", "heads.masked"}, {"systems.image", "heads.masked_images"}
    heads = {"heads.align"}
    assert trained(0) == kspace | image
    assert trained(3) == kspace | heads  # the image encoder is a frozen teacher
    assert trained(6) == kspace | image | heads
    assert trained(9) == {"systems.kspace"} | heads


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_tasks_of_a_stage_are_in_the_order_of_the_model(small: RunConfig, change: dict[str, object]) -> None:
    """Gradients of a system that several tasks train are added in one order: the last bits of a run depend on it."""
    config = override(small, change)
    for stage in stages_of(config):
        assert list(stage.tasks) == [name for name in tasks_of(config) if name in stage.tasks]


def test_what_is_logged_is_the_mean_over_subjects(small: RunConfig, tables: Tables, batch: Batch) -> None:
    torch.manual_seed(0)
    module = Model(small)
    with torch.no_grad():
        out = terms(module, Preparer(small, tables, CPU), batch, "masked")
    result = step(small, "masked", batch, 2, tables, 1)
    torch.testing.assert_close(result["logged.kspace_loss"], out["kspace"].mean())
    torch.testing.assert_close(result["logged.image_loss"], out["image"].mean())
    torch.testing.assert_close(result["logged.loss"], (out["kspace"] + out["image"]).mean())


def test_the_gradient_is_that_of_the_mean_over_the_global_batch(small: RunConfig, tables: Tables, batch: Batch) -> None:
    """Against autograd on the plainest formula."""
    torch.manual_seed(0)
    module = Model(small)
    out = terms(module, Preparer(small, tables, CPU), batch, "masked")
    (out["kspace"] + out["image"]).mean().backward()
    result = step(small, "masked", batch, 4, tables, 1)
    for name, parameter in module.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(result[name], expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- contrast


def numpy_contrast(z: np.ndarray, present: np.ndarray, key: np.ndarray, config: RunConfig) -> float:
    """Symmetric InfoNCE per slice over present anchors; candidates: present, of other subjects or oneself."""
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    total = 0.0
    for part, weight in ((0, config.align.static_weight), (1, config.align.dynamic_weight)):
        losses = []
        for anchor, candidate in ((part, part + 2), (part + 2, part)):
            for s in range(z.shape[1]):
                for i in np.flatnonzero(present[:, s]):
                    logits = z[:, s, candidate] @ z[i, s, anchor] / config.align.temperature
                    allowed = present[:, s] & ((key != key[i]) | (np.arange(len(key)) == i))
                    losses.append(np.log(np.exp(logits[allowed]).sum()) - logits[i])
        total += weight * np.sum(losses) / (2 * present.sum())
    return total


@pytest.fixture
def embedded() -> tuple[Tensor, Tensor, Tensor]:
    """z of six subjects and three slices; rows 1 and 4 are the same subject, two slices are padded."""
    z = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    present = torch.ones(6, 3, dtype=torch.bool)
    present[0, 2] = present[3, 1] = False
    return z, present, torch.tensor([10, 11, 12, 13, 11, 15])


def test_contrast_is_its_formula(small: RunConfig, embedded: tuple[Tensor, Tensor, Tensor]) -> None:
    z, present, key = embedded
    sums = Sums()
    loss = contrastive(z, present, key, small, sums)
    assert float(loss) == pytest.approx(numpy_contrast(z.numpy(), present.numpy(), key.numpy(), small), rel=1e-5)
    assert float(sums.counts["infonce_static"]) == 2 * 16
    assert float(sums.counts["top1_dynamic"]) == 2 * 16
    # one over the candidates: slice 0 has six subjects, the others five; the one that is there twice is not its own
    chance = (4 / 6 + 2 / 5) + 2 * (3 / 5 + 2 / 4)
    assert float(sums.sums["top1_chance"] / sums.counts["top1_chance"]) == pytest.approx(chance / 16)


def test_the_learnt_temperature_has_the_gradient_of_the_formula(
    small: RunConfig, embedded: tuple[Tensor, Tensor, Tensor]
) -> None:
    z, present, key = embedded
    temperature = torch.tensor(0.1).requires_grad_()
    loss = contrastive(z, present, key, small, Sums(), temperature)
    (slope,) = torch.autograd.grad(loss, temperature)
    warmer, colder = (
        numpy_contrast(z.numpy(), present.numpy(), key.numpy(), override(small, {"align.temperature": 0.1 + step}))
        for step in (1e-4, -1e-4)
    )
    assert float(slope) == pytest.approx((warmer - colder) / 2e-4, rel=1e-3)


def test_a_learnt_temperature_starts_as_configured_and_never_loses_its_gradient(
    small: RunConfig, tables: Tables, batch: Batch
) -> None:
    config = override(small, {"align.learn_temperature": True, "align.temperature": 0.07})
    module = Model(config)
    prepare = Preparer(config, tables, CPU)
    assert terms(module, prepare, batch, "align")["temperature"].item() == pytest.approx(0.07)
    with torch.no_grad():
        module.heads["align"].log_temperature.fill_(-9.0)  # far past what Adam could reach
    learnt = terms(module, prepare, batch, "align")["temperature"]
    learnt.backward()
    assert 0.01 < learnt.item() < 0.0102
    assert module.heads["align"].log_temperature.grad is not None
    assert float(module.heads["align"].log_temperature.grad) > 0
    with pytest.raises(InputError, match=r"align.temperature: expected more than 0.01"):
        override(small, {"align.learn_temperature": True, "align.temperature": 0.01})


def test_a_subject_is_no_negative_of_itself(small: RunConfig, embedded: tuple[Tensor, Tensor, Tensor]) -> None:
    z, present, key = embedded
    alone = contrastive(z, present & (key == 11)[:, None], key, small, Sums())
    assert float(alone) == pytest.approx(0, abs=1e-6)  # nobody else: nothing to be told apart from
    different = contrastive(z, present, torch.arange(6), small, Sums())
    assert float(different) > float(contrastive(z, present, key, small, Sums()))


def test_a_padded_slice_is_neither_anchor_nor_negative(
    small: RunConfig, embedded: tuple[Tensor, Tensor, Tensor]
) -> None:
    z, present, key = embedded
    leaf = z.clone().requires_grad_()
    contrastive(leaf, present, key, small, Sums()).backward()
    assert leaf.grad is not None
    assert not leaf.grad[~present].any()
    assert leaf.grad[present].any(-1).all()
    others = torch.where(present[..., None, None], z, 100.0)
    torch.testing.assert_close(
        contrastive(others, present, key, small, Sums()), contrastive(z, present, key, small, Sums())
    )


def test_an_engine_is_what_tasks_ask_for(small: RunConfig) -> None:
    from kmtr.tasks import Engine

    assert isinstance(PlainEngine(Model(small), 1), Engine)


# ------------------------------------------------------------------------------------------------- autograd functions


def gathered(x: Tensor) -> Tensor:
    """A nonlinear function of all workers' rows in which rows of different workers meet."""
    rows = base.gather(x)
    return (rows[:, None] * rows[None]).sin().sum((0, 1))


def check_gather(rank: int, world: int, folder: str) -> None:
    """Gradient of every worker's own output summed over workers, against finite differences of the same sum."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/{world}", rank=rank, world_size=world)
    try:
        everything = torch.randn(world * 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        weight = torch.arange(1.0, 3.0, dtype=torch.float64) * (rank + 1)  # workers want different things
        x = everything[3 * rank : 3 * rank + 3].clone().requires_grad_()
        (gathered(x) * weight).sum().backward()
        found = x.grad
        assert found is not None
        step = 1e-6
        for owner in range(world):  # all workers move together, since each evaluation is a collective
            for i in range(3):
                for j in range(2):
                    sides = []
                    for sign in (1, -1):
                        moved = x.detach().clone()
                        moved[i, j] += sign * step * (owner == rank)
                        total = (gathered(moved) * weight).sum()
                        torch.distributed.all_reduce(total)
                        sides.append(float(total))
                    if owner == rank:
                        assert float(found[i, j]) == pytest.approx(
                            (sides[0] - sides[1]) / (2 * step), rel=1e-6, abs=1e-6
                        )
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_the_gradient_through_all_workers_is_that_of_finite_differences(tmp_path: Path, world: int) -> None:
    if world == 1:
        x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(gathered, (x,))
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/one", rank=0, world_size=1)
        try:
            assert torch.autograd.gradcheck(base._Gather.apply, (x,))
        finally:
            torch.distributed.destroy_process_group()
        return
    processes.run(check_gather, world, world, str(tmp_path))
