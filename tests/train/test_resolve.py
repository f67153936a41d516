"""A run is resolved once: its workers search for nothing again, and need no file but the dataset's."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import pipeline, planning
from kmtr.data.loader.batch import NOTHING
from kmtr.train.handed import handed, taken
from kmtr.train.resolve import resolve

SHOWS = """
def show(hosts):
    for host in hosts:
        batch = host.to(torch.device("cpu"))
        print(*batch.key.tolist(), sha256(batch.sampled.numpy().tobytes()).hexdigest())
"""

WORKER = """
import json, sys
from hashlib import sha256
import numpy as np
import torch
from kmtr.config import from_json
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import buckets, pipeline, planning
from kmtr.train.handed import taken

buckets.choose = planning.check_shapes = None  # as good as forbidden
config, given = from_json(sys.argv[1]), json.loads(sys.argv[2])
dataset = Dataset.open(config.data)
plan = taken(config, dataset, given | {"pattern": np.array(given["pattern"])})
show(pipeline.batches(config, dataset.reader("train", config.data), plan, range(2), 1, 2))
"""

ACTOR = """
import pickle, sys
from hashlib import sha256
from pathlib import Path
import torch

make = pickle.loads(Path(sys.argv[1]).read_bytes())  # as Ray starts it
show(make(number) for number in range(2))
"""


def output(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints, which knows only what it is given."""
    head, _, body = code.partition("import torch\n")
    done = subprocess.run(
        [sys.executable, "-c", f"{head}import torch\n{SHOWS}{body}", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def pattern() -> np.ndarray:
    """Three frames of 8 lines of 32."""
    return np.argsort(np.argsort(np.random.default_rng(0).random((3, 32)), axis=1), axis=1) < 8


@pytest.fixture
def of_file(small: RunConfig, pattern: np.ndarray, tmp_path: Path) -> RunConfig:
    np.save(tmp_path / "pattern.npy", pattern)
    changes = {
        "sampling.family": "file",
        "sampling.file": str(tmp_path / "pattern.npy"),
        "sampling.accelerations": (4,),
        "evaluate.accelerations": (4,),
        "storage.root": str(tmp_path / "runs"),
        "data.loader": "threads",
    }
    return override(small, changes)


def test_workers_need_neither_the_pattern_file_nor_a_search(
    of_file: RunConfig, pattern: np.ndarray, tmp_path: Path
) -> None:
    config, dataset = resolve(of_file)
    given = handed(config, dataset)
    reader, plan = dataset.reader("train", config.data), planning.plan_of(config, dataset)
    make = pipeline.MakeBatch(config, reader, plan, 0, 1, 2, NOTHING, given["pattern"])
    expected = list(pipeline.batches(config, reader, plan, range(2), 1, 2))
    sampled = [host.to(torch.device("cpu")).sampled for host in expected]
    np.testing.assert_array_equal(sampled[0][0, 0].numpy(), pattern[np.arange(sampled[0].shape[2]) % 3])

    (tmp_path / "make").write_bytes(pickle.dumps(make))
    Path(config.sampling.file).unlink()
    plain = json.dumps({"buckets": given["buckets"], "pattern": given["pattern"].tolist(), "rows": None})
    said = output(WORKER, config.model_dump_json(), plain)
    assert len(said.splitlines()) == 2
    assert [line.split()[:-1] for line in said.splitlines()] == [
        [str(key) for key in host.meta["key"].tolist()] for host in expected
    ]
    assert output(ACTOR, str(tmp_path / "make")) == said


def test_what_workers_are_given_makes_the_same_plan(small: RunConfig) -> None:
    dataset = Dataset.open(small.data)
    found, given = planning.plan_of(small, dataset), handed(small, dataset)
    assert given["pattern"] is None
    plan = taken(small, dataset, json.loads(json.dumps(given)))
    assert plan.buckets == found.buckets
    for step in range(2 * found.steps_per_epoch):
        np.testing.assert_array_equal(plan.batch(step).row, found.batch(step).row)


def test_a_run_on_stacks_of_both_orders_says_so(
    small: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The short axis of simulated hearts goes from apex to base, that of readers from base to apex."""
    both = []
    for source in ("simulate cohort", "ingest dicom"):
        both.append(tmp_path / source)
        shutil.copytree(small.data.root, both[-1])
        manifest = json.loads((both[-1] / "manifest.json").read_text())
        (both[-1] / "manifest.json").write_text(json.dumps(manifest | {"source": source}))
    asked = {"data.root": str(both[0]), "align.steps": 0}
    _, alone = resolve(override(small, asked))
    assert alone.slice_order == "from apex to base"
    assert Dataset.of(str(both[1])).slice_order.startswith("from base to apex where")
    assert not caplog.records
    _, mixed = resolve(override(small, asked | {"data.more": (str(both[1]),)}))
    assert mixed.slice_order.startswith("from apex to base in simulated hearts, in others from base to apex")
    assert [record.message for record in caplog.records] == [
        f"data.more: slices of the short axis are not all in one order: {mixed.slice_order}"
    ]
