"""Every kind of damage is one line with file, row group and remedy; a plan that breaks a promise is found out."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cohort import write

from jobs import main
from jobs import verify as job
from kmtr.config import RunConfig, override
from kmtr.config.recipes import tiny
from kmtr.data.dataset import content, record, shards
from kmtr.data.dataset.damage import damages
from kmtr.data.dataset.manifest import digest_of, read_manifest
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import planning
from kmtr.data.loader.order import Plan, Slot, Source
from kmtr.data.loader.proof import prove
from kmtr.doctor import verify
from kmtr.physics.fourier import fft2c, ifft2c
from kmtr.types import LABELS, InputError, KmtrError, Study, View

SHARD = "shards/train-00001.parquet"


@pytest.fixture
def copy(dataset: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def words(small: RunConfig, root: Path | str) -> list[str]:
    plain, said = override(tiny(), {}), []
    for section in ("data", "sampling", "model", "evaluate", "masked", "align", "train"):
        for name, value in getattr(small, section):
            if value != getattr(getattr(plain, section), name) and f"{section}.{name}" != "data.root":
                text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                said.append(f"{section}.{name}={text}")
    return ["tiny", *said, f"data.root={root}"]


def flip(path: Path, count: int) -> None:
    """Some payload bytes in the middle of the file."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + count] = bytes(byte ^ 255 for byte in content[middle : middle + count])
    path.write_bytes(content)


def zero(path: Path, first: float, count: int) -> None:
    content = bytearray(path.read_bytes())
    start = int(first * len(content))
    content[start : start + count] = bytes(count)
    path.write_bytes(content)


def schema_version(path: Path) -> None:
    """A shard that another version wrote, at the size and place of this one."""
    table = pq.read_table(path)
    other = dict(table.schema.metadata) | {b"kmtr.schema_version": b"99"}
    pq.write_table(table.replace_schema_metadata(other), path)
    manifest = path.parents[1] / "manifest.json"
    content = json.loads(manifest.read_text())
    for shard in content["shards"]:
        if shard["name"] == SHARD:
            shard["bytes"] = path.stat().st_size
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "all row groups .*expected .* bytes, got"),
        (Path.unlink, "all row groups: the file is missing"),
        (lambda path: zero(path, 0, 64), "row group 0: SHA-256"),
        (lambda path: zero(path, 0.5, 4096), "row group 0: SHA-256"),
        (lambda path: flip(path, 64), "row group 0: SHA-256"),
        (lambda path: flip(path, 1), "row group 0: SHA-256"),
        (lambda path: zero(path, 0, 4), "outside of the row groups: SHA-256"),
        (schema_version, "all row groups of schema version 99: SHA-256"),
    ],
)
def test_each_damage_is_one_line_with_file_row_group_and_remedy(
    copy: Path, damage: Callable[[Path], object], said: str
) -> None:
    assert not list(damages(str(copy)))
    damage(copy / SHARD)
    (line,) = damages(str(copy))
    assert line.startswith(f"{SHARD}: ")
    assert "\n" not in line
    assert "restore it from a copy" in line
    assert re.search(said, line), line


def test_all_damaged_files_are_listed_and_the_status_is_1(copy: Path, small: RunConfig, dataset: str) -> None:
    flip(copy / SHARD, 64)
    (copy / "shards/val-00000.parquet").unlink()
    with pytest.raises(KmtrError, match=r"2 damaged file\(s\)") as error:
        job.run(words(small, copy))
    assert not isinstance(error.value, InputError)


def test_a_wrong_manifest_is_damage_and_a_missing_dataset_is_bad_input(copy: Path, tmp_path: Path) -> None:
    manifest = copy / "manifest.json"
    content = json.loads(manifest.read_text())
    for changed, said in (
        (content | {"digest": "0" * 64}, "its digest does not match its shards; write the dataset anew"),
        (content | {"schema_version": 99}, "expected schema version"),
    ):
        manifest.write_text(json.dumps(changed))
        (line,) = damages(str(copy))
        assert said in line
        assert "manifest.json: " in line
    with pytest.raises(InputError, match="expected a dataset"):
        list(damages(str(tmp_path / "none")))


def test_an_index_that_is_not_the_shard_s_is_found(copy: Path) -> None:
    index = copy / shards.index_name(SHARD)
    flip(index, 4)
    (line,) = damages(str(copy))
    assert line.startswith(shards.index_name(SHARD))
    index.unlink()
    assert len(list(damages(str(copy)))) == 1


def test_a_good_dataset_is_proved(small: RunConfig, dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = job.run([*words(small, dataset), "plan.tail=pad", "verify.epochs=3"])
    assert (found["subjects"], found["steps_per_epoch"], found["epochs"]) == (24, 3, 3)
    assert found["workers"] == [1, 2, 4, 8]
    assert found["cursors"] == [0, 1, 2, 3, 4]
    assert (found["batch_shapes"], found["padding"]) == (1, 0)
    assert set(found["mixing"]) == {"distance", "near", "pairs", "chi_square"}
    assert (found["doubtful"], found["ef_of_masks_points"]) == ({}, None)  # two slices say nothing about volumes
    for name in ("contact_sheet", "histograms", "sampling"):
        assert Path(found[name]).read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "2 x 1 x 4 x 32 x 32" in said
    assert "relative to a full shuffle" in said
    assert json.dumps(found)
    opened = Dataset.of(dataset)
    with pytest.raises(InputError, match=r"data\.global_batch: expected a multiple of the 3 workers"):
        verify.proved(override(small, {"verify.workers": (1, 3)}), opened, planning.plan_of(small, opened))


@pytest.mark.slow
def test_the_command_ends_with_one_json_object_and_its_status(
    small: RunConfig, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["jobs/verify.py", *words(small, copy)]
    good = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout.splitlines()[-1])["subjects"] == 24

    def status() -> object:
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            main(job.__doc__ or "", job.run)
        return end.value.code

    flip(copy / SHARD, 64)
    assert status() == 1
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith(f"damaged: {SHARD}")]) == 1
    shutil.rmtree(copy)
    assert status() == 2


# ----------------------------------------------------------------------------------------------------------- content


def study(number: int, **changes: Any) -> Study:
    """A subject whose masks hold half of the cavity at end-systole."""
    rng = np.random.default_rng(number)
    kspace = rng.standard_normal((3, 1, 4, 16, 16, 2), np.float32).view(np.complex64)[..., 0]
    segmentation = np.zeros((3, 4, 16, 16), np.uint8)
    segmentation[:, :, 4:12, 4:12] = 1
    segmentation[:, 2, 4:8] = 0
    segmentation[0, 0, 0, number % 16] = 2
    view = View(kspace, segmentation=segmentation, spacing_mm=(20.0, 4.0, 4.0))
    labels = {"lvedv_ml": 61.0, "lvesv_ml": 30.5, "lvsv_ml": 30.5, "lvef_pct": 50.0, "dcm": 0.0, "male": 1.0}
    kept = {key: value for key, value in changes.items() if key not in LABELS}
    labels |= {key: value for key, value in changes.items() if key in LABELS}
    return Study(f"p-{kept.pop('name', number)}", {"sax": replace(view, **kept)}, labels)


def found_in(root: Path, subjects: dict[str, list[Study]]) -> content.Findings:
    write(root, subjects)
    dataset = Dataset.of(str(root))
    return content.judge(verify.contents(dataset), dataset.manifests)


def test_a_good_dataset_has_no_findings_and_its_energies_agree(dataset: str, tmp_path: Path) -> None:
    inspected = [c for _, c in verify.contents(Dataset.of(dataset))]
    findings = content.judge(verify.contents(Dataset.of(dataset)), Dataset.of(dataset).manifests)
    assert (findings.wrong, findings.doubtful) == ({}, {})
    assert 0 < max(c.parseval for c in inspected) < 1e-4
    ours = found_in(tmp_path, {"train": [study(n) for n in range(4)]})
    assert (ours.wrong, ours.doubtful) == ({}, {})
    assert content.ef_error([c for _, c in verify.contents(Dataset.of(str(tmp_path)))]) == pytest.approx(0)


SPOILT: list[tuple[str, str, dict[str, list[Study]]]] = [
    ("wrong", "lvef_pct, expected 3 to 95 %: p-1 has 0.6", {"train": [study(0), study(1, lvef_pct=0.6)]}),
    ("wrong", "dcm, expected 0 or 1: p-1 has 2", {"train": [study(1, dcm=2.0)]}),
    ("wrong", "age_y, expected 0 to 120 years: p-1 has -9", {"train": [study(1, age_y=-9.0)]}),
    ("wrong", "lvesv_ml above lvedv_ml: p-1", {"train": [study(1, lvesv_ml=90.0)]}),
    ("doubtful", "lvsv_ml is not the difference of the volumes: p-1", {"train": [study(1, lvsv_ml=40.0)]}),
    ("doubtful", "lvef_pct is not the volumes' ejection fraction: p-1", {"train": [study(1, lvef_pct=60.0)]}),
    ("doubtful", "lvef_pct is not the masks': p-1 has 80, its masks 50", {"train": [study(1, lvef_pct=80.0)]}),
    (
        "doubtful",
        "lvedv_ml is not the masks': p-1 has 164, its masks 61",
        {"train": [study(1, lvedv_ml=164.0, lvesv_ml=82.0, lvsv_ml=82.0)]},
    ),
    (
        "wrong",
        "a subject comes twice: p-1 in test of dataset 1, p-1 in train of dataset 1",
        {"train": [study(1)], "test": [study(2, name=1)]},
    ),
    (
        "wrong",
        "two subjects have the same k-space: p-1 in train of dataset 1, p-x in val of dataset 1",
        {"train": [study(1)], "val": [study(1, name="x")]},
    ),
    (
        "wrong",
        "unknown segmentation values: p-1 in shards/train-00000.parquet, sax: [7]",
        {"train": [study(1, segmentation=np.full((3, 4, 16, 16), 7, np.uint8))]},
    ),
    (
        "wrong",
        "classes that the source is said not to draw: p-1 in shards/train-00000.parquet, sax: lv_cavity",
        {"train": [study(1, contoured=(2, 3))]},
    ),
    (
        "doubtful",
        "spacing that no scan has: p-1 in shards/train-00000.parquet, sax: [20.0, 4000.0, 4.0]",
        {"train": [study(1, spacing_mm=(20.0, 4000.0, 4.0), lvedv_ml=math.nan)]},
    ),
    (
        "doubtful",
        "frame time outside of (0.002, 0.5) s: p-1 in shards/train-00000.parquet, sax: 40",
        {"train": [study(1, frame_time_s=40.0)]},
    ),
]


@pytest.mark.parametrize(("kind", "line", "subjects"), SPOILT, ids=[line.partition(":")[0] for _, line, _ in SPOILT])
def test_wrong_values_are_told_by_subject(
    tmp_path: Path, kind: str, line: str, subjects: dict[str, list[Study]]
) -> None:
    findings = found_in(tmp_path, subjects)
    assert line in list(findings.lines(getattr(findings, kind)))


def rewrite(root: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The only shard with other values, and the manifest made to fit."""
    path = root / "shards/train-00000.parquet"
    table = pq.read_table(path)
    columns = change({name: table.column(name).to_pylist() for name in table.column_names})
    fields = [table.schema.field(n) for n in columns if n in table.column_names]
    pq.write_table(pa.table({f.name: columns[f.name] for f in fields}, pa.schema(fields, table.schema.metadata)), path)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["shards"][0] |= {"bytes": path.stat().st_size, "index": "", "row_groups": 1, "groups": [[1, 2]]}
    manifest["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["digest"] = digest_of(s["split"] + s["sha256"] for s in manifest["shards"])
    (root / "manifest.json").write_text(json.dumps(manifest))


def first(columns: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return columns | {name: [value, *columns[name][1:]] for name, value in changes.items()}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda c: first(c, kspace_sax=np.full(6144, np.nan, np.float16).tobytes()),
            "k-space holds values that are not",
        ),
        (lambda c: first(c, kspace_sax=bytes(12288)), "k-space is nothing but zeros: p-0"),
        (lambda c: first(c, kspace_sax=bytes(100)), "k-space is not of its shape: p-0"),
        (lambda c: first(c, segmentation_sax=bytes(100)), "the segmentation is not of the image's shape: p-0"),
        (lambda c: first(c, acquired_sax=bytes(3)), "the pattern is not of the k-space's shape: p-0"),
        (lambda c: first(c, affine_sax=[1.0, 0.0]), "the affine is not of 3 x 4 finite numbers: p-0"),
        (lambda c: first(c, lvef_pct=None), "counts: lvef_pct: 1 subjects have it, the manifest says 2"),
        (lambda c: first(c, shape_sax=[3, 1, 4, 8, 32]), "counts: shards/train-00000.parquet: rows or shapes are not"),
        (
            lambda c: {n: v for n, v in c.items() if n != "vendor"},
            "schema: shards/train-00000.parquet: no column vendor",
        ),
    ],
)
def test_what_no_writer_of_ours_leaves_is_found(tmp_path: Path, change: Callable[[Any], Any], line: str) -> None:
    write(tmp_path, {"train": [study(0), study(1)]})
    rewrite(tmp_path, change)
    assert not list(damages(str(tmp_path)))
    dataset = Dataset.of(str(tmp_path))
    findings = content.judge(verify.contents(dataset), dataset.manifests)
    assert any(said.startswith(line) for said in findings.lines(findings.wrong)), findings.wrong


def test_content_that_is_wrong_ends_with_status_1_and_pictures_all_the_same(
    small: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "data", {"train": [study(n, lvef_pct=0.5) for n in range(9)]})
    said = [*words(small, tmp_path / "data"), f"storage.root={tmp_path / 'runs'}", "data.views=sax"]
    said = [word for word in said if not word.startswith("data.views=sax,")]
    with pytest.raises(KmtrError, match=r"9 wrong value\(s\) of 1 kind\(s\)") as error:
        job.run(said)
    assert not isinstance(error.value, InputError)
    assert "p-4 has 0.5, and 4 more" in capsys.readouterr().err
    drawn = {path.name for path in (tmp_path / "runs").glob("verify-*/*.png")}
    assert drawn == {"contact_sheet.png", "histograms.png", "sampling.png"}


def test_memory_follows_a_row_group_not_the_dataset(tmp_path: Path) -> None:
    kspace = np.ones((2, 1, 8, 128, 128), np.complex64)
    for count in (2, 12):
        write(tmp_path / str(count), {"train": [Study(f"p-{n}", {"sax": View(kspace)}) for n in range(count)]})
    peaks = []
    for count in (2, 12):
        manifest = read_manifest(str(tmp_path / str(count)))
        tracemalloc.start()
        content.inspect(str(tmp_path / str(count)), manifest.shards[0], manifest.subject_shapes)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


# ------------------------------------------------------------------------------------------------------ broken plans


def order(**options: str) -> Plan:
    return Plan([Source(50, np.array([[50, 1]]), np.array([[50, 0]]))], 8, **options)  # type: ignore[arg-type]


class Twice(Plan):
    """One subject twice in an epoch."""

    def share(self, step: int, rank: int, world: int) -> Slot:
        slot = super().share(step, rank, world)
        first = Plan.share(self, 0, 0, 1).row[0]
        return replace(slot, row=np.where(np.arange(len(slot)) + rank == 0, first, slot.row))


class Uneven(Plan):
    """The last of several workers has another row than the global batch."""

    def share(self, step: int, rank: int, world: int) -> Slot:
        slot = super().share(step, rank, world)
        return replace(slot, row=slot.row[::-1].copy()) if rank else slot


class Short(Plan):
    """The last of several workers lacks a row."""

    def share(self, step: int, rank: int, world: int) -> Slot:
        slot = super().share(step, rank, world)
        return replace(slot, row=slot.row[1:], epoch=slot.epoch[1:], repeated=slot.repeated[1:]) if rank else slot


class Lossy(Plan):
    """Flags a row as a repeat that is none: it would never count."""

    def share(self, step: int, rank: int, world: int) -> Slot:
        slot = super().share(step, rank, world)
        return replace(slot, repeated=np.ones(len(slot), bool)) if step == 1 else slot


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Twice, "a subject comes twice in one pass"),
        (Uneven, "step 0: 2 workers read another global batch"),
        (Short, "step 0: 2 workers do not have shares of one size"),
        (Lossy, "the epoch that ends at step 5 lacks 10 of 50 draws"),
    ],
)
def test_a_broken_promise_is_found(kind: type[Plan], said: str) -> None:
    plan = order()
    with pytest.raises(KmtrError, match=said):
        prove(partial(kind, plan.sources, 8), (1, 2, 4), 2)


def test_a_plan_that_remembers_is_found() -> None:
    """What another process would not do again."""
    seeds = iter(range(100))
    with pytest.raises(KmtrError, match="read another global batch after a restart at step 0"):
        prove(lambda: Plan(order().sources, 8, seed=next(seeds)), (1,), 2)


def test_good_plans_are_proved() -> None:
    assert prove(order, (1, 2, 4, 8), 2) == [0, 3, 5, 6]
    assert prove(lambda: order(tail="pad"), (8,), 1) == [0, 3, 6]
    weighted = [replace(order().sources[0], weight=w) for w in (0.9, 0.1)]
    assert prove(lambda: Plan(weighted, 10), (1, 5), 3)[0] == 0


def test_contours_and_images_of_another_subject_are_doubtful(tmp_path: Path) -> None:
    one, other, third = study(1), study(2), study(3)
    view = one.views["sax"]
    turned = replace(view, kspace=view.kspace * np.complex64(1j), segmentation=other.views["sax"].segmentation)
    found = found_in(tmp_path, {"train": [one, other], "test": [replace(third, views={"sax": turned})]})
    assert found.doubtful["two subjects have the same images"] == ["p-1, p-3"]
    assert found.doubtful["two subjects have the same contours"] == [
        "p-2 in train of dataset 1, p-3 in test of dataset 1"
    ]
    assert not found.wrong


def test_masks_away_from_the_cohort_s_are_doubtful(tmp_path: Path) -> None:
    studies = [study(n) for n in range(content.ENOUGH)]
    view = studies[3].views["sax"]
    assert view.segmentation is not None
    studies[3] = replace(studies[3], views={"sax": replace(view, segmentation=np.roll(view.segmentation, 4, -1))})
    found = found_in(tmp_path, {"train": studies})
    assert [case.partition(":")[0] for case in found.doubtful["masks are not where the cohort's are"]] == ["p-3"]


def test_a_pattern_from_a_file_is_drawn(small: RunConfig, dataset: str, tmp_path: Path) -> None:
    pattern = np.zeros((4, 32), dtype=np.uint8)
    pattern[:, ::4] = 1
    np.save(tmp_path / "pattern.npy", pattern)
    changes = ["sampling.family=file", f"sampling.file={tmp_path / 'pattern.npy'}"]
    rates = [f"{section}.accelerations=4" for section in ("sampling", "evaluate")]
    kept = [word for word in words(small, dataset) if ".accelerations=" not in word]
    said = job.run([*kept, *changes, *rates, f"storage.root={tmp_path}"])
    assert Path(said["sampling"]).is_file()
    assert "not_proved" not in said


def test_a_dataset_is_verified_without_settings_that_fit_training(
    small: RunConfig, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [word for word in words(small, dataset) if not word.startswith("data.global_batch=")]
    said = job.run([*kept, "data.global_batch=64", f"storage.root={tmp_path}"])
    assert said["digest"] == Dataset.of(dataset).digest
    assert said["not_proved"] in capsys.readouterr().out
    assert "ef_of_masks_points" in said


def test_few_frames_of_a_heartbeat_are_no_doubt(tmp_path: Path) -> None:
    """Taken evenly, they are far apart, and end-systole may lie between them."""
    segmentation = study(1).views["sax"].segmentation
    assert segmentation is not None
    pair = {"kspace": study(1).views["sax"].kspace[:, :, :2], "segmentation": segmentation[:, ::2], "lvef_pct": 80.0}
    ours = {"lvesv_ml": 12.2, "lvsv_ml": 48.8, **pair}
    assert not found_in(tmp_path / "even", {"train": [study(1, frame_time_s=0.6, **ours)]}).doubtful
    two = found_in(tmp_path / "chosen", {"train": [study(1, **ours)]}).doubtful
    assert list(two) == ["lvef_pct is not the masks'"]


def smooth(number: int, **changes: Any) -> Study:
    """`study` with the k-space of an object that fills half of the image, and a little noise; 64 x 64."""
    rng = np.random.default_rng(number)
    image = np.zeros((3, 1, 4, 64, 64), np.complex64)
    image[..., 16:48, 20:44] = np.exp(0.3j)
    noise = rng.standard_normal((*image.shape, 2)).astype(np.float32).view(np.complex64)[..., 0]
    kspace = (fft2c(image) + 0.02 * noise).astype(np.complex64)
    return study(number, **{"segmentation": None, "kspace": kspace} | changes)


def test_k_space_that_is_none_or_elsewhere_is_doubtful(tmp_path: Path) -> None:
    kspace = smooth(1).views["sax"].kspace
    spoilt = {
        "line": np.roll(kspace, 20, -2),
        "corner": np.fft.fftshift(kspace, (-2, -1)),
        "image": ifft2c(kspace),
        "magnitude": np.abs(kspace).astype(np.complex64),
    }
    good = [smooth(2), smooth(3, kspace=np.roll(smooth(3).views["sax"].kspace, 1, -2)), study(4)]
    found = found_in(tmp_path, {"train": [*good, *(smooth(9, name=name, kspace=k) for name, k in spoilt.items())]})
    (cases,) = (cases for kind, cases in found.doubtful.items() if kind == "k-space that is none, or is elsewhere")
    assert [case.partition(" in ")[0] for case in cases] == [f"p-{name}" for name in spoilt]


def test_frames_without_a_central_line_are_counted_and_no_doubt(tmp_path: Path) -> None:
    sampled = np.ones((3, 4, 64), bool)
    sampled[1, 2, 24:40] = sampled[2, 0, 24:40] = False
    kspace = smooth(1).views["sax"].kspace * sampled[:, None, ..., None]
    write(tmp_path, {"train": [smooth(1, kspace=kspace, sampled=sampled), study(2)]})
    dataset = Dataset.of(str(tmp_path))
    inspected = verify.contents(dataset)
    assert sum(shard.centreless for _, shard in inspected) == 2
    assert not content.judge(inspected, dataset.manifests).doubtful


@pytest.mark.parametrize(
    ("version", "gone", "found"),
    [
        (4, "affine_", 4),
        (3, "affine_", 0),
        (3, "contoured_", 4),
        (2, "contoured_", 0),
        (2, "spacing_mm_", 4),
        (1, "gcs_pct", 0),
    ],
)
def test_shards_of_an_earlier_version_lack_what_came_later_alone(version: int, gone: str, found: int) -> None:
    whole = record.schema("float32")
    metadata = whole.metadata | {b"kmtr.schema_version": str(version).encode()}
    some = pa.schema([field for field in whole if not field.name.startswith(gone)], metadata=metadata)
    assert len([line for line in content.schema_errors(some) if line.startswith(f"no column {gone}")]) == found
