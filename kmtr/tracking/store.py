"""Where the MLflow store is and how it is reached: absolute addresses, short timeouts, no password in any message."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from kmtr.config import RunConfig
from kmtr.types import InputError, KmtrError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SERVERS = ("http", "https", "databricks", "databricks-uc")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default blocks for about four minutes when the server is down
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing about a run of patient data leaves for a third party
}
"""Set before mlflow is imported, where the user has not set them."""

_PASSWORD = re.compile(r"(?<=://)[^/\s@'\"]*@")


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
    """Where a new experiment keeps its files: ``storage.root/artifacts``; None: a server decides.

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
    """A client of its own for this store; neither reads nor sets MLflow's global state."""
    prepare()
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # "Creating initial tables", at each new store
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line per retry; we tell it once
    return MlflowClient(tracking_uri=uri)


@contextmanager
def reaching(uri: str) -> Iterator[MlflowClient]:
    """A client, and one line that says which store it was for what MLflow, the network or the database raise inside.

    Raises:
        KmtrError: the store does not answer or refuses.
    """
    prepare()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield client(uri)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise KmtrError(
            f"MLflow at {redact(uri)} failed: {brief(error)}; start the server again, or change tracking.uri"
        ) from error


def brief(error: BaseException) -> str:
    """One line of at most 200 characters, without passwords."""
    line = redact(" ".join(str(error).split()))
    return f"{type(error).__name__}: " + (line if len(line) <= 200 else line[:197] + "...")


def redact(text: str) -> str:
    """``scheme://user:password@host`` -> ``scheme://***@host``, anywhere in the text."""
    return _PASSWORD.sub("***@", text)
