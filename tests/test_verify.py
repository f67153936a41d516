"""Every kind of damage is one line with file, row group and remedy; a plan that breaks a promise is found out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import verify
from kmtr.config import RunConfig, override
from kmtr.data import shards
from kmtr.data.plan import Plan, Slot, Source
from kmtr.recipes import tiny
from kmtr.types import InputError, KmtrError

SHARD = "shards/train-00001.parquet"


@pytest.fixture
def copy(dataset: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def words(small: RunConfig, root: Path | str) -> list[str]:
    plain, said = override(tiny(), {}), []
    for section in ("data", "sampling", "model", "evaluate", "reconstruct", "align", "train"):
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
    assert not list(verify.damages(str(copy)))
    damage(copy / SHARD)
    (line,) = verify.damages(str(copy))
    assert line.startswith(f"{SHARD}: ")
    assert "\n" not in line
    assert "restore it from a copy" in line
    assert re.search(said, line), line


def test_all_damaged_files_are_listed_and_the_status_is_1(copy: Path, small: RunConfig, dataset: str) -> None:
    flip(copy / SHARD, 64)
    (copy / "shards/val-00000.parquet").unlink()
    with pytest.raises(KmtrError, match=r"2 damaged file\(s\)") as error:
        verify.run(words(small, copy))
    assert not isinstance(error.value, InputError)


def test_a_wrong_manifest_is_damage_and_a_missing_dataset_is_bad_input(copy: Path, tmp_path: Path) -> None:
    manifest = copy / "manifest.json"
    content = json.loads(manifest.read_text())
    for changed, said in (
        (content | {"digest": "0" * 64}, "its digest does not match its shards; write the dataset anew"),
        (content | {"schema_version": 99}, "expected schema version"),
    ):
        manifest.write_text(json.dumps(changed))
        (line,) = verify.damages(str(copy))
        assert said in line
        assert "manifest.json: " in line
    with pytest.raises(InputError, match="expected a dataset"):
        list(verify.damages(str(tmp_path / "none")))


def test_an_index_that_is_not_the_shard_s_is_found(copy: Path) -> None:
    index = copy / shards.index_name(SHARD)
    flip(index, 4)
    (line,) = verify.damages(str(copy))
    assert line.startswith(shards.index_name(SHARD))
    index.unlink()
    assert len(list(verify.damages(str(copy)))) == 1


def test_a_good_dataset_is_proved(small: RunConfig, dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify.run([*words(small, dataset), "plan.tail=pad", "verify.epochs=3"])
    assert (found["subjects"], found["steps_per_epoch"], found["epochs"]) == (24, 3, 3)
    assert found["workers"] == [1, 2, 4, 8]
    assert found["cursors"] == [0, 1, 2, 3, 4]
    assert (found["batch_shapes"], found["padding"]) == (1, 0)
    assert set(found["mixing"]) == {"distance", "near", "pairs", "chi_square"}
    said = capsys.readouterr().out
    assert "2 x 1 x 4 x 32 x 32" in said
    assert "relative to a full shuffle" in said
    assert json.dumps(found)
    with pytest.raises(InputError, match=r"data\.global_batch: expected a multiple of the 3 workers"):
        verify.run([*words(small, dataset), "verify.workers=1,3"])


@pytest.mark.slow
def test_the_command_ends_with_one_json_object_and_its_status(small: RunConfig, copy: Path) -> None:
    def call() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "jobs/verify.py", *words(small, copy)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    good = call()
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout.splitlines()[-1])["subjects"] == 24
    flip(copy / SHARD, 64)
    bad = call()
    assert bad.returncode == 1
    assert len([line for line in bad.stderr.splitlines() if line.startswith(f"damaged: {SHARD}")]) == 1
    shutil.rmtree(copy)
    assert call().returncode == 2


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
        return replace(slot, row=slot.row[1:], visit=slot.visit[1:], repeated=slot.repeated[1:]) if rank else slot


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
        verify.prove(partial(kind, plan.sources, 8), (1, 2, 4), 2)


def test_a_plan_that_remembers_is_found() -> None:
    """What another process would not do again."""
    seeds = iter(range(100))
    with pytest.raises(KmtrError, match="read another global batch after a restart at step 0"):
        verify.prove(lambda: Plan(order().sources, 8, seed=next(seeds)), (1,), 2)


def test_good_plans_are_proved() -> None:
    assert verify.prove(order, (1, 2, 4, 8), 2) == [0, 3, 5, 6]
    assert verify.prove(lambda: order(tail="pad"), (8,), 1) == [0, 3, 6]
    weighted = [replace(order().sources[0], weight=w) for w in (0.9, 0.1)]
    assert verify.prove(lambda: Plan(weighted, 10), (1, 5), 3)[0] == 0
