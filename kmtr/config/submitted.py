"""Paths of a command that `ray job submit` runs in a throwaway copy of the project."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kmtr.config.recipes import RECIPES, named
from kmtr.config.whole import RunConfig
from kmtr.types import InputError


def data_root(words: Sequence[str]) -> Path:
    """Absolute default of data.root of a command as it is typed (``study labels tiny key=value ...``): its recipe's."""
    command, *rest = words or [""]
    recipe = named(command, rest)
    return Path((RECIPES[recipe]() if recipe else RunConfig()).data.root).absolute()


def under_submit() -> bool:
    """True in a command that `ray job submit` started."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def refuse_relative_under_submit(config: RunConfig) -> None:
    """Refuse relative paths under `ray job submit`: they would be lost with the working directory.

    Raises:
        InputError: a path is relative; says which key.
    """
    if not under_submit():
        return
    tracking = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    paths = [("data.root", config.data.root), ("storage.root", config.storage.root)]
    optional = {
        "sampling.file": config.sampling.file,
        "shards.split_from": config.shards.split_from,
        "ingest.labels": config.ingest.labels,
        "predict.out": config.predict.out,
    }
    paths += [(key, path) for key, path in optional.items() if path]
    if tracking.startswith("sqlite:///") and not tracking.startswith("sqlite:////"):
        paths.append(("tracking.uri", tracking.removeprefix("sqlite:///")))
    for key, path in paths:
        if "://" not in path and not os.path.isabs(path):
            raise InputError(
                f"{key}: expected an absolute path under ray job submit, since the working directory is a throwaway "
                f"upload, got {path!r}; use make submit, or pass {key}=/absolute/path"
            )
