"""`make submit` to a cluster of two nodes on this machine: fine-tuning, prediction with its model, a study."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command
import pytest

import kmtr
from kmtr.config import RunConfig, override
from kmtr.data.dataset import record
from kmtr.data.dataset.reader import Dataset
from kmtr.evaluate.predictions import read

pytestmark = [pytest.mark.ray, pytest.mark.full, pytest.mark.xdist_group("faults")]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S, JOB_S = 180, 900


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_ones:
        found = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Variables of a shell in the project's environment, without what tests set for a Ray of their own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    kept.pop("MLFLOW_TRACKING_URI", None)
    kept |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return kept | {"PATH": f"{BIN}:{kept['PATH']}", "RAY_DATA_LOG_LEVEL": "ERROR"}


@pytest.fixture(scope="module")
def address(environment: dict[str, str]) -> Iterator[str]:
    """Ray's Jobs API of two nodes of two logical CPUs each, as cluster/README.md starts them on one machine."""
    port, jobs, *agents = free_ports(4)
    heads = ["--head", f"--port={port}", f"--dashboard-port={jobs}", "--dashboard-host=127.0.0.1"]
    nodes, folders = [], [tempfile.mkdtemp(prefix="kmtr-node-", dir="/tmp") for _ in agents]  # a socket's path is short
    try:
        for words, agent, folder in zip((heads, [f"--address=127.0.0.1:{port}"]), agents, folders, strict=True):
            own = ["--block", "--num-cpus=2", f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}"]
            own += ["--object-store-memory=500000000"]
            nodes.append(subprocess.Popen([BIN / "ray", "start", *words, *own], env=environment))
            if words is heads:
                _wait_for(jobs, nodes[0])
        yield f"http://127.0.0.1:{jobs}"
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(60)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _wait_for(port: int, node: subprocess.Popen[bytes]) -> None:
    """Until somebody listens at a port."""
    until = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert node.poll() is None, "ray start ended"
        assert time.monotonic() < until, f"nobody listens at {port}"
        time.sleep(0.5)


def submitted(words: list[str], address: str, environment: dict[str, str]) -> tuple[dict[str, Any], str]:
    """The JSON line that a job ends with, and all that it printed."""
    asked = ["make", "submit", f"JOB={shlex.join(words)}", f"ADDRESS={address}"]
    done = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=JOB_S)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    found: dict[str, Any] = json.loads(line)
    return found, done.stdout


def test_fine_tuning_prediction_and_a_study_of_systems(
    address: str, environment: dict[str, str], small: RunConfig, tmp_path: Path
) -> None:
    pytest.importorskip("monai", reason="needs MONAI (the extra baselines)")
    own = override(
        small,
        {
            "storage.root": str(tmp_path / "runs"),
            "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db",
            "train.workers": 2,
            "train.threads": 1,
            "task.tasks": ("phenotypes", "segmentation"),
            "task.targets": ("lvedv_ml", "lvef_pct"),
            "task.encoder": "none",
            "task.steps": 4,
            "task.frames": 1,
            "evaluate.accelerations": (4,),
            "evaluate.bootstrap": 20,
        },
    )
    said, printed = submitted(["finetune", *command.words(own)], address, environment)
    assert "2 node(s)" in printed
    model = Path(said["model"])

    out = tmp_path / "out"
    words = ["predict", str(model), f"data.root={small.data.root}", f"predict.out={out}", "predict.workers=2"]
    told, _ = submitted([*words, "predict.accelerations=4", "predict.rows=5"], address, environment)
    assert (told["subjects"], told["refused"], told["workers"]) == (48, 0, 2)
    values = {(row["subject"], row["target"]): row["value"] for row in read(Path(told["predictions"])).to_pylist()}
    reader, loaded = Dataset.open(small.data).reader("test", small.data), kmtr.load_model(model)
    for place in range(3):
        subject = record.to_study(reader.read([place]))
        alone = loaded.predict(subject, acceleration=4)
        for target in ("lvedv_ml", "lvef_pct"):
            assert values[subject.subject_id, target] == pytest.approx(alone[target], rel=1e-4)

    study = override(
        own,
        {
            "task.encoder": "",
            "train.workers": 1,
            "masked.steps": 2,
            "align.steps": 0,
            "study.seeds": (0,),
            "study.systems": ("pretrained", "unet-shared"),
            "study.rows": str(tmp_path / "rows"),
        },
    )
    told, printed = submitted(["study", "systems", *command.words(study)], address, environment)
    assert (told["rows"], told["missing"]) == (2, 0)
    assert "at once; the cluster has 2 node(s)" in printed
    assert Path(told["report"]).is_file()
