"""Sends what the runs of a folder could not send while MLflow was away."""

from __future__ import annotations

from typing import Any

from kmtr.config import RunConfig
from kmtr.owner import owned
from kmtr.tracking import replay, tracking_uri, unsent
from kmtr.tracking.spool import SPOOL
from kmtr.tracking.store import local_path
from kmtr.types import InputError, KmtrError

WAIT_S = 20.0
"""Time for the records of one spool while MLflow does not answer."""


def run(config: RunConfig) -> dict[str, Any]:
    """Send, with a line for each run that had something left; what the last line on stdout says.

    Raises:
        InputError: storage.root is no local folder.
    """
    root = local_path(config.storage.root)
    if root is None or not root.is_dir():
        raise InputError(f"storage.root: expected a folder with runs, got {config.storage.root}")
    uri = tracking_uri(config)
    total = {"runs": 0, "sent": 0, "left": 0}
    for folder in sorted(path.parent for path in root.rglob(SPOOL)):
        name = folder.parent.relative_to(root)
        if owned(folder.parent):
            print(f"send: {name}: a command is at work on it, and sends by itself", flush=True)
            continue
        before = unsent(folder)
        if not before:
            continue
        try:
            left = replay(folder, uri, WAIT_S)
        except KmtrError as error:
            print(f"send: {name}: {error}", flush=True)
            left = before
        total = {"runs": total["runs"] + 1, "sent": total["sent"] + before - left, "left": total["left"] + left}
        print(f"send: {name}: {before - left} of {before} records sent", flush=True)
    return total
