"""Writing goes on after any kill with the same bytes, one bad subject costs only itself, and a report names it."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killed_command import killed_when

from jobs import ingest, simulate
from kmtr.config import Shards
from kmtr.data.dataset import record, shards, splits, writing
from kmtr.data.dataset.ingest import without_names
from kmtr.data.dataset.manifest import has_dataset, read_manifest
from kmtr.data.dataset.ray import Ledger, write_dataset
from kmtr.data.dataset.storage import StoreError
from kmtr.data.sources import Item, pseudonym
from kmtr.types import InputError, Study, View

COHORT = ["tiny", "data.views=sax", "data.sax_slices=1", "data.frames=2", "data.matrix=32,32", "model.patch=2,8,8"]
COHORT += ["sampling.accelerations=2", "evaluate.accelerations=2", "shards.rows=4"]


class Memory:
    """A journal in one process."""

    def __init__(self) -> None:
        self.begun: dict[int, int] = {}

    def begin(self, item: int) -> int:
        self.begun[item] = self.begun.get(item, 0) + 1
        return self.begun[item]

    def end(self, item: int) -> None:
        del self.begun[item]


def study(item: int) -> Study:
    kspace = np.random.default_rng(item).standard_normal((1, 1, 2, 16, 16, 2), np.float32).view(np.complex64)[..., 0]
    return Study(f"p-{item:02d}", {"sax": View(kspace)}, {"lvef_pct": 50.0 + item})


def writes(root: Path | str, make: Callable[[int], Study], subjects: int = 12, rows: int = 4) -> writing.WriteShards:
    ids = [f"p-{item:02d}" for item in range(subjects)]
    jobs = writing.shard_jobs(splits.assign(ids, "stratified"), rows)
    return writing.WriteShards(str(root), jobs, ids, make, Shards(rows=rows), "test")


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def in_order(write: writing.WriteShards, order: list[int], journal: writing.Journal | None = None) -> dict[int, Any]:
    return {number: write(number, journal or Memory())[:2] for number in order}


# ------------------------------------------------------------------------------------------------------- one process


def test_shards_have_the_same_bytes_in_any_order_and_after_any_stop(tmp_path: Path) -> None:
    write = writes(tmp_path / "a", study)
    jobs = list(range(len(write.jobs)))
    manifest, refused = writing.complete(write, in_order(write, jobs))
    assert ({s: manifest.rows(s) for s in splits.SPLITS}, refused) == ({"train": 9, "val": 1, "test": 2}, [])
    for n in (1, len(jobs)):  # what is finished is kept
        again = writes(tmp_path / f"b{n}", study)
        in_order(again, jobs[-n:])
        (tmp_path / f"b{n}" / "shards" / "train-00000.parquet.0.tmp").write_bytes(b"half of it")
        before = writing.finished(again)
        assert sorted(before) == jobs[-n:]
        rest = in_order(again, [job for job in reversed(jobs) if job not in before])
        assert writing.complete(again, before | rest)[0] == manifest
        assert content(tmp_path / f"b{n}") == content(tmp_path / "a")


def test_who_can_t_be_read_is_refused_with_a_reason_and_nothing_private(tmp_path: Path) -> None:
    def make(item: int) -> Study:
        if item == 2:
            raise InputError("p-02: sax: expected 5 dimensions,\n got 4")
        if item == 3:
            raise KeyError("/home/somebody/Jane Doe.nii")
        if item == 5:
            return Study("p-05", {"sax": View(np.full((1, 1, 1, 8, 8), np.nan, np.complex64))})
        if item == 6:
            return study(7)
        return study(item)

    write = writes(tmp_path, make)
    parts = in_order(write, list(range(len(write.jobs))))
    manifest, refused = writing.complete(write, parts)
    assert sum(manifest.rows(s) for s in splits.SPLITS) == 8
    assert writing.refused(str(tmp_path)) == refused
    reasons = {entry["subject"]: entry["reason"] for entry in refused}
    assert sorted(reasons) == ["p-02", "p-03", "p-05", "p-06"]
    assert reasons["p-02"] == "sax: expected 5 dimensions, got 4"
    assert reasons["p-03"].startswith("KeyError at test_writing.py:")
    assert "Jane" not in (tmp_path / "refused.json").read_text()
    assert "expected finite values" in reasons["p-05"]
    assert reasons["p-06"] == "expected the study of p-06, got that of p-07"
    assert writing.reasons(refused + refused[:1])[0] == "2 x sax: expected 5 dimensions, got 4 (as p-02)"
    assert writing.finished(write) == parts  # the reasons survive a restart


def test_notes_and_unused_files_are_in_the_report_and_survive_a_restart(tmp_path: Path) -> None:
    def make(item: int) -> Study:
        return dataclasses.replace(study(item), notes=("2 images of another size left out",) if item in (1, 7) else ())

    left = {"reason": "a long axis", "files": [3, 4]}
    write = writing.WriteShards(**vars(writes(tmp_path, make)) | {"unused": (left,)})
    parts = in_order(write, list(range(len(write.jobs))))
    manifest, refused = writing.complete(write, writing.finished(write))
    assert writing.finished(write) == parts
    assert (sum(manifest.rows(s) for s in splits.SPLITS), refused) == (12, [])
    notes = [{"subject": f"p-0{item}", "note": "2 images of another size left out"} for item in (1, 7)]
    found = writing.report(str(tmp_path))
    assert sorted(found.pop("notes"), key=lambda note: note["subject"]) == notes
    assert found == {"subjects": 12, "refused": [], "unused": [left]}
    assert writing.reasons(notes, key="note") == ["2 x 2 images of another size left out (as p-01)"]
    assert writing.report(str(tmp_path / "none")) == {"refused": [], "notes": [], "unused": []}


def test_a_dataset_of_nobody_is_bad_input_and_says_why(tmp_path: Path) -> None:
    def make(item: int) -> Study:
        raise InputError("a mess")

    write = writes(tmp_path, make)
    with pytest.raises(InputError, match="one subject that can be read, 12 refused; the first: p-00: a mess"):
        writing.complete(write, in_order(write, list(range(len(write.jobs)))))
    assert len(writing.refused(str(tmp_path))) == 12
    assert not has_dataset(str(tmp_path))


def test_a_full_disk_stops_the_job_and_is_no_subject_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="shards/train-00000: it can't be written: No space left on device"):
        writes(tmp_path, study)(0, Memory())


def test_another_command_does_not_go_on_in_the_same_folder(tmp_path: Path) -> None:
    in_order(writes(tmp_path, study), [0])
    other = writing.WriteShards(**vars(writes(tmp_path, study)) | {"source": "another"})
    with pytest.raises(InputError, match="unfinished dataset of another command or version"):
        writing.finished(other)


def test_a_reader_s_line_loses_the_names_of_files() -> None:
    item = Item("nifti", "Jane", (Path("/data/Jane Doe/sax.nii.gz"), Path("/data/Jane Doe/sax_seg.nii.gz")))
    line = without_names("/data/Jane Doe/sax.nii.gz: bad, as is /data/Jane Doe; see sax_seg.nii.gz", item)
    assert line == "(file): bad, as is (file); see (file)"


def test_who_simulates_or_writes_imports_no_torch() -> None:
    """Each process of a simulation or an ingestion would pay for it with seconds."""
    program = """
import importlib, pkgutil, sys
import kmtr.data.dataset.driver, kmtr.data.dataset.ingest, kmtr.simulation.phantom
from kmtr.data import sources
for module in pkgutil.iter_modules(sources.__path__, "kmtr.data.sources."):
    importlib.import_module(module.name)
from kmtr.config.recipes import tiny
from kmtr.data.dataset import record, simulate
from kmtr.config import override
config = override(tiny(), {"data.frames": 2, "data.sax_slices": 1})
record.to_row(simulate.simulated(0, config), "float16")
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


# --------------------------------------------------------------------------------------------------------- on Ray


@pytest.mark.ray
def test_a_subject_that_ends_its_process_is_refused_and_the_others_are_written(cluster: None, tmp_path: Path) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import tests
    clean = writes(tmp_path / "clean", study, 8)
    writing.complete(clean, in_order(clean, list(range(len(clean.jobs)))))
    once = tmp_path / "once"

    def make(item: int) -> Study:
        import os

        if item == 4 or (item == 1 and not once.exists()):  # one for ever, the other by bad luck
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return study(item)

    said: list[tuple[int, int]] = []
    write = writes(tmp_path / "dirty", make, 8)
    manifest, refused, cost = write_dataset(write, lambda *done: said.append(done))
    assert [entry["subject"] for entry in refused] == ["p-04"]
    assert "its process ended 3 times" in refused[0]["reason"]
    assert sum(manifest.rows(s) for s in splits.SPLITS) == 7
    assert said[-1] == (8, 8)
    assert cost.subjects == 7
    assert cost.core_s > 0
    same = [s.sha256 for s in manifest.shards if s.rows == 4 or s.split != "train"]
    assert set(same) <= {s.sha256 for s in read_manifest(str(tmp_path / "clean")).shards}


def test_who_is_refused_for_crashes_stays_refused_when_the_shard_is_made_again() -> None:
    """Else n such subjects of one shard would cost 4^n - 1 processes."""
    ledger = Ledger()
    for _ in range(writing.CRASHES):
        assert ledger.begin(7) <= writing.CRASHES  # and then its process ends
    for _ in range(3):
        assert ledger.begin(7) > writing.CRASHES
        ledger.end(7)
    assert ledger.begin(8) == 1
    ledger.end(8)
    assert ledger.begin(8) == 1  # a healthy one starts anew


def killed(command: list[str], root: Path, shards_before: int) -> None:
    """Run a job and kill -9 it when some of its shards are finished."""
    killed_when(lambda: len(list(root.glob("shards/*.index"))) >= shards_before, command)
    assert not (root / "manifest.json").exists()


@pytest.mark.ray
def test_a_simulation_killed_half_way_ends_with_the_same_bytes(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    cohort = [*COHORT, "simulate.subjects=56"]
    full = simulate.run([*cohort, f"data.root={whole}"])
    assert full["written"] == 56
    assert {"frames_per_s", "subjects_per_core_minute", "peak_memory_gib"} <= full.keys()
    killed(["jobs/simulate.py", *cohort, f"data.root={broken}"], broken, 3)
    time.sleep(0.5)  # the tasks of the killed job end too
    found = simulate.run([*cohort, f"data.root={broken}"])
    assert found["digest"] == full["digest"]
    assert 0 < found["written"] <= 56 - 3 * 4
    assert content(broken) == content(whole)
    assert simulate.run([*cohort, f"data.root={broken}"])["reused"]
    with pytest.raises(InputError, match="holds another dataset"):
        simulate.run([*cohort, f"data.root={broken}", "simulate.seed=1"])
    assert "complete, reused" in capsys.readouterr().out


@pytest.mark.ray
def test_an_ingestion_killed_half_way_ends_with_the_same_bytes(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nibabel = pytest.importorskip("nibabel", reason="needs nibabel (the extra readers)")
    rng = np.random.default_rng(0)
    for n in range(60):
        values = rng.integers(1, 1000, (24, 24, 2, 3), np.int16)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([2, 2, 8, 1])), tmp_path / f"Jane{n:03d}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(values[..., 0], np.eye(4)), tmp_path / "A_scout.nii")
    spoilt = tmp_path / "Jane030.nii.gz"
    spoilt.write_bytes(spoilt.read_bytes()[:-500])
    whole, broken, words = tmp_path / "whole", tmp_path / "broken", ["nifti", str(tmp_path), "shards.rows=1"]
    full = ingest.run([*words, f"data.root={whole}"])
    assert (full["written"], full["refused"]) == (59, 1)
    killed(["jobs/ingest.py", *words, f"data.root={broken}"], broken, 10)
    time.sleep(0.5)
    found = ingest.run([*words, f"data.root={broken}"])
    assert (found["digest"], found["refused"]) == (full["digest"], 1)
    assert content(broken) == content(whole)
    (refused,) = writing.refused(str(broken))
    assert refused["subject"] == pseudonym("Jane030", b"kmtr")
    said = capsys.readouterr().out
    assert f"1 x {refused['reason']}" in said
    assert "ingest: 1 files not used (numbers in refused.json): 1 x images of one frame" in said
    assert writing.report(str(broken))["unused"] == [{"reason": "images of one frame", "files": [1]}]
    assert "Jane" not in said.replace(str(tmp_path), "")
    assert not any(b"Jane" in file for file in content(broken).values())


@pytest.mark.ray
def test_a_dataset_is_written_to_an_object_store_and_extended(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moto = pytest.importorskip("moto.server", reason="needs moto (the extra dev): a server of the S3 API")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        root = f"s3://someone:secret@bucket/cohort?{options}"
        cohort = [*COHORT, "shards.split=stratified"]
        there = simulate.run([*cohort, "simulate.subjects=24", f"data.root={root}"])
        here = simulate.run([*cohort, "simulate.subjects=24", f"data.root={tmp_path / 'here'}"])
        assert there["digest"] == here["digest"]
        assert there["data"] == f"s3://bucket/cohort?{options}"
        more = [*cohort, "simulate.subjects=40", f"shards.split_from={root}", f"data.root={tmp_path / 'more'}"]
        assert simulate.run(more)["subjects"] == {"train": 28, "val": 4, "test": 8}
    finally:
        server.stop()
    said = capsys.readouterr().out
    assert "24 of 40 subjects keep the split" in said
    assert "secret" not in said
    old, new = (shards.splits_of(str(p), read_manifest(str(p))) for p in (tmp_path / "here", tmp_path / "more"))
    assert old.items() <= new.items()
    assert len(new) == 40


def test_a_view_that_no_shard_can_hold_refuses_its_subject_alone(tmp_path: Path) -> None:
    def make(item: int) -> Study:
        kspace = np.broadcast_to(np.complex64(1), (12, 60, 12, 210, 448))  # no memory is asked for it
        return Study("p-04", {"sax": View(kspace)}) if item == 4 else study(item)

    write = writes(tmp_path, make)
    manifest, refused = writing.complete(write, in_order(write, list(range(len(write.jobs)))))
    assert sum(manifest.rows(s) for s in splits.SPLITS) == 11
    assert [entry["subject"] for entry in refused] == ["p-04"]
    assert "less than 2 GiB" in refused[0]["reason"]
    assert "ingest.coils" in refused[0]["reason"]


@pytest.mark.parametrize("items", [(0,), (3, 7), tuple(range(12))])
def test_what_fails_while_it_is_encoded_refuses_its_subject_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, items: tuple[int, ...]
) -> None:
    failing = {study(item).subject_id for item in items}
    encode = record.to_row

    def to_row(one: Study, dtype: str) -> dict[str, object]:
        if one.subject_id in failing:
            raise OverflowError("/home/somebody/Jane Doe.nii")
        return encode(one, dtype)

    monkeypatch.setattr(shards, "to_row", to_row)
    write = writes(tmp_path, study)
    parts = in_order(write, list(range(len(write.jobs))))
    refused = [entry for _, summary in parts.values() for entry in summary["refused"]]
    assert {entry["subject"] for entry in refused} == failing
    assert all(entry["reason"].startswith("OverflowError at ") for entry in refused)
    assert sum(shard.rows for shard, _ in parts.values()) == 12 - len(items)
