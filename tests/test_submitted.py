"""A command on a cluster has the paths that were meant where it was typed: nothing lands in the throwaway upload."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kmtr.config import RunConfig, keys, override
from kmtr.config.help import kind
from kmtr.config.submitted import PATHS, TRACKING, refuse_relative, refuse_relative_under_submit, submitted
from kmtr.config.used import USED
from kmtr.data.dataset import ingest
from kmtr.evaluate.predict import command
from kmtr.types import InputError

ROOT = Path(__file__).parents[1]
UNDER_SUBMIT = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("study labels", "labels data.root={0}/runs/tiny storage.root={0}/runs tracking.uri=sqlite:///{0}/runs/mlflow.db"),
        (
            "pretrain large storage.root=/mnt/runs",
            "large storage.root=/mnt/runs data.root={0}/runs/large tracking.uri=sqlite:////mnt/runs/mlflow.db",
        ),
        (
            "finetune tiny task.encoder=runs/a/encoder data.more=more,/b,s3://c tracking.uri=sqlite:///x.db "
            "storage.root=r",
            "tiny task.encoder={0}/runs/a/encoder data.more={0}/more,/b,s3://c tracking.uri=sqlite:///{0}/x.db "
            "storage.root={0}/r data.root={0}/runs/tiny",
        ),
        (
            "finetune tiny task.encoder=none data.root=s3://a tracking.uri=http://mlflow:5000 storage.root=/r",
            "tiny task.encoder=none data.root=s3://a tracking.uri=http://mlflow:5000 storage.root=/r",
        ),
        (
            "predict runs/a/model data.root=../d predict.out=out tracking.uri=http://mlflow:5000 storage.root=/r",
            "{0}/runs/a/model data.root={1}/d predict.out={0}/out tracking.uri=http://mlflow:5000 storage.root=/r",
        ),
        (
            "predict models:/heart/latest data.root=/d predict.out=/out storage.root=/r",
            "models:/heart/latest data.root=/d predict.out=/out storage.root=/r tracking.uri=sqlite:////r/mlflow.db",
        ),
        (
            "ingest nifti hearts data.root=d 'ingest.columns=subject=eid lvedv_ml=edv' ingest.labels=labels.csv",
            "nifti {0}/hearts data.root={0}/d 'ingest.columns=subject=eid lvedv_ml=edv' ingest.labels={0}/labels.csv "
            "storage.root={0}/runs",
        ),
        ("bench data", "data data.root={0}/runs/base storage.root={0}/runs bench.folder={0}/runs/bench-data"),
    ],
)  # fmt: skip
def test_paths_become_absolute(job: str, words: str) -> None:
    python, script, *found = submitted(shlex.split(job))
    assert (python, script) == ("python", f"jobs/{job.split()[0]}.py")
    assert found == shlex.split(words.format(ROOT, ROOT.parent))


def test_mlflow_s_server_of_the_environment_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert submitted(["search", "tiny"])[1:] == [
        "tune/search.py", "tiny", f"data.root={ROOT}/runs/tiny", f"storage.root={ROOT}/runs",
        "tracking.uri=http://mlflow:5000",
    ]  # fmt: skip


@pytest.mark.parametrize("key", PATHS)
def test_what_is_submitted_is_not_refused_there(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what somebody submits by hand with a relative path is, in one line that names it."""
    typed = {key: "here/it/is"}
    monkeypatch.setenv(UNDER_SUBMIT, "{}")
    with pytest.raises(InputError, match=rf"^{key}: expected an absolute path under ray job submit.*'here/it/is'"):
        refuse_relative_under_submit(
            override(RunConfig(), {"data.root": "/d", "storage.root": "/r", "run.name": "r"} | typed)
        )
    for name in USED:
        words = submitted([name, f"{key}=here/it/is"])[2:]
        given = dict(word.split("=", 1) for word in words)
        refuse_relative_under_submit(override(RunConfig(), {"run.name": "r"} | given))


def test_a_relative_model_or_source_is_refused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNDER_SUBMIT, "{}")
    with pytest.raises(InputError, match=r"^MODEL: expected an absolute path"):
        command.run(["runs/a/model", "data.root=/d", "storage.root=/r", "predict.out=/o"])
    with pytest.raises(InputError, match=r"^SOURCE: expected an absolute path"):
        ingest.run(["nifti", "hearts", "data.root=/d", "storage.root=/r"])
    for place in ("/runs/a/model", "models:/heart/1", "s3://bucket/data", "none", ""):
        refuse_relative("MODEL", place)


NO_PATHS = {
    "recipe", "run.name", "task.tasks", "task.system", "task.input", "task.targets", "task.diseases",
    "tracking.experiment",
    "tracking.model", "tracking.encoder", "ingest.axes", "ingest.classes", "ingest.columns", "evaluate.targets",
    "study.targets", "study.groups", "study.systems", "search.earlier",
}  # fmt: skip
"""Settings that are text and name no file; a new one belongs here or into `PATHS`."""


def test_no_setting_with_a_path_is_forgotten() -> None:
    texts = {key for key, info in keys(RunConfig) if kind(key, info) in ("text", "list of names")}
    assert texts - NO_PATHS == {*PATHS, TRACKING}


def test_make_submits_the_words_as_they_are(tmp_path: Path) -> None:
    """Blanks within a word, and an error, through the shell as make calls it."""
    recipe = (ROOT / "Makefile").read_text().partition("submit: setup\n")[2].partition("\n\n")[0]
    assert "-m kmtr.config.submitted $(JOB) | xargs --null --no-run-if-empty" in recipe
    words = ["ingest", "nifti", "/hearts", "data.root=/d", "ingest.columns=subject=eid lvedv_ml=edv"]
    words.append("storage.root=/runs")
    done = subprocess.run([sys.executable, "-m", "kmtr.config.submitted", *words], capture_output=True, text=True)
    assert done.stdout.split("\0")[:-1] == ["python", "jobs/ingest.py", *words[1:]]
    assert done.stderr == f"submit: python jobs/ingest.py {shlex.join(words[1:])}\n"
    done = subprocess.run([sys.executable, "-m", "kmtr.config.submitted", "pretrian"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == 'error: submit: expected JOB="pretrain tiny ..." naming a file of jobs/ or tune/, got "pretrian"\n'
    )
