"""Subjects of different shapes: the same tokens, losses and draws in a batch of any shape, and few shapes in all."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from cohort import write
from inside import prepared, shown, terms
from torch import Tensor

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import buckets, pipeline, planning, statistics
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.collate import collate
from kmtr.data.loader.device import HostBatch
from kmtr.data.loader.shapes import cells_in, full_shape, shape_of, slots_of
from kmtr.tasks import STAGES, Inputs, Model, Preparer, accumulate
from kmtr.tasks.masked import hidden_lines
from kmtr.types import InputError, KmtrError, Study, View

CPU = torch.device("cpu")
MATRICES, COILS, SLICES = ((32, 32), (24, 32), (32, 24)), (1, 2), range(2, 6)


def phantom_view(rng: np.random.Generator, slices: int, coils: int, frames: int, matrix: tuple[int, int]) -> View:
    """A blob that beats: k-space decays from its centre, as a heart's does."""
    ny, nx = matrix
    ky, kx = np.ogrid[-(ny // 2) : ny - ny // 2, -(nx // 2) : nx - nx // 2]
    decay = np.exp(-np.hypot(ky, kx) / 4)
    phase = np.exp(2j * np.pi * rng.random((slices, coils, 1, 1, 1)))
    beat = 1 + 0.3 * np.cos(2 * np.pi * np.arange(frames) / frames + rng.random())[:, None, None]
    noise = rng.standard_normal((2, slices, coils, frames, ny, nx)) * 0.02
    return View((decay * phase * beat + noise[0] + 1j * noise[1]).astype(np.complex64))


def scanned(index: int) -> Study:
    """A subject of some scanner: matrix, coils and slices vary."""
    rng = np.random.default_rng(index)
    matrix, coils = MATRICES[index % 3], COILS[index // 3 % 2]
    return Study(
        f"p-{index}",
        {
            "sax": phantom_view(rng, int(rng.choice(SLICES)), coils, 4, matrix),
            "lax_4ch": phantom_view(rng, 1, coils, 4, matrix),
        },
        labels={"lvedv_ml": float(100 + index)},
    )


@pytest.fixture(scope="module")
def mixed(small: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Configuration of a dataset of 96 + 8 subjects from many scanners."""
    root = tmp_path_factory.mktemp("mixed")
    write(root, {"train": [scanned(i) for i in range(96)], "val": [scanned(i) for i in range(96, 104)]})
    return override(small, {"data.root": str(root), "data.coils": 2, "data.sax_slices": 5})


@pytest.fixture(scope="module")
def scans(mixed: RunConfig) -> Dataset:
    return Dataset.open(mixed.data)


@pytest.fixture(scope="module")
def tables(mixed: RunConfig, scans: Dataset) -> dict[str, Tensor]:
    return statistics.fit(mixed, scans.reader("train", mixed.data)).tensors()


def epoch(config: RunConfig, scans: Dataset) -> list[HostBatch]:
    plan = planning.plan_of(config, scans)
    reader = scans.reader("train", config.data)
    return list(pipeline.batches(config, reader, plan, range(plan.steps_per_epoch), 0, 1))


def test_an_epoch_has_few_shapes_and_little_padding(mixed: RunConfig, scans: Dataset) -> None:
    batches = epoch(mixed, scans)
    shapes = {tuple(batch.stored.shape) for batch in batches}
    assert 3 <= len(shapes) <= 8
    stored = sum(batch.stored.nbytes for batch in batches)
    padding = sum(batch.padding * batch.stored.nbytes for batch in batches) / stored
    assert padding < 0.25  # 24 subjects a shape fill three batches of eight: what is left over weighs much
    waste = planning.padding_of(mixed, scans, planning.plan_of(mixed, scans))
    assert waste.total == pytest.approx(padding, abs=0.03)
    one = override(mixed, {"plan.shapes": 1})
    assert {tuple(batch.shape) for batch in epoch(one, scans)} == {full_shape(mixed.data)}
    assert planning.padding_of(one, scans, planning.plan_of(one, scans)).total > 1.5 * waste.total
    seen = torch.cat([batch.meta["key"] for batch in batches])
    assert len(seen.unique()) == len(seen) == 96


def test_a_plan_that_is_handed_its_shapes_searches_for_none(
    mixed: RunConfig, scans: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = override(mixed, {"plan.shapes": 5})
    found = planning.plan_of(mixed, scans)

    def searched(*_: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(buckets, "choose", searched)
    monkeypatch.setattr(planning, "check_shapes", searched)
    given = planning.plan_of(mixed, scans, found.buckets)
    assert given.shapes == found.shapes
    for step in range(2 * found.steps_per_epoch):
        ours, theirs = given.batch(step), found.batch(step)
        np.testing.assert_array_equal(ours.row, theirs.row)
        assert ours.bucket == theirs.bucket


def test_shapes_of_another_dataset_are_refused(mixed: RunConfig, scans: Dataset, tmp_path: Path) -> None:
    write(tmp_path, {"train": [scanned(i) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8)]})
    shapes = planning.plan_of(mixed, scans).buckets
    with pytest.raises(KmtrError, match=r"expected the dataset whose .* shapes of subjects the run began with"):
        planning.plan_of(mixed, Dataset.of(str(tmp_path)), shapes)


@pytest.mark.parametrize(
    "changes", [{}, {"model.readout": "hybrid", "model.normalisation": "line"}, {"model.coils": 1}], ids=str
)
def test_a_subject_is_the_same_in_a_batch_of_any_shape(
    mixed: RunConfig, scans: Dataset, changes: dict[str, object]
) -> None:
    mixed = override(mixed, changes)
    reader = scans.reader("train", mixed.data)
    prepare = Preparer(mixed, statistics.fit(mixed, reader).tensors(), CPU)
    torch.manual_seed(0)
    model = Model(mixed)
    differs = 0
    atol = 1e-4 if "model.coils" in changes else 1e-5  # eigenvectors feel the order of a sum
    for row in range(12):
        samples = reader.samples([row])
        subject = {v: samples.meta.column(f"shape_{v}")[0].as_py() for v in mixed.data.views}
        tight, loose = (collate(samples, mixed, shape).to(CPU) for shape in (shape_of(mixed, subject), None))
        differs += tight.kspace.shape != loose.kspace.shape
        assert int(tight.sampled.sum()) == int(loose.sampled.sum())
        assert int(hidden_lines(mixed, tight)[0].sum()) == int(hidden_lines(mixed, loose)[0].sum())
        for stage in ("masked", "align"):
            with torch.no_grad():
                ours, theirs = (terms(model, prepare, batch, stage) for batch in (tight, loose))
            for name in ours:
                present = ~shown(prepared(prepare, tight, stage)).absent.all(-1)
                a, b = (x[name][present] if name == "z" else x[name] for x in (ours, theirs))
                torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)
        lines, same = (shown(prepared(prepare, batch, "align")).all_lines for batch in (tight, loose))
        torch.testing.assert_close(lines.values, same.values, rtol=1e-4, atol=atol)
        assert torch.equal(lines.index, loose.sampled.nonzero()[:, 1:])  # the same places of the full grid
    assert differs >= 6


def test_lines_that_do_not_exist_are_never_sampled_and_true_r_counts_none(mixed: RunConfig, scans: Dataset) -> None:
    reader = scans.reader("train", override(mixed, {}).data)
    batch = collate(reader.samples(range(12)), override(mixed, {"sampling.accelerations": (4,)})).to(CPU)
    assert not (batch.sampled & ~batch.existing).any()
    for row in range(12):
        lines = batch.extent[row, 0, 1]
        per_frame = batch.sampled[row].sum(-1)[~batch.padded[row]]
        assert (per_frame == lines // 4).all()
        assert int(batch.existing[row].sum()) == int((~batch.padded[row]).sum() * lines)
    outside = batch.kspace.abs().sum((2, 5))[~batch.existing]
    assert not outside.any()


def test_a_repeated_subject_counts_in_no_loss(mixed: RunConfig, scans: Dataset, tables: dict[str, Tensor]) -> None:
    config = override(mixed, {"data.global_batch": 8})
    samples = scans.reader("train", config.data).samples([0, 1, 2, 3, 4, 5, 0, 1])
    repeated = np.array([False] * 6 + [True] * 2)
    padded = collate(samples, config, repeated=repeated, real=6).to(CPU)
    alone = collate(scans.reader("train", config.data).samples(range(6)), config).to(CPU)
    for stage in ("masked", "align"):
        ours, theirs = (gradients(config, stage, batch, tables) for batch in (padded, alone))
        for name in theirs:
            scale = max(float(g.abs().max()) for g in theirs.values())
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5 * scale)


def gradients(config: RunConfig, stage: str, batch: Batch, tables: dict[str, Tensor]) -> dict[str, Tensor]:
    class Plain:
        def __init__(self) -> None:
            torch.manual_seed(0)
            self.module = Model(config)

        def __call__(self, inputs: Inputs, predict: bool = False) -> dict[str, dict[str, Tensor]]:
            return self.module(inputs, predict)

        def backward(self, loss: Tensor) -> None:
            loss.backward()

    engine = Plain()
    logged = accumulate(engine, [batch], Preparer(config, tables, CPU), STAGES[stage](config))
    assert float(logged.counts["kspace_loss"]) == batch.real
    return {n: p.grad for n, p in engine.module.named_parameters() if p.grad is not None}


def test_a_padded_tail_flags_its_repeats(mixed: RunConfig, scans: Dataset) -> None:
    config = override(mixed, {"data.global_batch": 40, "plan.tail": "pad", "plan.shapes": 1})
    batches = epoch(config, scans)
    assert [batch.real for batch in batches].count(40) == 2
    tail = next(batch for batch in batches if batch.real < 40)
    assert tail.real == 16
    assert int((~tail.meta["repeated"]).sum()) == 16
    real = torch.cat([batch.meta["key"][~batch.meta["repeated"]] for batch in batches])
    assert len(real.unique()) == len(real) == 96


def test_several_datasets_keep_their_weights_in_every_batch(mixed: RunConfig, small: RunConfig, tmp_path: Path) -> None:
    write(tmp_path, {"train": [scanned(i) for i in range(200, 224)]})
    config = override(mixed, {"data.more": (str(tmp_path),), "data.weights": (1, 3), "plan.shapes": 1})
    scans = Dataset.open(config.data)
    reader = scans.reader("train", config.data)
    assert len(reader) == 96 + 24
    own = {int(k) for k in collate(reader.samples(range(96, 120)), config).meta["key"]}
    for batch in epoch(config, scans):
        assert sum(int(key) in own for key in batch.meta["key"]) == 6  # 3 of 4 parts of 8
    fitted = statistics.fit(config, reader)
    assert torch.isfinite(fitted.static_sd).all()
    write(tmp_path / "other", {"train": [scanned(1)]}, dtype="float32")
    with pytest.raises(InputError, match="expected datasets of one dtype"):
        Dataset.of(mixed.data.root, str(tmp_path / "other"))


def test_slots_and_cells_agree(mixed: RunConfig) -> None:
    data = mixed.data
    assert slots_of(data, 5) == (0, 1, 2, 3, 4, 5)
    assert slots_of(data, 2) == (0, 1, 5)
    turned = override(mixed, {"data.views": ("lax_4ch", "sax")}).data
    assert slots_of(turned, 2) == (0, 1, 2)
    shapes = np.array([(2, 1, 4, 32, 24), (5, 2, 4, 32, 32)])
    assert cells_in(data, shapes).tolist() == [3 * 4 * 32 * 24, 6 * 2 * 4 * 32 * 32]
    assert all(a <= b for a, b in pairwise(cells_in(data, shapes).tolist()))


def test_a_view_of_another_matrix_keeps_its_own_lines(mixed: RunConfig) -> None:
    from kmtr.data.dataset import record
    from kmtr.data.dataset.record import Loaded

    rng = np.random.default_rng(0)
    study = Study("p-x", {"sax": phantom_view(rng, 2, 1, 4, (32, 32)), "lax_4ch": phantom_view(rng, 1, 1, 4, (24, 24))})
    import pyarrow as pa

    table = pa.Table.from_pylist([record.to_row(study, "float32")], schema=record.schema("float32"))
    config = override(mixed, {"sampling.accelerations": (2,)})
    batch = collate(Loaded(table), config).to(CPU)
    assert batch.extent[0, [0, 5]].tolist() == [[1, 32, 32], [1, 24, 24]]
    assert batch.sampled[0, 5].sum(-1).tolist() == [12] * 4
    np.testing.assert_array_equal(batch.kspace[0, 5, 0, :, 4:28, 4:28], study.views["lax_4ch"].kspace[0, 0])
    assert not replace(batch).same
