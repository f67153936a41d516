"""The MLflow run of a training, on a real SQLite store."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import filelock
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from kmtr.config import RunConfig, override, run_keys
from kmtr.tracking import end_run, find_run, log_dataset, open_run, store, tracking_uri, where
from kmtr.tracking.store import artifact_location, client, redact
from kmtr.types import InputError, KmtrError

pytestmark = pytest.mark.slow


def config_at(root: Path | str, **changes: object) -> RunConfig:
    return override(RunConfig(recipe="tiny"), {"storage.root": str(root), **changes})


@pytest.fixture(autouse=True)
def _no_outer_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all tests of this file: making one costs seconds."""
    return tmp_path_factory.mktemp("runs")


def test_uri_in_order_of_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(config_at(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment:5000")
    assert tracking_uri(config_at(tmp_path)) == "http://from-environment:5000"
    given = config_at(tmp_path, **{"tracking.uri": "http://given:5000"})
    assert tracking_uri(given) == "http://given:5000"


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(config_at("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tracking_uri(config_at("runs", **{"tracking.uri": "sqlite:///my.db"})) == f"sqlite:///{tmp_path}/my.db"
    assert artifact_location(config_at("runs"), "sqlite:////x.db") == f"{tmp_path}/runs/artifacts"


def test_artifacts_of_a_server_are_the_servers_business() -> None:
    assert artifact_location(config_at("runs"), "http://server:5000") is None
    assert artifact_location(config_at("s3://bucket/runs/"), "postgresql://db/x") == "s3://bucket/runs/artifacts"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"storage.root": "s3://bucket/runs"}, "set tracking.uri"),
        ({"tracking.uri": "mlruns"}, "no folder stores"),
        ({"tracking.uri": "file:///mlruns"}, "no folder stores"),
        ({"tracking.uri": "sqlite:///:memory:"}, "in memory"),
    ],
)
def test_bad_stores_are_refused_in_one_line(changes: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        tracking_uri(override(RunConfig(), changes))
    assert "\n" not in str(caught.value)


def test_a_run_holds_configuration_versions_and_status(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef0123456789abcdef")  # as a Tune trial may inherit it
    config = config_at(root)
    uri = tracking_uri(config)
    run_id = open_run(config, name="run-a", tags={"kind": "test"})
    assert "MLFLOW_RUN_ID" not in os.environ
    run = client(uri).get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "run-a"
    assert run.info.artifact_uri == f"{root}/artifacts/{run_id}/artifacts"
    assert set(run.data.params) == set(run_keys(config))
    assert "align.temperature" in run.data.params
    assert not [key for key in run.data.params if key.startswith(("bench.", "search.", "simulate.", "study."))]
    assert run.data.params["sampling.accelerations"] == "4,8,16"
    assert run.data.tags["recipe"] == "tiny"
    assert run.data.tags["kind"] == "test"
    assert run.data.tags["version.torch"].startswith("2.")
    here = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(here, capture_output=True, text=True, check=False).stdout.strip()
    assert run.data.tags.get("mlflow.source.git.commit", "") == commit
    end_run(uri, run_id, "FAILED")
    assert client(uri).get_run(run_id).info.status == "FAILED"


def test_the_same_name_resumes_the_same_run(root: Path) -> None:
    config = config_at(root)
    uri = tracking_uri(config)
    assert find_run(uri, config.tracking.experiment, "run-b") is None
    first = open_run(config, name="run-b")
    end_run(uri, first, "KILLED")
    more_workers = override(config, {"train.workers": 4})
    again = open_run(more_workers, name="run-b", resume_id=find_run(uri, config.tracking.experiment, "run-b"))
    run = client(uri).get_run(again)
    assert again == first
    assert run.info.status == "RUNNING"
    assert run.data.params["train.workers"] == "1"
    assert run.data.tags["resumed.train.workers"] == "4"
    fresh = open_run(config, name="run-b")
    assert find_run(uri, config.tracking.experiment, "run-b") == fresh != first


def test_a_trial_is_a_child(root: Path) -> None:
    config = config_at(root)
    parent = open_run(config, name="search")
    child = open_run(config, name="search-0", parent_id=parent)
    assert client(tracking_uri(config)).get_run(child).data.tags["mlflow.parentRunId"] == parent


def test_a_deleted_run_is_not_reopened(root: Path) -> None:
    config = config_at(root)
    uri = tracking_uri(config)
    run_id = open_run(config, name="gone")
    client(uri).delete_run(run_id)
    assert find_run(uri, config.tracking.experiment, "gone") is None
    with pytest.raises(InputError, match="deleted in MLflow"):
        open_run(config, name="gone", resume_id=run_id)


def test_the_dataset_is_an_input_of_the_run(root: Path) -> None:
    config = config_at(root)
    uri = tracking_uri(config)
    run_id = open_run(config, name="with-data")
    for _ in range(2):  # a resumed run says it again
        log_dataset(uri, run_id, "tiny", "ab" * 32, "s3://bucket/tiny", '{"subjects": 1600}')
    (logged,) = client(uri).get_run(run_id).inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("tiny", "ab" * 18)
    assert logged.dataset.source_type == "s3"
    assert "ab" * 32 in logged.dataset.source


def test_two_runs_that_note_a_new_dataset_at_once_both_have_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store inserts without looking again, so that the later of the two fails, once."""
    config = config_at(root)
    uri = tracking_uri(config)
    runs = [open_run(config, name=name) for name in ("first", "later")]
    noted = MlflowClient.log_inputs

    def raced(self: MlflowClient, run_id: str, *inputs: object) -> None:
        monkeypatch.setattr(MlflowClient, "log_inputs", noted)
        log_dataset(uri, runs[0], "new", "cd" * 32, "s3://bucket/new")
        raise MlflowException("UNIQUE constraint failed: datasets.experiment_id, datasets.name, datasets.digest")

    monkeypatch.setattr(MlflowClient, "log_inputs", raced)
    log_dataset(uri, runs[1], "new", "cd" * 32, "s3://bucket/new")
    for run_id in runs:
        (logged,) = client(uri).get_run(run_id).inputs.dataset_inputs
        assert logged.dataset.name == "new"


def test_long_values_and_passwords(root: Path) -> None:
    secret = "http://user:hunter2@server:5000/" + "x" * 7000
    config = override(config_at(root), {"data.root": secret})
    run_id = open_run(config, name="long")
    value = client(tracking_uri(config)).get_run(run_id).data.params["data.root"]
    assert len(value) == 6000
    assert value.startswith("http://***@server")
    assert redact("at postgresql+psycopg2://u:p@h/db failed") == "at postgresql+psycopg2://***@h/db failed"


def test_a_store_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    config = config_at(tmp_path, **{"tracking.uri": "http://user:hunter2@127.0.0.1:9"})
    with pytest.raises(KmtrError, match=r"MLflow at http://\*\*\*@127\.0\.0\.1:9 failed") as caught:
        open_run(config, name="x")
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a'b", 'a"b'])
def test_names_that_break_a_search_are_refused(root: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"run\.name"):
        open_run(config_at(root), name=name)


def test_a_store_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KmtrError, match="MLflow at sqlite:///") as caught:
        open_run(config_at(tmp_path / "file"), name="x")
    assert "\n" not in str(caught.value)


def test_a_wait_for_another_job_s_store_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "mlflow.db"
    other = filelock.FileLock(f"{file}.lock")
    other.acquire()
    monkeypatch.setattr(store, "PATIENCE_S", 0.0)
    monkeypatch.setattr(store.log, "warning", lambda *said: (lines.append(said[0] % said[1:]), other.release()))
    lines: list[str] = []
    assert client(f"sqlite:///{file}").search_experiments()
    assert lines == [f"{file}: another job makes or migrates this MLflow store; waiting until it is done"]


def test_a_store_of_a_later_mlflow_is_one_line_and_stays_as_it_was(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as made:
        made.execute("CREATE TABLE alembic_version (version_num TEXT)")
        made.execute("CREATE TABLE experiments (id INTEGER)")
        made.execute("INSERT INTO alembic_version VALUES ('fffffffffff1')")
        made.commit()
    before = (tmp_path / "mlflow.db").read_bytes()
    with pytest.raises(KmtrError, match=r"cannot be made or migrated: .* schema fffffffffff1 is not known") as caught:
        client(uri)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "mlflow.db").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} <= {"mlflow.db", "mlflow.db.lock"}


def test_jobs_that_meet_an_empty_store_at_once_all_open_their_run(tmp_path: Path) -> None:
    script = (
        "import sys; from kmtr.config import RunConfig, override; from kmtr.tracking import open_run; "
        "print(open_run(override(RunConfig(), {'storage.root': sys.argv[1]}), name='r' + sys.argv[2]))"
    )
    jobs = [
        subprocess.Popen([sys.executable, "-c", script, tmp_path, str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    said = [job.communicate()[0].split() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert len({words[-1] for words in said}) == 2


def test_make_ui_is_named_only_where_it_shows_the_store() -> None:
    runs = Path(__file__).parents[2] / "runs"
    assert where(f"sqlite:///{runs}/mlflow.db") == f"sqlite:///{runs}/mlflow.db (make ui)"
    assert where("sqlite:////elsewhere/mlflow.db") == "sqlite:////elsewhere/mlflow.db"
    assert where("https://me:secret@mlflow") == "https://***@mlflow"
