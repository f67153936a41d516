"""One run under one id in which a worker, the controller, a node and the command die and the node comes back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from forked_workers import instead_of_ray_train
from survived import curve, run_of

from kmtr import tracking
from kmtr.config import RunConfig, override, to_json
from kmtr.train import driver

pytestmark = [pytest.mark.ray, pytest.mark.full, pytest.mark.xdist_group("faults")]

STEPS = {
    "stage": "both",
    "masked.steps": 30,
    "align.steps": 6,
    "optimizer.ema": 0.9,
    "train.checkpoint_every": 3,
    "train.eval_every": 12,
}
ELASTIC = {"train.workers": "1..2", "train.cpus_per_worker": 1.0, "train.resize_every_s": 1.0, "train.threads": 1}


def subjects_of(folder: Path) -> dict[int, list[tuple[int, int]]]:
    """Step -> (epoch, subject) of all that it took, of the group of workers that did it last."""
    records = [json.loads(line) for path in folder.glob("samples-*.jsonl") for line in path.read_text().splitlines()]
    last = {}
    for record in sorted(records, key=lambda record: record["t"]):
        last[record["step"]] = record["group"]
    found: dict[int, list[tuple[int, int]]] = {step: [] for step in last}
    for record in records:
        if record["group"] == last[record["step"]]:
            taken = zip(record["epoch"], record["key"], record["repeated"], strict=True)
            found[record["step"]] += [(epoch, key) for epoch, key, repeated in taken if not repeated]
    return found


def test_three_kills_a_lost_node_and_two_resizes_change_no_number(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(config, STEPS | ELASTIC)
    place = tmp_path / "told"
    place.mkdir()
    (place / "config.json").write_text(to_json(config))
    command = [sys.executable, str(Path(__file__).with_name("everything.py")), str(place / "config.json"), str(place)]
    top = str(Path(__file__).parents[2])
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=850, check=False, env=os.environ | {"PYTHONPATH": top}
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    run_id, status = run_of(config)
    assert (run_id, status) == (json.loads(ended.stdout.splitlines()[-1])["run_id"], "FINISHED")

    said = (place / "said.txt").read_text()
    for line in (
        "all start again from the last checkpoint (loss 1 of",
        "lost          the controller of the workers; all start again",
        "goes on       workers 2 -> 1, accumulation 1 -> 2",
        "goes on       workers 1 -> 2, accumulation 2 -> 1",
        "which had it, is dead; going on",
    ):
        assert line in said, line
    assert re.search(r"step +(27|30)  goes on", said.rpartition("is dead; going on")[2])

    taken = subjects_of(place)
    assert sorted(taken) == list(range(36))
    once = Counter(pair for pairs in taken.values() for pair in pairs)
    assert set(once.values()) == {1}, "each subject once in every epoch"
    assert len(once) == 36 * config.data.global_batch

    calm = override(config, {"train.workers": 2, "storage.root": str(tmp_path / "calm")})
    instead_of_ray_train(monkeypatch)
    other = driver.fit(calm, quiet=True)
    history = tracking.history(Path(other.folder) / driver.SPOOL)
    worst = {}
    for name, steps in (("masked/loss", 30), ("align/infonce_dynamic", 6)):
        ours, theirs = curve(config, run_id, name), history[name]
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        assert len(ours) == steps
        worst[name] = max(abs(a - b) / abs(b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
        assert worst[name] < 2e-3
    sys.stdout.write(json.dumps({"worst_relative_difference": worst}) + "\n")
