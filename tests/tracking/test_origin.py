"""Where a run comes from, as MLflow shows it: user, command, commit; also of a job that was uploaded without them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from kmtr.tracking import origin, ui

ROOT = Path(__file__).parents[2]


def test_a_command_is_shown_as_it_was_typed_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", [f"{ROOT}/jobs/pretrain.py", "tiny", "tracking.uri=http://me:secret@host", "a=b c"]
    )
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setenv(origin.USER, "somebody")
    tags = origin.started_by()
    assert tags["mlflow.source.name"] == "jobs/pretrain.py"
    assert tags["mlflow.source.type"] == "LOCAL"
    assert tags["mlflow.user"] == "somebody"
    assert tags["command"].startswith("python jobs/pretrain.py tiny ")
    assert tags["command"].endswith(" 'a=b c'")
    assert "secret" not in tags["command"]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert origin.started_by()["mlflow.source.type"] == "JOB"


def test_an_uploaded_job_knows_the_commit_that_it_was_submitted_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", "from kmtr.tracking.origin import main; main()", "RAY_JOB_STOP_WAIT_TIME_S=90"]
    told = json.loads(subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout)["env_vars"]
    assert told.pop("RAY_JOB_STOP_WAIT_TIME_S") == "90"
    own = {name: value for name, value in origin.versions().items() if "git" in name}
    if not own:
        pytest.skip("this is no git checkout")
    monkeypatch.setattr(origin, "_git", lambda *_: "")  # as in an upload without .git
    assert not [name for name in origin.versions() if "git" in name]
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert {name: value for name, value in origin.versions().items() if "git" in name} == own
    assert origin.started_by()["mlflow.user"] == told[origin.USER]


@pytest.mark.parametrize(
    ("experiments", "place"),
    [({"Default": "0", "kmtr": "7"}, "experiments/7/runs"), ({"mine": "3"}, "experiments/3/runs"), ({}, "experiments")],
)
def test_the_page_is_that_of_runs_and_not_of_traces(experiments: dict[str, str], place: str) -> None:
    expected = f"http://127.0.0.1:5000/#/{place}?workflowType=machine_learning"
    assert ui.page("http://127.0.0.1:5000", experiments) == expected


@pytest.mark.slow
def test_the_server_answers_where_it_says_and_ends_with_its_command(tmp_path: Path) -> None:
    port = free_port()
    words = [sys.executable, "-m", "kmtr.tracking.ui", str(tmp_path), str(port)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT) as command:
        assert command.stdout is not None
        line = next(line for line in command.stdout if "workflowType=machine_learning" in line)
        assert f"http://127.0.0.1:{port}/#/experiments/0/runs?" in line  # of a new store, the default experiment
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as answer:
            assert answer.status == 200
        command.terminate()
        assert command.wait(60) == 143
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
