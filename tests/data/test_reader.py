"""Reading in place: the same values as pyarrow's, every damage found and named, whatever lies beside the shards."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmtr.config import RunConfig, override
from kmtr.data.dataset import pages, shards
from kmtr.data.dataset.manifest import DamagedShard, write_manifest
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.dataset.record import Loaded
from kmtr.data.loader import pipeline, planning
from kmtr.data.loader.batch import Wanted
from kmtr.data.loader.collate import collate
from kmtr.data.loader.ray import pack, unpack
from kmtr.types import Study, View

SHAPE = {"sax": (2, 1, 4, 128, 128), "lax_4ch": (1, 1, 4, 128, 128)}
"""Large enough for a row group of its own: it is read in place."""


def study(index: int) -> Study:
    rng = np.random.default_rng(index)
    views = {}
    for name, shape in SHAPE.items():
        if name == "sax" or index != 3:  # one subject lacks a view
            values = rng.standard_normal((*shape, 2), np.float32)
            views[name] = View(values.view(np.complex64)[..., 0])
    return Study(f"p-{index}", views, labels={"lvedv_ml": float(index)})


def written(root: Path, dtype: str = "float16", compression: str = "none") -> str:
    parts = [
        shards.write_shard(str(root), f"train-{n:05d}", "train", [study(2 * n + i) for i in (0, 1)], dtype, compression)
        for n in range(4)
    ]
    write_manifest(str(root), parts, dtype, "test")
    return str(root)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("large"))


@pytest.fixture
def copy(large: str, tmp_path: Path) -> Path:
    """A dataset to be damaged."""
    (tmp_path / "shards").mkdir()
    for file in ("manifest.json", *(f"shards/{f.name}" for f in (Path(large) / "shards").iterdir())):
        (tmp_path / file).write_bytes((Path(large) / file).read_bytes())
    return tmp_path


@pytest.fixture
def wide(small: RunConfig, large: str) -> RunConfig:
    changes = {"data.root": large, "data.matrix": (128, 128), "data.global_batch": 4, "model.patch": (2, 16, 16)}
    return override(small, changes | {"stage": "masked", "sampling.accelerations": (4,)})


def values(root: str, view: str, row: int, **settings: str) -> np.ndarray | None:
    if row == 3 and view != "sax":
        return None
    return Reader(Dataset.of(root), "train", **settings).samples([row]).fetch(0, view, SHAPE[view])


@pytest.mark.parametrize(("dtype", "compression"), [("float16", "none"), ("float32", "none"), ("float16", "lz4")])
def test_what_is_read_in_place_is_what_pyarrow_decodes(tmp_path: Path, dtype: str, compression: str) -> None:
    root = written(tmp_path, dtype, compression)
    reader = Reader(Dataset.of(root), "train")
    rows = [5, 0, 3, 6]
    table, samples = reader.read(rows), reader.samples(rows)
    assert samples.meta.column("subject_id").to_pylist() == [f"p-{row}" for row in rows]
    assert samples.meta.column("scale").equals(table.column("scale"))
    loaded = Loaded(table)
    for i, row in enumerate(rows):
        for view, shape in SHAPE.items():
            expected = loaded.fetch(i, view, shape)
            assert (expected is None) == (row == 3 and view == "lax_4ch")
            if expected is not None:
                got = samples.fetch(i, view, shape)
                into = np.full((*shape, 2), 7, dtype)
                assert samples.fetch(i, view, shape, into) is into
                np.testing.assert_array_equal(got, expected)
                np.testing.assert_array_equal(into, expected)
    in_place = pages.locate(pq.ParquetFile(Path(root) / "shards" / "train-00000.parquet"), ["kspace_sax"])
    assert (in_place["kspace_sax"] >= 0).all() == (compression == "none")


@pytest.mark.parametrize("beside", [Path.unlink, lambda p: p.write_bytes(b"x"), lambda p: p.write_bytes(b"")])
def test_an_index_that_is_missing_or_spoilt_is_made_anew(copy: Path, beside: Callable[[Path], object]) -> None:
    whole = values(str(copy), "sax", 2)
    for file in (copy / "shards").glob("*.index"):
        beside(file)
    np.testing.assert_array_equal(values(str(copy), "sax", 2), whole)
    ids = Reader(Dataset.of(str(copy)), "train").samples(range(8)).meta.column("subject_id").to_pylist()
    assert ids == [f"p-{row}" for row in range(8)]


def test_an_index_with_another_scale_is_not_believed(copy: Path) -> None:
    file = copy / "shards" / "train-00000.index"
    content = bytearray(file.read_bytes())
    scale = np.float64(Reader(Dataset.of(str(copy)), "train").read([0]).column("scale")[0].as_py()).tobytes()
    at = content.index(scale)
    content[at : at + 8] = np.float64(1.0).tobytes()
    file.write_bytes(content)
    read = Reader(Dataset.of(str(copy)), "train").samples([0]).meta.column("scale")[0].as_py()
    assert np.float64(read).tobytes() == scale


def flip(path: Path, times: int = 64) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[middle : middle + times] = bytes(b ^ 0xFF for b in content[middle : middle + times])
    path.write_bytes(content)


def zero(start: int, size: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        at = start if start >= 0 else len(content) // 4
        content[at : at + size] = bytes(size)
        path.write_bytes(content)

    return damage


DAMAGES = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-1000]),
    "removed": Path.unlink,
    "zeroed header": zero(0, 4096),
    "zeroed middle": zero(-1, 4096),
    "64 flipped bytes": flip,
}


def test_a_file_of_another_schema_is_damage(copy: Path, large: str) -> None:
    path = copy / "shards" / "train-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({}), path)
    path.with_suffix(".index").unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][1]["bytes"] = path.stat().st_size  # as if the manifest had been written for it
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedShard, match=r"train-00001\.parquet: expected readable pages, got: schema version none"):
        values(str(copy), "sax", 2)


@pytest.mark.parametrize("loader", ["threads", pytest.param("ray", marks=pytest.mark.ray)])
@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_is_one_line(
    kind: str, loader: str, copy: Path, wide: RunConfig, request: pytest.FixtureRequest
) -> None:
    if loader == "ray":
        if kind not in ("removed", "64 flipped bytes"):
            pytest.skip("the same reader: two kinds through Ray are enough")
        request.getfixturevalue("cluster")
    config = override(wide, {"data.root": str(copy), "data.loader": loader})
    dataset = Dataset.open(config.data)
    plan = planning.plan_of(config, dataset)
    DAMAGES[kind](copy / "shards" / "train-00001.parquet")
    reader = dataset.reader("train", config.data)
    with pytest.raises(DamagedShard) as error:
        list(pipeline.batches(config, reader, plan, range(plan.steps_per_epoch), 0, 1))
    said = str(error.value)
    assert said.startswith("shards/train-00001.parquet")
    assert "restore or rewrite it" in said
    assert "\n" not in said
    if kind not in ("truncated", "removed"):
        assert ", row group 0: " in said


def test_checksums_follow_the_policy(copy: Path) -> None:
    readers = {policy: Reader(Dataset.of(str(copy)), "train", verify=policy) for policy in ("always", "once", "never")}
    fetch = {name: lambda r=reader: r.samples([2]).fetch(0, "sax", SHAPE["sax"]) for name, reader in readers.items()}
    for call in fetch.values():
        call()
    flip(copy / "shards" / "train-00001.parquet")
    assert fetch["once"]() is not None  # known to be good when it was first read
    assert fetch["never"]() is not None
    with pytest.raises(DamagedShard, match=r"row group 0: .*checksum"):
        fetch["always"]()
    with pytest.raises(DamagedShard, match="checksum"):
        Reader(Dataset.of(str(copy)), "train", verify="once").samples([2]).fetch(0, "sax", SHAPE["sax"])


def test_a_manifest_of_version_1_is_brought_up_to_date(copy: Path, large: str) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    shapes = Dataset.of(large).shapes
    old = {k: v for k, v in manifest.items() if k != "subject_shapes"}
    old["shards"] = [{k: v for k, v in s.items() if k not in ("groups", "shapes", "index")} for s in manifest["shards"]]
    path.write_text(json.dumps(old | {"schema_version": 1, "shapes": shapes}))
    for file in (copy / "shards").glob("*.index"):
        file.unlink()
    ours, theirs = Dataset.of(str(copy)), Dataset.of(large)
    assert ours.manifests[0].subject_shapes == theirs.manifests[0].subject_shapes
    assert [s.shapes for s in ours.manifests[0].shards] == [s.shapes for s in theirs.manifests[0].shards]
    assert [s.groups for s in ours.manifests[0].shards] == [s.groups for s in theirs.manifests[0].shards]
    assert ours.digest == theirs.digest
    np.testing.assert_array_equal(values(str(copy), "sax", 4), values(large, "sax", 4))


def test_a_dataset_travels_as_its_paths_and_must_stay_the_same(copy: Path) -> None:
    sent = pickle.dumps(Reader(Dataset.of(str(copy)), "train"))
    assert len(sent) < 4000 + 40 * 8
    assert len(pickle.loads(sent)) == 8
    parts = [shards.finished_shard(str(copy), f"train-{n:05d}") for n in range(3)]
    write_manifest(str(copy), [part for part in parts if part], "float16", "test")
    with pytest.raises(DamagedShard, match="expected the dataset that training began with"):
        pickle.loads(sent)


def test_a_batch_survives_its_transport(wide: RunConfig, large: str) -> None:
    batch = collate(
        Dataset.of(large).reader("train", wide.data).samples([0, 3, 5]), wide, epoch=2, wanted=Wanted(("lvedv_ml",))
    )
    back = unpack(pack(batch), wide)
    assert back.stored.equal(batch.stored)
    assert back.meta.keys() == batch.meta.keys()
    assert all(back.meta[name].equal(batch.meta[name]) for name in batch.meta if name != "labels")
    assert back.meta["labels"].tolist() == [[0.0], [3.0], [5.0]]
    assert (back.shape, back.real, back.purpose) == (batch.shape, batch.real, batch.purpose)


@given(st.binary(max_size=80))
def test_any_bytes_are_a_header_or_refused(head: bytes) -> None:
    try:
        header = pages.parse_header(head)
    except pages.BadPage:
        return
    assert 0 < header.size <= len(head)
