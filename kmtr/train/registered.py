"""Registration of what was trained in MLflow's registry: encoders as `tracking.encoder`, models as `tracking.model`."""

from __future__ import annotations

from pathlib import Path

from kmtr import tracking
from kmtr.config import RunConfig
from kmtr.train import start
from kmtr.types import InputError


def asked(config: RunConfig) -> str:
    """Name that what a run leaves is to have in the registry; empty: none."""
    return config.tracking.model if config.stage == "task" else config.tracking.encoder


def check(config: RunConfig) -> None:
    """Refuse a model that could not be registered, before it is trained.

    Raises:
        InputError: it predicts no numbers.
    """
    if asked(config) and config.stage == "task" and not start.labels_of(config):
        raise InputError(
            "tracking.model: expected a task that predicts numbers (phenotypes, diseases), which a registered model "
            f"answers with, got task.tasks={','.join(config.task.tasks)}; jobs/predict.py writes masks and images"
        )


def register(config: RunConfig, run_id: str, exported: str) -> dict[str, str]:
    """Put an encoder or model into the registry, or find it there: ``registered``, its address; empty: it is not asked
    for.

    Args:
        run_id: of the run that trained it.
        exported: its folder.
    """
    name = asked(config)
    if not name:
        return {}
    version, new = tracking.register(config.tracking.uri, run_id, name, Path(exported))
    uri = f"models:/{name}/{version}"
    print(f"  registry  {uri}{f', also models:/{name}/latest' if new else ', registered before'}")
    return {"registered": uri}
