"""A batch: the slices and frames chosen, padding flagged, draws that depend on the subject alone."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from cohort import simulated, write

from kmtr.config import RunConfig, override
from kmtr.data.dataset import record
from kmtr.data.dataset.manifest import DamagedShard
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.dataset.record import Loaded
from kmtr.data.loader import pipeline, planning
from kmtr.data.loader.batch import NOTHING, Batch, Wanted
from kmtr.data.loader.collate import collate
from kmtr.data.loader.planning import check_shapes
from kmtr.data.loader.shapes import choose
from kmtr.physics import sampling
from kmtr.physics.fourier import crop_or_pad, fft2c, fftc, ifft2c, ifftc
from kmtr.tasks.masked import hidden_lines, hidden_patches
from kmtr.types import InputError, Study, View

CPU = torch.device("cpu")


def table_of(*studies: Study, dtype: str = "float32") -> pa.Table:
    return pa.Table.from_pylist([record.to_row(study, dtype) for study in studies], schema=record.schema(dtype))


def batch_of(config: RunConfig, *studies: Study, wanted: Wanted = NOTHING) -> Batch:
    return collate(Loaded(table_of(*studies)), config, wanted=wanted).to(CPU)


def same(a: Batch, b: Batch) -> bool:
    tensors = [f.name for f in fields(Batch) if isinstance(getattr(a, f.name), torch.Tensor) and f.name != "labels"]
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


@pytest.fixture(scope="module")
def study(small: RunConfig) -> Study:
    return simulated(0, small)


def numbered(slices: int, frames: int, matrix: tuple[int, int] = (32, 32), sampled: np.ndarray | None = None) -> View:
    """k-space whose values say slice and frame: 1 + slice + 100 frame."""
    values = 1 + np.arange(slices)[:, None] + 100 * np.arange(frames)
    kspace = np.broadcast_to(values[:, None, :, None, None], (slices, 1, frames, *matrix)).astype(np.complex64)
    return View(kspace, sampled=sampled)


def test_values_are_the_study_s(small: RunConfig, study: Study) -> None:
    batch = batch_of(small, study, wanted=Wanted(("lvedv_ml", "dcm")))
    expected = np.concatenate([study.views["sax"].kspace, study.views["lax_4ch"].kspace])
    np.testing.assert_array_equal(batch.kspace[0], expected)
    stored = collate(Loaded(table_of(study, dtype="float16")), small).to(CPU).kspace[0].numpy()
    np.testing.assert_allclose(stored, expected, atol=1e-3 * abs(expected).max())
    assert not batch.padded.any()
    np.testing.assert_allclose(batch.labels[0, 0], study.labels["lvedv_ml"], rtol=1e-6)
    assert batch.key[0] == np.uint64(sampling.subject_key(study.subject_id)).astype(np.int64)
    unknown = batch_of(small, replace(study, labels={}), wanted=Wanted(("lvedv_ml",)))
    assert unknown.labels.isnan().all()


def test_slices_come_from_the_middle_and_frames_from_the_start() -> None:
    assert choose(10, 2, centred=True).tolist() == [2, 7]
    assert choose(9, 3, centred=True).tolist() == [1, 4, 7]
    assert choose(25, 5, centred=False).tolist() == [0, 5, 10, 15, 20]
    assert choose(3, 5, centred=True).tolist() == [0, 1, 2]
    for available in range(1, 30):
        for wanted in range(1, 30):
            chosen = choose(available, wanted, centred=True)
            assert len(set(chosen)) == min(available, wanted)
            assert chosen.max() < available


def test_what_is_too_much_is_chosen_from(small: RunConfig) -> None:
    batch = batch_of(small, Study("p-1", {"sax": numbered(10, 8), "lax_4ch": numbered(1, 4)}))
    seen = batch.kspace[0, :, 0, :, 0, 0].real
    assert seen[:2, 0].tolist() == [3, 8]  # slices 2 and 7
    assert (seen[0] // 100).tolist() == [0, 2, 4, 6]
    assert (seen[2] // 100).tolist() == [0, 1, 2, 3]
    assert not batch.padded.any()


def test_what_is_missing_is_padded_and_never_sampled(small: RunConfig, study: Study) -> None:
    short = Study("p-1", {"sax": numbered(1, 3)})
    batch = batch_of(small, short, study)
    assert batch.padded[0].tolist() == [[False, False, False, True], [True] * 4, [True] * 4]
    hidden, _ = hidden_lines(small, batch)
    for values in (batch.kspace[0, :, 0], batch.sampled[0], hidden[0]):
        assert not values[batch.padded[0]].any()
    assert (batch.sampled[0, 0, :3].sum(-1) >= 8).all()
    present = ~batch.padded[0].unflatten(-1, (2, 2)).all(-1)  # slice pt
    assert not hidden_patches(small, batch)[0][~present].any()
    assert not batch.padded[1].any()


def test_draws_have_the_configured_counts(batch: Batch, small: RunConfig) -> None:
    assert set(batch.sampled.sum(-1).flatten().tolist()) == {8, 16}  # of 32 lines at R = 4 and 2
    hidden, patches = hidden_lines(small, batch)[0], hidden_patches(small, batch)
    assert not (hidden & ~batch.sampled).any()
    share = hidden.sum((2, 3)) / batch.sampled.sum((2, 3))
    torch.testing.assert_close(share, torch.full_like(share, 0.5), atol=0.02, rtol=0)
    assert patches.shape == (8, 3, 2, 4, 4)
    withheld = patches.float().mean((2, 3, 4))
    torch.testing.assert_close(withheld, torch.full_like(withheld, 0.7), atol=0.02, rtol=0)


def test_draws_do_not_depend_on_the_company(small: RunConfig, reader: Reader, batch: Batch) -> None:
    for row in (0, 5):
        assert same(collate(reader.samples([row]), small).to(CPU), batch[row : row + 1])
    assert same(collate(reader.samples([5, 3]), small).to(CPU)[1:], batch[3:4])


def test_epochs_seeds_and_purposes_draw_anew(small: RunConfig, reader: Reader, batch: Batch) -> None:
    samples = reader.samples(range(8))
    for other in (
        collate(samples, small, epoch=1),
        collate(samples, override(small, {"seed": 1})),
        collate(samples, small, purpose=sampling.VALIDATION),
    ):
        assert not torch.equal(other.to(CPU).sampled, batch.sampled)
    again = collate(samples, small, epoch=1).to(CPU)
    assert not torch.equal(hidden_patches(small, again), hidden_patches(small, batch))
    assert not torch.equal(hidden_lines(small, replace(batch, epoch=again.epoch))[0], hidden_lines(small, batch)[0])


def test_an_undersampled_source_keeps_its_pattern(small: RunConfig, study: Study) -> None:
    pattern = np.random.default_rng(0).random((5, 8, 32)) < 0.3
    given = Study("p-1", {"sax": numbered(5, 8, sampled=pattern), "lax_4ch": study.views["lax_4ch"]})
    batch = batch_of(small, given)
    np.testing.assert_array_equal(batch.sampled[0, :2], pattern[[1, 3]][:, ::2])
    drawn = batch_of(small, Study("p-1", {"sax": numbered(5, 8), "lax_4ch": study.views["lax_4ch"]}))
    assert torch.equal(batch.sampled[0, 2], drawn.sampled[0, 2])  # the other view's draw stays
    assert not (hidden_lines(small, batch)[0] & ~batch.sampled).any()


def test_targets_are_the_hidden_lines_or_all_that_are_not_shown(small: RunConfig, reader: Reader, study: Study) -> None:
    every = override(small, {"masked.target": "all"})
    samples = reader.samples(range(8))
    for config in (small, override(small, {"sampling.accelerations": (1,)})):
        batch = collate(samples, config).to(CPU)
        assert torch.equal(*hidden_lines(config, batch))
        assert torch.equal(batch.acquired, batch.existing)
    full = collate(samples, override(every, {"sampling.accelerations": (1,)})).to(CPU)
    assert torch.equal(*hidden_lines(every, full))  # nothing is left out at R = 1
    batch = collate(samples, every).to(CPU)
    hidden, targets = hidden_lines(every, batch)
    assert torch.equal(targets, batch.existing & ~(batch.sampled & ~hidden))
    pattern = np.random.default_rng(0).random((2, 4, 32)) < 0.3
    given = Study("p-1", {"sax": View(study.views["sax"].kspace, sampled=pattern), "lax_4ch": study.views["lax_4ch"]})
    batch = batch_of(every, given)
    hidden, targets = hidden_lines(every, batch)
    assert torch.equal(targets[:, :2], hidden[:, :2])  # what the scanner left out nobody knows
    assert torch.equal(targets[:, 2], (batch.existing & ~batch.sampled | hidden)[:, 2])


@pytest.mark.parametrize("target", ["acquired", "all"])
def test_a_share_of_the_target_lines_is_drawn_anew_each_pass(small: RunConfig, reader: Reader, target: str) -> None:
    whole = override(small, {"masked.target": target})
    few = override(whole, {"masked.target_lines": 0.3})
    first, second = (collate(reader.samples(range(8)), few, epoch=epoch).to(CPU) for epoch in (0, 1))
    every = collate(reader.samples(range(8)), whole).to(CPU)
    (hidden, drawn), (all_hidden, targets) = hidden_lines(few, first), hidden_lines(whole, every)
    assert torch.equal(hidden, all_hidden)
    assert not (drawn & ~targets).any()
    assert torch.equal(drawn.sum((2, 3)), (targets.sum((2, 3)).double() * 0.3).round().long())
    assert not torch.equal(drawn, hidden_lines(few, second)[1])
    alone = collate(reader.samples([5]), few).to(CPU)
    assert same(alone, first[5:6])
    assert torch.equal(hidden_lines(few, alone)[1], drawn[5:6])


def test_cropping_k_space_is_cropping_the_image(small: RunConfig, study: Study) -> None:
    for size in ((24, 16), (40, 64), (16, 40)):
        changes = {"data.crop": True, "data.matrix": size, "model.patch": (2, 8, 8), "sampling.accelerations": (2,)}
        config = override(small, changes | {"evaluate.accelerations": (2,)})
        batch = batch_of(config, study)
        image = ifft2c(np.concatenate([study.views[v].kspace for v in small.data.views]))
        expected = fft2c(crop_or_pad(image, size, (-2, -1)))
        np.testing.assert_allclose(batch.kspace[0], expected, atol=1e-5 * abs(expected).max())


def test_an_undersampled_source_is_cropped_along_the_readout_alone(small: RunConfig, study: Study) -> None:
    sax = study.views["sax"]
    pattern = np.random.default_rng(0).random((2, 4, 32)) < 0.3
    acquired = sax.kspace * pattern[:, None, :, :, None]
    config = override(small, {"data.crop": True, "data.matrix": (32, 16), "data.views": ("sax",)})
    batch = batch_of(config, Study("p-1", {"sax": View(acquired, sampled=pattern)}))
    expected = fftc(crop_or_pad(ifftc(acquired, (-1,)), (16,), (-1,)), (-1,))
    np.testing.assert_allclose(batch.kspace[0], expected, atol=1e-5 * abs(expected).max())
    assert not batch.kspace[0].abs().sum((1, -1))[torch.from_numpy(~pattern)].any()  # nothing smeared along ky


def test_a_dataset_that_does_not_fit_is_refused(small: RunConfig, tmp_path: Path) -> None:
    pattern = np.ones((2, 4, 32), bool)
    views = {"sax": numbered(2, 4, sampled=pattern), "lax_4ch": numbered(1, 4)}
    write(tmp_path, {"train": [Study("p-1", views)]})
    dataset = Dataset.of(str(tmp_path))
    check_shapes(small, dataset)
    both = {"sampling.accelerations": (2,), "evaluate.accelerations": (2,)}
    for changes, said in (
        ({"data.views": ("sax", "lax_2ch")}, "data.views: expected views of the dataset (sax,lax_4ch), got lax_2ch"),
        ({"data.matrix": (32, 16)}, "data.matrix: sax of the dataset is 32 x 32, got 32 x 16; set data.matrix=32,32"),
        ({"data.matrix": (16, 32), "data.crop": True} | both, "so its 32 lines can't become 16"),
        ({"data.frames": 10}, "data.frames: sax of the dataset has 4 frames, got data.frames=10"),
    ):
        with pytest.raises(InputError) as error:
            check_shapes(override(small, changes), dataset)
        assert said in str(error.value)
    check_shapes(override(small, {"data.matrix": (32, 16), "data.crop": True}), dataset)


def test_slicing_a_batch_slices_all_of_it(batch: Batch) -> None:
    assert len(batch) == 8
    assert len(batch[2:5]) == 3
    assert torch.equal(batch[2:5].key, batch.key[2:5])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_shares_make_the_global_batch(small: RunConfig, reader: Reader, world: int) -> None:
    plan = planning.plan_of(small, reader.dataset)
    steps = range(2, 5)  # of epochs 0 and 1
    ranks = [list(pipeline.batches(small, reader, plan, steps, rank, world)) for rank in range(world)]
    for position, step in enumerate(steps):
        whole = collate(reader.samples(plan.batch(step).row), small, epoch=plan.epoch(step)).to(CPU)
        parts = [batches[position].to(CPU) for batches in ranks]
        tensors = [f.name for f in fields(Batch) if isinstance(getattr(whole, f.name), torch.Tensor)]
        assert same(replace(whole, **{name: torch.cat([getattr(p, name) for p in parts]) for name in tensors}), whole)


def test_a_damaged_shard_reaches_the_consumer_of_batches(small: RunConfig, tmp_path: Path) -> None:
    write(tmp_path, {"train": [simulated(i, small) for i in range(8)]})
    dataset = Dataset.of(str(tmp_path))
    reader, plan = dataset.reader("train", small.data), planning.plan_of(small, dataset)
    next((tmp_path / "shards").glob("*.parquet")).unlink()
    with pytest.raises(DamagedShard):
        list(pipeline.batches(small, reader, plan, range(3), 0, 1))


def test_reading_in_order_ends_with_a_smaller_batch(small: RunConfig, reader: Reader) -> None:
    batches = [host.to(CPU) for host in pipeline.read_in_order(reader, range(10), 4, small)]
    assert [len(b) for b in batches] == [4, 4, 2]
    assert batches[2].key[1] == np.uint64(sampling.subject_key("sim-0-0000009")).astype(np.int64)
