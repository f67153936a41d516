"""What a batch carries when it is asked: masks that lie on the image, drawn classes, spacing, labels."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cohort import write
from discs import SPACING_MM, dice, disc, study, undersampled
from test_batch import table_of

from kmtr.config import RunConfig, override
from kmtr.data.dataset.manifest import DamagedShard
from kmtr.data.dataset.reader import Dataset
from kmtr.data.dataset.record import Loaded
from kmtr.data.loader import pipeline, planning
from kmtr.data.loader.batch import Batch, Wanted
from kmtr.data.loader.collate import collate
from kmtr.data.loader.ray import pack, unpack
from kmtr.data.loader.shapes import choose
from kmtr.physics.sampling import PATTERN, VALIDATION
from kmtr.types import UNLABELLED, VIEWS, InputError, Study

CPU = torch.device("cpu")
MASKS = Wanted(masks=True)
MATRIX = (128, 128)
MOTIONS = [
    {"shift": 0.1},
    {"rotation_deg": 180.0},
    {"flip": True},
    {"shift": 0.1, "rotation_deg": 180.0, "flip": True, "phase": True, "coil_dropout": 0.4, "noise": 0.01},
]


@pytest.fixture(scope="module")
def config(small: RunConfig) -> RunConfig:
    changes = {"data.views": VIEWS, "data.sax_slices": 3, "data.matrix": MATRIX, "model.patch": (2, 16, 16)}
    return override(small, changes | {"data.coils": 2, "stage": "masked", "sampling.accelerations": (4,)})


@pytest.fixture(scope="module")
def discs(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Configuration of 12 subjects of different matrices, slices and frames."""
    root = tmp_path_factory.mktemp("discs")
    matrices = (MATRIX, (96, 128), (96, 96))
    subjects = [study(i, slices=2 + i % 4, matrix=matrices[i % 3], frames=4 - i % 2) for i in range(12)]
    write(root, {"train": subjects}, rows=6)
    return override(config, {"data.root": str(root), "data.global_batch": 4})


def batch_of(config: RunConfig, *studies: Study, wanted: Wanted = MASKS, purpose: int = VALIDATION) -> Batch:
    return collate(Loaded(table_of(*studies)), config, wanted=wanted, purpose=purpose).to(CPU)


def only(some: Study, **views: object) -> Study:
    return replace(some, views=views)


@pytest.mark.parametrize(
    ("matrix", "crop"),
    [(MATRIX, False), ((96, 112), False), ((97, 127), False), ((150, 141), True), ((100, 121), True), (MATRIX, True)],
)
def test_masks_lie_on_the_image(config: RunConfig, matrix: tuple[int, int], crop: bool) -> None:
    config = override(config, {"data.crop": crop})
    batch = batch_of(config, study(0, slices=7, matrix=matrix))
    assert batch.masks is not None
    assert batch.masks.dtype == torch.uint8
    assert batch.masks.shape == (1, 6, 4, *MATRIX)
    assert dice(batch, MATRIX).min() > 0.97
    assert batch.spacing_mm is not None
    sax, long = batch.spacing_mm[0, 0].tolist(), batch.spacing_mm[0, -1].tolist()
    between, *pixel = SPACING_MM
    expected = pixel if crop else [size * n / want for size, n, want in zip(pixel, matrix, MATRIX, strict=True)]
    assert sax == pytest.approx([between * 7 / 3, *expected])
    assert long == pytest.approx([between, *expected])
    outside = batch.masks == UNLABELLED
    assert outside.any() == (crop and matrix == (100, 121))
    if outside.any():
        assert not outside[..., 14:114, 4:125].any()  # the source's own 100 x 121 in the middle


def test_masks_of_an_undersampled_source_are_cropped_along_the_readout_alone(config: RunConfig) -> None:
    config = override(config, {"data.crop": True})
    whole = study(0, matrix=(128, 150))
    batch = batch_of(config, replace(whole, views={name: undersampled(view) for name, view in whole.views.items()}))
    assert batch.masks is not None
    assert batch.masks.equal(batch_of(config, whole).masks)
    assert dice(batch, MATRIX).min() > 0.97
    shown = batch_of(config, only(whole, sax=undersampled(disc(3, 4, (96, 150)))))
    assert shown.spacing_mm is not None
    assert shown.spacing_mm[0, 0].tolist() == pytest.approx([8.0, 96 / 128, 1.0])
    assert dice(shown, MATRIX)[:, :3].min() > 0.97


def test_slices_and_frames_are_those_of_k_space_and_the_rest_is_unlabelled(config: RunConfig) -> None:
    many, few = disc(10, 9, MATRIX), disc(2, 3, MATRIX)
    batch = batch_of(config, only(study(0), sax=many), only(study(1), sax=few, lax_3ch=disc(1, 4, MATRIX)))
    assert batch.masks is not None
    z, t = choose(10, 3, centred=True), choose(9, 4, centred=False)
    np.testing.assert_array_equal(batch.masks[0, :3], many.segmentation[z][:, t])  # type: ignore[index]
    np.testing.assert_array_equal(batch.masks[1, :2, :3], few.segmentation)
    assert ((batch.masks == UNLABELLED).all(-1).all(-1) == batch.padded).all()
    assert batch.contoured is not None
    assert batch.spacing_mm is not None
    there = ~batch.padded.all(-1)
    assert (batch.contoured.any(-1) == there).all()
    assert (batch.spacing_mm.isfinite().all(-1) == there).all()
    assert (batch.spacing_mm.isnan().all(-1) == ~there).all()


def test_classes_that_a_source_draws(config: RunConfig) -> None:
    view = disc(3, 4, MATRIX)
    views = {
        "sax": replace(view, contoured=(1, 2)),
        "lax_2ch": replace(disc(1, 4, MATRIX), contoured=None),
        "lax_3ch": replace(disc(1, 4, MATRIX), segmentation=None, contoured=None, spacing_mm=None),
    }
    batch = batch_of(config, replace(study(0), views=views))
    assert batch.contoured is not None
    assert batch.contoured[0].int().tolist() == [[1, 1, 1, 0, 0, 0]] * 3 + [[1] * 6, [0] * 6, [0] * 6]
    assert batch.masks is not None
    assert (batch.masks[0, 4:] == UNLABELLED).all()
    assert batch.spacing_mm is not None
    assert batch.spacing_mm[0, 4:].isnan().all()
    frames = view.segmentation.copy()  # type: ignore[union-attr]
    frames[:, 1:] = UNLABELLED  # contours at end-diastole alone
    alone = batch_of(config, only(study(0), sax=replace(view, segmentation=frames)))
    assert alone.masks is not None
    assert (alone.masks[0, :3] == UNLABELLED).all(-1).all(-1).tolist() == [[False, True, True, True]] * 3


# ---------------------------------------------------------------------------------------------------- only when asked


def test_nothing_is_carried_that_nobody_asked_for(discs: RunConfig) -> None:
    samples = Dataset.open(discs.data).reader("train", discs.data).samples(range(4))
    host = collate(samples, discs)
    assert not {"masks", "contoured", "spacing_mm"} & host.meta.keys()
    batch = host.to(CPU)
    assert batch.labels.shape == (4, 0)
    for some in (batch, batch[1:3]):
        assert (some.masks, some.contoured, some.spacing_mm) == (None, None, None)
    asked = collate(samples, discs, wanted=MASKS).to(CPU)
    part = asked[1:3]
    for name in ("masks", "contoured", "spacing_mm"):
        torch.testing.assert_close(getattr(part, name), getattr(asked, name)[1:3], equal_nan=True)
    for field in fields(Batch):
        if isinstance(value := getattr(batch, field.name), torch.Tensor):
            assert value.equal(getattr(asked, field.name)), f"{field.name} depends on what else is asked for"


def test_masks_that_nobody_asked_for_are_not_read(discs: RunConfig, tmp_path: Path) -> None:
    """Their bytes are spoilt: who reads them notices."""
    write(tmp_path, {"train": [study(i) for i in range(4)]}, rows=2)
    for shard in (tmp_path / "shards").glob("*.parquet"):
        metadata, content = pq.ParquetFile(shard).metadata, bytearray(shard.read_bytes())
        for group in (metadata.row_group(g) for g in range(metadata.num_row_groups)):
            for chunk in (group.column(c) for c in range(metadata.num_columns)):
                if chunk.path_in_schema.startswith("segmentation_"):
                    start, size = chunk.data_page_offset, chunk.total_compressed_size
                    content[start : start + size] = b"\xff" * size
        shard.write_bytes(content)
    config = override(discs, {"data.root": str(tmp_path)})
    dataset = Dataset.open(config.data)
    reader, plan = dataset.reader("train", config.data), planning.plan_of(config, dataset)
    assert len(list(pipeline.batches(config, reader, plan, range(1), 0, 1, Wanted(("lvef_pct",))))) == 1
    with pytest.raises(DamagedShard, match=r"shards/train-0000\d\.parquet, row group \d: expected readable pages"):
        list(pipeline.batches(config, reader, plan, range(1), 0, 1, MASKS))


def test_an_unknown_label_is_refused() -> None:
    with pytest.raises(InputError, match="labels: unknown label 'lvef', expected one of lvedv_ml, "):
        Wanted(("lvef",))


def test_labels_of_training_batches_are_in_the_order_asked_for_and_nan_where_unknown(
    config: RunConfig, tmp_path: Path
) -> None:
    known = [{"lvef_pct": 50.0 + i, "dcm": float(i % 2)} if i % 3 else {"dcm": 1.0} for i in range(8)]
    write(tmp_path, {"train": [replace(study(i, slices=3), labels=labels) for i, labels in enumerate(known)]})
    config = override(config, {"data.root": str(tmp_path), "data.global_batch": 4})
    dataset = Dataset.open(config.data)
    reader, plan = dataset.reader("train", config.data), planning.plan_of(config, dataset)
    names = ("dcm", "lvm_g", "lvef_pct")
    for step, host in enumerate(pipeline.batches(config, reader, plan, range(4), 0, 1, Wanted(names))):
        expected = [[known[row].get(name, np.nan) for name in names] for row in plan.batch(step).row]
        np.testing.assert_array_equal(host.to(CPU).labels, np.array(expected, np.float32))


# ------------------------------------------------------------------------------------------------------ ways to a batch


def test_masks_survive_their_transport(discs: RunConfig) -> None:
    reader = Dataset.open(discs.data).reader("train", discs.data)
    host = collate(reader.samples([0, 1, 5]), discs, wanted=Wanted(("lvm_g",), masks=True))
    back = unpack(pack(host), discs)
    assert back.meta.keys() == host.meta.keys()
    for name in ("masks", "contoured", "spacing_mm"):
        assert back.meta[name].dtype == host.meta[name].dtype
        assert back.meta[name].numpy().tobytes() == host.meta[name].numpy().tobytes()
    assert back.to(CPU).masks.equal(host.to(CPU).masks)  # type: ignore[union-attr]


@pytest.mark.ray
def test_either_loader_makes_the_same_batches(cluster: None, discs: RunConfig) -> None:
    dataset = Dataset.open(discs.data)
    reader, plan = dataset.reader("train", discs.data), planning.plan_of(discs, dataset)
    steps, wanted = range(plan.steps_per_epoch), Wanted(("lvm_g",), masks=True)
    ways = [override(discs, {"data.loader": loader}) for loader in ("ray", "threads")]
    both = [list(pipeline.batches(way, reader, plan, steps, 0, 1, wanted)) for way in ways]
    for a, b in zip(*both, strict=True):
        assert a.stored.equal(b.stored)
        assert a.meta.keys() == b.meta.keys()
        assert all(a.meta[name].numpy().tobytes() == b.meta[name].numpy().tobytes() for name in a.meta)
    assert sum(len(batch) for batch in both[0]) == 12


@pytest.mark.parametrize("augment", [{}, MOTIONS[-1]], ids=["plain", "augmented"])
def test_a_subject_has_the_same_masks_in_any_company_and_shape(discs: RunConfig, augment: dict[str, object]) -> None:
    config = override(discs, {f"augment.{name}": value for name, value in augment.items()})
    dataset = Dataset.open(config.data)
    reader, plan = dataset.reader("train", config.data), planning.plan_of(config, dataset)
    shapes, seen = set(), 0
    for world in (1, 2):
        for rank in range(world):
            for step, host in enumerate(pipeline.batches(config, reader, plan, range(3), rank, world, MASKS)):
                batch = host.to(CPU)
                rows = plan.share(step, rank, world).row
                # One subject alone in the configuration's full shape, another one each time.
                i = step % len(rows)
                alone = collate(reader.samples(rows[i : i + 1]), config, None, plan.epoch(step), MASKS).to(CPU)
                for name in ("masks", "contoured", "spacing_mm"):
                    mine, other = (getattr(b, name) for b in (batch[i : i + 1], alone))
                    other = other[:, list(batch.slots)]
                    other = other[:, :, : host.shape[2]] if name == "masks" else other
                    torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)
                shapes.add(host.shape)
                seen += len(batch)
    assert seen == 24
    assert len(shapes) > 1


# --------------------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("augment", MOTIONS, ids=lambda augment: "+".join(augment))
@pytest.mark.parametrize("matrix", [MATRIX, (96, 128)])
def test_masks_are_moved_with_k_space(config: RunConfig, augment: dict[str, object], matrix: tuple[int, int]) -> None:
    config = override(config, {f"augment.{name}": value for name, value in augment.items()})
    studies = [study(i, matrix=matrix) for i in range(4)]
    still = batch_of(config, *studies)
    moved = batch_of(config, *studies, purpose=PATTERN)
    assert moved.masks is not None
    assert still.masks is not None
    assert dice(moved, MATRIX).min() > 0.97
    assert sum(not torch.equal(a, b) for a, b in zip(moved.masks, still.masks, strict=True)) >= 3
    lost = (moved.masks == UNLABELLED).float().mean((1, 2, 3, 4))
    assert lost.max() < 0.4
    assert (moved.masks == moved.masks[:, :, :1]).float().mean() > 0.9  # one motion for all frames


def test_what_moves_nothing_leaves_the_very_masks(config: RunConfig) -> None:
    studies = [study(i, matrix=(96, 96)) for i in range(8)]
    plain = batch_of(config, *studies)
    assert plain.masks is not None
    quiet = {"augment.phase": True, "augment.coil_dropout": 0.4, "augment.noise": 0.1}
    assert plain.masks.equal(batch_of(override(config, quiet), *studies, purpose=PATTERN).masks)
    flipped = batch_of(override(config, {"augment.flip": True}), *studies, purpose=PATTERN).masks
    assert flipped is not None
    first = flipped[:, 0, 0] == UNLABELLED
    neither = ~(first[:, 0].all(-1) | first[..., 0].all(-1))
    assert neither.any()
    assert not neither.all()
    assert flipped[neither].equal(plain.masks[neither])  # an identity that was drawn
    given = [replace(s, views={name: undersampled(view) for name, view in s.views.items()}) for s in studies]
    turned = batch_of(override(config, {"augment.rotation_deg": 90.0}), *given, purpose=PATTERN)
    assert plain.masks.equal(turned.masks)  # such a subject is not rotated


def test_what_comes_from_outside_or_from_unlabelled_pixels_is_unlabelled(config: RunConfig) -> None:
    view = disc(3, 4, MATRIX)
    masks = view.segmentation.copy()  # type: ignore[union-attr]
    masks[..., :40] = UNLABELLED
    studies = [replace(only(study(0), sax=replace(view, segmentation=masks)), subject_id=f"p-{i}") for i in range(6)]
    config = override(config, {"augment.shift": 0.25})
    moved = batch_of(config, *studies, purpose=PATTERN).masks
    assert moved is not None
    known = (moved[:, 0, 0] != UNLABELLED).float()
    columns, rows = known.amax(1).sum(1), known.amax(2).sum(1)
    assert (columns <= 88).all()  # 128 less 40
    assert (known.sum((1, 2)) == columns * rows).all()  # a rectangle: what left the field of view has not come back
    assert len({tuple(pair) for pair in torch.stack([columns, rows], 1).tolist()}) > 3
    assert (moved[:, 3:] == UNLABELLED).all()


def test_nothing_waits_for_the_device(discs: RunConfig) -> None:
    """On the meta device no value can be looked at, and no shape can depend on one."""
    config = override(discs, {f"augment.{name}": value for name, value in MOTIONS[-1].items()})
    reader = Dataset.open(config.data).reader("train", config.data)
    batch = collate(reader.samples(range(3)), config, wanted=MASKS).to(torch.device("meta"))
    assert batch.masks is not None
    assert batch.masks.device.type == "meta"
    assert batch.masks.shape == (3, 6, 4, *MATRIX)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_the_same_batch(discs: RunConfig) -> None:
    config = override(discs, {f"augment.{name}": value for name, value in MOTIONS[-1].items()})
    reader = Dataset.open(config.data).reader("train", config.data)
    host = collate(reader.samples(range(6)), config, wanted=MASKS)
    here, there = host.to(CPU), host.to(torch.device("cuda"))
    assert here.masks is not None
    assert there.masks is not None
    assert (there.masks.cpu() == here.masks).float().mean() > 0.999
    assert there.contoured.cpu().equal(here.contoured)  # type: ignore[union-attr, arg-type]
