"""A study survives its row, damage is told apart and found, and nothing is copied or read that need not be."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cohort import simulated

from kmtr.config import RunConfig
from kmtr.data.dataset import SCHEMA_VERSION, record, shards
from kmtr.data.dataset.manifest import DamagedShard, digest_of, has_dataset, preflight, read_manifest, write_manifest
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.dataset.splits import SPLITS
from kmtr.types import COVARIATES, UNLABELLED, InputError, Study, View

ONES = np.ones((2, 1, 3, 8, 8), np.complex64)


@pytest.fixture(scope="module")
def study(small: RunConfig) -> Study:
    return simulated(0, small)


def table_of(study: Study, dtype: str) -> pa.Table:
    return pa.Table.from_pylist([record.to_row(study, dtype)], schema=record.schema(dtype))


def one_view(kspace: np.ndarray = ONES, sampled: np.ndarray | None = None) -> Study:
    return Study("p-1", {"sax": View(kspace, sampled=sampled)})


def rows_of(root: str, split: str = "train", columns: Sequence[str] | None = None, verify: str = "always") -> Reader:
    return Reader(Dataset.of(root), split, columns, verify)


# ---------------------------------------------------------------------------------------------------- Study <-> row


def test_float16_keeps_every_line(study: Study) -> None:
    back = record.to_study(table_of(study, "float16"))
    assert list(back.views) == list(study.views)
    for name, view in study.views.items():
        error = (abs(back.views[name].kspace - view.kspace) ** 2).sum(-1)
        assert (error / (abs(view.kspace) ** 2).sum(-1)).max() < 1e-6
    assert (back.subject_id, back.labels, back.source) == (study.subject_id, study.labels, study.source)


def test_float32_is_exact_and_so_is_all_beside_k_space(study: Study) -> None:
    sax = study.views["sax"]
    sampled = np.random.default_rng(0).random((2, 4, 32)) < 0.4
    assert sax.segmentation is not None
    segmentation = sax.segmentation.copy()
    segmentation[:, 1] = UNLABELLED
    affine = np.vstack([np.random.default_rng(1).normal(size=(3, 4)), (0, 0, 0, 1)])
    views = study.views | {
        "sax": replace(sax, sampled=sampled, segmentation=segmentation, contoured=(1, 3), affine=affine)
    }
    given = replace(study, views=views, vendor="Acme", field_strength_t=1.5)
    for dtype in ("float32", "float16"):
        back = record.to_study(table_of(given, dtype))
        np.testing.assert_array_equal(back.views["sax"].sampled, sampled)
        np.testing.assert_array_equal(back.views["sax"].segmentation, segmentation)
        assert back.views["sax"].contoured == (1, 3)
        np.testing.assert_array_equal(back.views["sax"].affine, affine)
        long = back.views["lax_4ch"]
        assert (long.sampled, long.contoured, long.affine) == (None, None, None)
        assert back.views["sax"].spacing_mm == sax.spacing_mm
        assert back.views["sax"].frame_time_s == sax.frame_time_s
        assert (back.vendor, back.field_strength_t) == ("Acme", 1.5)
        if dtype == "float32":
            np.testing.assert_array_equal(back.views["sax"].kspace, sax.kspace)


def test_what_is_not_known_stays_unknown() -> None:
    given = replace(one_view(), labels={"lvef_pct": float("nan"), "lvedv_ml": 120.0, "dcm": 0.0})
    table = table_of(given, "float16")
    assert table.column("lvef_pct").null_count == 1
    assert table.column("kspace_lax_2ch").null_count == 1
    back = record.to_study(table)
    assert back.labels == {"lvedv_ml": 120.0, "dcm": 0.0}
    assert list(back.views) == ["sax"]
    view = back.views["sax"]
    assert (view.sampled, view.segmentation, view.spacing_mm, view.frame_time_s) == (None, None, None, None)
    assert (back.vendor, back.field_strength_t, back.source) == (None, None, "")


@pytest.mark.parametrize("peak", [1e-20, 1e20])
def test_float16_does_not_depend_on_the_scanner_s_scale(study: Study, peak: float) -> None:
    kspace = study.views["sax"].kspace * np.float32(peak)
    back = record.to_study(table_of(Study("p-1", {"sax": View(kspace)}), "float16")).views["sax"].kspace
    wide = kspace.astype(complex)
    assert ((abs(back - wide) ** 2).sum(-1) / (abs(wide) ** 2).sum(-1)).max() < 1e-6


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_k_space_without_content_is_refused(value: float) -> None:
    kspace = np.zeros((2, 1, 3, 8, 8), np.complex64)
    kspace[0, 0, 0, 0, 0] = value
    with pytest.raises(InputError, match="k-space: expected finite values that are not all zero"):
        record.to_row(one_view(kspace=kspace), "float16")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("spoilt", ["sax", "lax_2ch", "lax_4ch"])
def test_a_value_that_is_not_finite_is_found_in_any_view(spoilt: str, value: float) -> None:
    views = {}
    for name in ("sax", "lax_2ch", "lax_4ch"):
        kspace = np.ones((2, 1, 3, 8, 8), np.complex64)
        kspace[1, 0, 2, 7, 7] = value if name == spoilt else 1
        views[name] = View(kspace)
    with pytest.raises(InputError, match="k-space: expected finite values"):
        record.to_row(Study("p-1", views), "float16")


def test_k_space_is_read_without_a_copy(dataset: str) -> None:
    table = rows_of(dataset).read([3])
    found = record.raw_kspace(table, 0, "sax")
    assert found is not None
    stored, scale = found
    assert (stored.dtype, stored.shape) == (np.float16, (2, 1, 4, 32, 32, 2))
    assert scale > 0
    assert not stored.flags.writeable
    memory = table.column("kspace_sax").chunk(0).buffers()[2]
    first = stored.__array_interface__["data"][0]
    assert memory.address <= first
    assert first + stored.nbytes <= memory.address + memory.size


# ------------------------------------------------------------------------------------------------------------- files


def bytes_read() -> int:
    """By this process so far, whatever the cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of the bytes that a process read")
def test_a_view_that_is_not_asked_for_costs_nothing(small: RunConfig, tmp_path: Path) -> None:
    big = np.random.default_rng(0).standard_normal((4, 1, 8, 64, 64)).astype(np.complex64)
    studies = [Study(f"p-{i}", {"sax": View(big), "lax_4ch": View(big[:1, :, :, :8, :8].copy())}) for i in range(4)]
    part = shards.write_shard(str(tmp_path), "train-0", "train", studies, "float32")
    write_manifest(str(tmp_path), [part], "float32", "test")
    reader = rows_of(str(tmp_path), columns=record.columns_of(("lax_4ch",)))
    reader.read([0])  # the footer
    before = bytes_read()
    table = reader.read([2])
    assert bytes_read() - before < big[:1, :, :, :8, :8].nbytes + 4096 < big.nbytes / 10
    assert record.raw_kspace(table, 0, "sax") is None
    assert list(record.to_study(table).views) == ["lax_4ch"]


def test_rows_come_in_the_order_asked_for(dataset: str) -> None:
    reader = rows_of(dataset, columns=["subject_id"])
    assert len(reader) == 24
    for rows in ([0, 1, 2], [23, 0, 15, 16], [5, 5], np.array([17])):
        ids = reader.read(rows).column("subject_id").to_pylist()
        assert ids == [f"sim-0-{row:07d}" for row in rows]
    assert rows_of(dataset, split="val").read([0]).column("subject_id").to_pylist() == ["sim-0-0000024"]


def test_big_subjects_have_a_row_group_each_and_small_ones_share(tmp_path: Path, dataset: str) -> None:
    kspace = np.ones((2, 1, 4, 128, 128), np.complex64)
    studies = [Study(f"p-{i}", {"sax": View(kspace)}) for i in range(3)]
    shard, _ = shards.write_shard(str(tmp_path), "train-0", "train", studies, "float32")
    assert (shard.rows, shard.row_groups) == (3, 3)
    assert [s.row_groups for s in read_manifest(dataset).shards if s.split == "train"] == [1, 1]


def test_a_manifest_comes_back_and_says_what_is_there(dataset: str, tmp_path: Path) -> None:
    manifest = read_manifest(dataset)
    assert {split: manifest.rows(split) for split in SPLITS} == {"train": 24, "val": 12, "test": 12}
    assert manifest.shapes == {"sax": [[2, 1, 4, 32, 32]], "lax_4ch": [[1, 1, 4, 32, 32]]}
    assert manifest.labels["lvef_pct"] == 48
    assert manifest.undersampled == ()
    preflight(dataset, manifest)
    assert has_dataset(dataset)
    assert not has_dataset(str(tmp_path))
    sampled = np.ones((2, 3, 8), bool)
    part = shards.write_shard(str(tmp_path), "train-0", "train", [one_view(sampled=sampled), one_view()], "float32")
    written = write_manifest(str(tmp_path), [part], "float32", "test")
    assert written.undersampled == ("sax",)
    assert read_manifest(str(tmp_path)) == written
    assert written.digest != manifest.digest


def test_the_digest_follows_the_data_alone(tmp_path: Path) -> None:
    digests = set()
    for folder, study, dtype in (
        ("a", one_view(), "float32"),
        ("b", one_view(), "float32"),
        ("c", one_view(kspace=np.full((2, 1, 3, 8, 8), 2, np.complex64)), "float32"),
        ("d", one_view(), "float16"),
    ):
        part = shards.write_shard(str(tmp_path / folder), "train-0", "train", [study], dtype)
        digests.add(write_manifest(str(tmp_path / folder), [part], dtype, folder).digest)
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: "{", "invalid content"),
        (lambda m: json.dumps({k: v for k, v in m.items() if k != "digest"}), "invalid content"),
        (lambda m: json.dumps(m | {"schema_version": 99}), "expected schema version 1 to 4, got 99"),
        (lambda m: json.dumps(m | {"surprise": 1}), "invalid content"),
        (lambda m: json.dumps(m | {"shards": m["shards"][1:]}), "digest does not match"),
    ],
)
def test_a_spoilt_manifest_is_one_line(copy: Path, change: Callable[[dict], str], said: str) -> None:
    path = copy / "manifest.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(InputError, match=said) as error:
        read_manifest(str(copy))
    assert "\n" not in str(error.value)


def test_a_folder_without_a_dataset_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a dataset"):
        read_manifest(str(tmp_path))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A dataset to be damaged: two shards of two subjects."""
    parts = []
    for n in range(2):
        studies = [replace(one_view(), subject_id=f"p-{n}{i}") for i in range(2)]
        parts.append(shards.write_shard(str(tmp_path), f"train-{n}", "train", studies, "float32"))
    write_manifest(str(tmp_path), parts, "float32", "test")
    return tmp_path


def spoil_footer(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8:-4] = (2**30).to_bytes(4, "little")  # length of the footer
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "got no file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated or changed"),
        (lambda path: path.write_bytes(path.read_bytes() + b"0"), "truncated or changed"),
        (spoil_footer, "expected a Parquet footer"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "expected a Parquet footer"),
    ],
)
def test_preflight_names_the_damaged_shard(copy: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(copy / "shards" / "train-1.parquet")
    with pytest.raises(InputError, match=said) as error:
        preflight(str(copy), read_manifest(str(copy)))
    assert str(error.value).startswith("shards/train-1.parquet: ")
    assert "\n" not in str(error.value)


def test_a_flipped_byte_is_found_by_whoever_reads_it(copy: Path) -> None:
    path = copy / "shards" / "train-1.parquet"
    content = bytearray(path.read_bytes())
    payload = np.ones((2, 1, 3, 8, 8), np.complex64).tobytes()
    content[content.index(payload) + 1000] ^= 1
    path.write_bytes(content)
    preflight(str(copy), read_manifest(str(copy)))
    reader = rows_of(str(copy))
    assert len(reader.read([0, 1])) == 2  # the other shard
    with pytest.raises(DamagedShard, match=r"shards/train-1\.parquet, row group 0: expected readable pages") as error:
        reader.read([2])
    assert "\n" not in str(error.value)
    with pytest.raises(DamagedShard):
        rows_of(str(copy), columns=record.columns_of(("sax",))).read([2])
    assert len(rows_of(str(copy), verify="never").read([2])) == 1


def test_a_file_lost_while_training_is_a_damaged_shard(copy: Path) -> None:
    reader = rows_of(str(copy))
    (copy / "shards" / "train-1.parquet").unlink()
    with pytest.raises(DamagedShard, match=r"shards/train-1\.parquet"):
        reader.read([2])


def test_a_finished_shard_is_found_again(copy: Path) -> None:
    found = shards.finished_shard(str(copy), "train-1")
    assert found is not None
    assert found[0] == read_manifest(str(copy)).shards[1]
    assert found[1]["subject_shapes"] == [{"sax": [2, 1, 3, 8, 8]}]
    assert shards.finished_shard(str(copy), "train-2") is None
    (copy / "shards" / "train-1.parquet").unlink()
    assert shards.finished_shard(str(copy), "train-1") is None


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def studies() -> Iterator[Study]:
        yield one_view()
        raise InputError("no more")

    with pytest.raises(InputError, match="no more"):
        shards.write_shard(str(tmp_path), "train-0", "train", studies(), "float32")
    assert not list((tmp_path / "shards").iterdir())
    empty, summary = shards.write_shard(str(tmp_path), "train-0", "train", [], "float32")
    assert (empty.rows, summary["subject_shapes"]) == (0, [])
    assert not list((tmp_path / "shards").iterdir())


KILLED = """
import resource, signal, sys
import numpy as np
from kmtr.data.dataset import record, shards
from kmtr.data.dataset.manifest import DamagedShard, digest_of, has_dataset, preflight, read_manifest, write_manifest
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.types import Study, View
study = Study("p-1", {"sax": View(np.ones((2, 1, 3, 64, 64), np.complex64))})
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # the kernel kills whoever writes more
shards.write_shard(sys.argv[1], "train-0", "train", [study], "float32")
"""


def test_a_writer_killed_while_it_writes_leaves_no_file_that_looks_whole(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, timeout=60)
    assert ended.returncode < 0, ended.stderr.decode()
    left = [path.name for path in (tmp_path / "shards").iterdir()]
    assert left  # it died in the middle of writing ...
    assert all(name.endswith(".tmp") for name in left)  # ... under a name that nobody reads
    assert shards.finished_shard(str(tmp_path), "train-0") is None
    assert not has_dataset(str(tmp_path))


# ------------------------------------------------------------------------------------------------- earlier versions


def as_version(root: Path, version: int) -> None:
    """What that version wrote: without what came later, in the files and in the manifest."""
    later = [name for name in record.schema("float32").names if name.startswith("affine_")]
    if version < 3:
        later += [name for name in record.schema("float32").names if name.startswith("contoured_")]
        later += ["wall_thickness_max_mm", "thickening_min_pct", "gcs_pct", "dilated_atria", *COVARIATES]
    content = json.loads((root / "manifest.json").read_text())
    for shard in content["shards"]:
        path = root / shard["name"]
        table = pq.read_table(path).drop_columns(later)
        metadata = dict(table.schema.metadata) | {b"kmtr.schema_version": str(version).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=1, compression="none")
        shard |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        shard |= {"row_groups": len(table), "groups": [[len(table), 1]], "index": ""}
        path.with_suffix(".index").unlink()
        if version == 1:
            del shard["groups"], shard["shapes"], shard["index"]
    if version == 1:
        content["shapes"] = {"sax": [s["sax"] for s in content.pop("subject_shapes")]}
    content["schema_version"] = version
    content["digest"] = digest_of(s["split"] + s["sha256"] for s in content["shards"])
    (root / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_earlier_versions_are_read_and_mix_with_today_s(copy: Path, tmp_path: Path, version: int) -> None:
    new = tmp_path / "new"
    view = replace(one_view().views["sax"], contoured=(1, 2), affine=np.eye(4))
    study = Study("p-new", {"sax": view}, {"gcs_pct": -18.0, "male": 1.0})
    part = shards.write_shard(str(new), "train-0", "train", [study], "float32")
    write_manifest(str(new), [part], "float32", "test")
    as_version(copy, version)
    manifest = read_manifest(str(copy))
    assert (manifest.schema_version, manifest.rows("train")) == (SCHEMA_VERSION, 4)
    assert shards.splits_of(str(copy), manifest) == dict.fromkeys(("p-00", "p-01", "p-10", "p-11"), "train")
    reader = Reader(Dataset.of(str(copy), str(new)), "train")
    for columns in (None, ["subject_id", "gcs_pct"]):
        reader.columns = columns
        table = reader.read([0, 4, 3])
        assert table.column("gcs_pct").to_pylist() == [None, -18.0, None]
    reader.columns = None
    old, today = (record.to_study(reader.read([row])) for row in (0, 4))
    assert old.views["sax"].contoured is None
    assert (old.views["sax"].affine, today.views["sax"].affine is None) == (None, False)
    assert (today.views["sax"].contoured, today.labels) == ((1, 2), study.labels)
    np.testing.assert_array_equal(old.views["sax"].kspace, ONES)
    meta = reader.samples([0, 4]).meta
    assert meta.column("male").to_pylist() == [None, 1.0]
    assert meta.schema.metadata[b"kmtr.schema_version"] == str(SCHEMA_VERSION).encode()


def test_a_label_that_is_no_number_is_refused() -> None:
    with pytest.raises(InputError, match="lvef_pct: expected a finite number"):
        record.to_row(replace(one_view(), labels={"lvef_pct": float("inf")}), "float16")


def test_row_groups_hold_no_more_than_their_size_whatever_the_first_subject(tmp_path: Path) -> None:
    sizes = [8, 8, 512, 256, 256, 8]
    studies = [Study(f"p-{i}", {"sax": View(np.ones((1, 1, 1, n, n), np.complex64))}) for i, n in enumerate(sizes)]
    shard, _ = shards.write_shard(str(tmp_path), "train-0", "train", studies, "float32")
    assert shard.groups == ((1, 2), (1, 1), (1, 2), (1, 1))


def test_another_command_s_shards_are_not_gone_on_with(tmp_path: Path) -> None:
    shards.write_shard(str(tmp_path), "train-0", "train", [one_view()], "float32", made="one")
    refused = [{"subject": "p-2", "reason": "no"}]
    shards.write_shard(str(tmp_path), "train-1", "train", [], "float32", made="one", refused=refused)
    for name in ("train-0", "train-1"):
        found = shards.finished_shard(str(tmp_path), name, "one")
        assert found is not None
        assert found[1]["refused"] == (refused if name == "train-1" else [])
        with pytest.raises(InputError, match=f"unfinished dataset of another command or version .shards/{name}."):
            shards.finished_shard(str(tmp_path), name, "two")
