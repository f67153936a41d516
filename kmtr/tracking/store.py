"""Address of the MLflow store, and access to it: absolute addresses, short timeouts, no password in any message."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from kmtr.config import RunConfig
from kmtr.types import InputError, KmtrError, redact

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from mlflow import MlflowClient

SERVERS = ("http", "https", "databricks", "databricks-uc")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default blocks for about four minutes when the server is down
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing about a run of patient data leaves for a third party
}
"""Set before mlflow is imported, where the user has not set them."""

PATIENCE_S = 5.0
"""A job that waits longer for another one to make or migrate the store says so."""

UI_STORE = Path(__file__).parents[2] / "runs" / "mlflow.db"
"""The SQLite file that `make ui` shows."""


def where(uri: str) -> str:
    """A store's address as it is printed: without a password, with the command that shows it where there is one."""
    return redact(uri) + (" (make ui)" if uri == f"sqlite:///{UI_STORE}" else "")


def tracking_uri(config: RunConfig) -> str:
    """``tracking.uri``, else MLFLOW_TRACKING_URI, else SQLite in ``storage.root``; SQLite paths become absolute.

    Absolute, because training workers and MLflow servers live in other directories than the command did.

    Raises:
        InputError: a store that MLflow 3 does not open, or SQLite asked for inside an object store.
    """
    key = "tracking.uri" if config.tracking.uri else "MLFLOW_TRACKING_URI"
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        root = local_path(config.storage.root)
        if root is None:
            raise InputError(
                "tracking.uri: expected an MLflow store, because SQLite cannot live in "
                f"storage.root={redact(config.storage.root)}; set tracking.uri=http://... or a local storage.root"
            )
        return f"sqlite:///{root / 'mlflow.db'}"
    scheme = uri.partition(":")[0].partition("+")[0]  # postgresql+psycopg2 -> postgresql
    if scheme not in (*SERVERS, *DATABASES):
        raise InputError(
            f"{key}: expected sqlite:///FILE, http(s)://HOST, databricks or a database URI, got {redact(uri)!r}"
            "; MLflow 3 has no folder stores"
        )
    if scheme == "sqlite":
        file = sqlite_file(uri)
        if file is None:
            raise InputError(
                f"{key}: expected sqlite:///FILE, got {uri!r}; a store in memory is lost between processes"
            )
        return f"{uri.partition(':')[0]}:///{file}"
    return uri


def sqlite_file(uri: str) -> Path | None:
    """Absolute file of a SQLite store; None: not SQLite, or in memory."""
    scheme, _, path = uri.partition(":///")
    if scheme.partition("+")[0] != "sqlite" or path in ("", ":memory:"):
        return None
    return Path(path).expanduser().absolute()


def local_path(root: str) -> Path | None:
    """Absolute local folder of a path or file URI; None: an object store."""
    parts = urlsplit(root)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return None if "://" in root else Path(root).expanduser().absolute()


def artifact_location(config: RunConfig, uri: str) -> str | None:
    """Place of the files of a new experiment: ``storage.root/artifacts``; None: a server decides.

    MLflow's own default for a database store is ``mlruns`` in the directory of whoever creates the experiment.
    """
    if uri.partition(":")[0] in SERVERS:
        return None
    root = local_path(config.storage.root)
    return str(root / "artifacts") if root else config.storage.root.rstrip("/") + "/artifacts"


def prepare() -> None:
    """Puts this process's environment in order; before the first import of mlflow."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.pop("MLFLOW_RUN_ID", None)  # would override the run asked for, in whatever MLflow code runs here


def client(uri: str) -> MlflowClient:
    """A client of its own for this store; neither reads nor sets MLflow's global state.

    A SQLite store that is empty, or of an earlier MLflow, is made or migrated by the first job that meets it; jobs that
    meet it meanwhile wait. Of an earlier one a copy stays beside it, called after its version.

    Raises:
        KmtrError: it cannot be made or migrated, as one of a later MLflow.
    """
    prepare()
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # "Creating initial tables", at each new store
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line per retry; we tell it once
    file = sqlite_file(uri)
    if file is None or _current(file):
        return MlflowClient(tracking_uri=uri)
    with _alone(file):
        try:
            if not _current(file):
                _migrate(uri, file)
            return MlflowClient(tracking_uri=uri)
        except Exception as error:  # alembic and SQLAlchemy have no common class
            raise KmtrError(
                f"{file}: the MLflow store cannot be made or migrated: {brief(error)}; if another version of MLflow "
                "wrote it, use that one, or set tracking.uri to another file"
            ) from error


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Holds the lock beside a SQLite store; it goes with its process, so that nobody waits for a dead one."""
    from filelock import FileLock, Timeout

    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{file}.lock")
    try:
        lock.acquire(timeout=PATIENCE_S)
    except Timeout:
        log.warning("%s: another job makes or migrates this MLflow store; waiting until it is done", file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _version(file: Path) -> tuple[str | None, bool]:
    """Schema version of a SQLite store, None in one that has none yet; whether it is filled, which MLflow does last."""
    if not file.exists():
        return None, False
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            filled = connection.execute("SELECT 1 FROM experiments LIMIT 1").fetchone() is not None
    except sqlite3.Error:  # no such table yet; what is worse, MLflow says itself
        return None, False
    return (row[0] if row else None), filled


def _current(file: Path) -> bool:
    """True if a SQLite store is complete and of the installed MLflow."""
    from mlflow.store.db.utils import _get_latest_schema_revision  # as `mlflow db upgrade` does; no public name

    version, filled = _version(file)
    return filled and version == _get_latest_schema_revision()


def _migrate(uri: str, file: Path) -> None:
    """Brings a store of an earlier MLflow up to date; its copy stays. An empty one is made by MLflow's own client."""
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config, _get_latest_schema_revision, _upgrade_db
    from sqlalchemy import create_engine

    version, filled = _version(file)
    if version in (None, _get_latest_schema_revision()):
        return
    known = ScriptDirectory.from_config(_get_alembic_config("sqlite://")).walk_revisions()
    if version not in {script.revision for script in known}:
        raise KmtrError(f"its schema {version} is not known to the installed MLflow, which is older")
    if filled:
        copy = file.with_name(f"{file.name}.{version}")
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        log.warning("%s: an MLflow store of an earlier version is migrated; %s is as it was", file, copy.name)
    engine = create_engine(uri)
    try:
        _upgrade_db(engine)
    finally:
        engine.dispose()


@contextmanager
def reaching(uri: str) -> Iterator[MlflowClient]:
    """A client, and one line that says which store it was for what MLflow, the network or the database raise inside.

    Raises:
        KmtrError: the store does not answer or refuses.
    """
    prepare()
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield client(uri)
    except (MlflowException, SQLAlchemyError, CommandError, OSError) as error:
        raise KmtrError(
            f"MLflow at {redact(uri)} failed: {brief(error)}; start the server again, or change tracking.uri"
        ) from error


def brief(error: BaseException) -> str:
    """One line of at most 200 characters, without passwords."""
    line = redact(" ".join(str(error).split()))
    return f"{type(error).__name__}: " + (line if len(line) <= 200 else line[:197] + "...")
