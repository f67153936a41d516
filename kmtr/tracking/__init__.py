"""MLflow tracking: one run per training, a disk spool between training and the server. The only folder with mlflow.

``import mlflow`` costs seconds, so it happens inside functions, never when this package is imported.
"""

from kmtr.tracking.nodes import readings, send_rest
from kmtr.tracking.origin import command, started_by, versions
from kmtr.tracking.registry import fetch, kept, point, register
from kmtr.tracking.run import Status, end_run, find_run, log_dataset, open_run, recorded
from kmtr.tracking.spool import Spool, ended, history, moments, owner, replay, send, unsent
from kmtr.tracking.store import tracking_uri, where

__all__ = [
    "Spool",
    "Status",
    "command",
    "end_run",
    "ended",
    "fetch",
    "find_run",
    "history",
    "kept",
    "log_dataset",
    "moments",
    "open_run",
    "owner",
    "point",
    "readings",
    "recorded",
    "register",
    "replay",
    "send",
    "send_rest",
    "started_by",
    "tracking_uri",
    "unsent",
    "versions",
    "where",
]
