"""MLflow's model registry: exported models as versions that MLflow loads as Python functions, and back to a folder.

A version is saved through a loader module (`kmtr.served`), never as a Python object: nothing of it is unpickled.
"""

from __future__ import annotations

import json
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmtr.exported import MODEL_HEAD, MODEL_WEIGHTS
from kmtr.tracking.store import SERVERS, reaching
from kmtr.types import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOADER = "kmtr.served"
SCHEME = "models:/"
_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+|latest)|@(?P<alias>[^/@]+))")


def register(uri: str, run_id: str, name: str, folder: Path) -> tuple[str, bool]:
    """Make the model in a folder a new version of a registered model, which MLflow calls ``models:/name/latest`` then.

    Args:
        uri: the store, `tracking_uri(config)`.
        run_id: of the run that made the model; it has one version of each name at most.

    Returns:
        Number of the version, and whether it is new.

    Raises:
        KmtrError: the store cannot be reached or refuses.
    """
    with reaching(uri) as mlflow:
        known = [one for one in mlflow.search_model_versions(f"name = '{name}'") if one.run_id == run_id]
        if known:
            return str(known[0].version), False
        run = mlflow.get_run(run_id)
        logged = mlflow.create_logged_model(run.info.experiment_id, name=name, source_run_id=run_id)
        with tempfile.TemporaryDirectory() as place:
            save(folder, Path(place) / "saved", logged.model_id, run_id)
            mlflow.log_model_artifacts(logged.model_id, str(Path(place) / "saved"))
        mlflow.finalize_logged_model(logged.model_id, "READY")
        _named(mlflow, name)
        # A database's client would look a models:/ source up in MLflow's global store, which is another one.
        source = f"{SCHEME}{logged.model_id}" if uri.partition(":")[0] in SERVERS else logged.artifact_location
        made = mlflow.create_model_version(name, source, run_id=run_id, model_id=logged.model_id)
        return str(made.version), True


def save(folder: Path, target: Path, model_id: str | None = None, run_id: str | None = None) -> None:
    """Save the model in a folder as MLflow keeps one: its files, the loader module, and a signature.

    Input: a row per study, `path` of its file or folder and, optionally, `acceleration` (nominal R that is drawn; 0:
    all lines that the study has). Output: a column per number that the model predicts.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    units = json.loads((folder / MODEL_HEAD).read_text())["units"]
    inputs: list[Any] = [ColSpec(DataType.string, "path"), ColSpec(DataType.long, "acceleration", required=False)]
    outputs: list[Any] = [ColSpec(DataType.double, name) for name in units]
    mlflow.pyfunc.save_model(
        str(target),
        loader_module=LOADER,
        data_path=str(folder),
        mlflow_model=Model(model_id=model_id, run_id=run_id),
        signature=ModelSignature(Schema(inputs), Schema(outputs)),
        pip_requirements=[f"kmtr=={version('kmtr')}"],
        metadata={"units": units},
    )


def fetch(uri: str, model: str, place: Path) -> Path:
    """Folder of a registered model, downloaded to `place`; for `kmtr.load_model`.

    Args:
        uri: the store.
        model: ``models:/name/version``, ``models:/name/latest`` or ``models:/name@alias``.

    Raises:
        InputError: another form, no such model, or one that kmtr did not register.
        KmtrError: the store cannot be reached.
    """
    found = _URI.fullmatch(model)
    if found is None:
        raise InputError(
            f"model: expected models:/name/version, models:/name/latest or models:/name@alias, got {model!r}"
        )
    with reaching(uri) as mlflow:
        from mlflow.artifacts import download_artifacts

        where = _files(mlflow, model, found.groupdict())
        saved = Path(download_artifacts(where, dst_path=str(place), tracking_uri=uri))
    for head in sorted(saved.glob(f"data/*/{MODEL_HEAD}")):
        if (head.parent / MODEL_WEIGHTS).is_file():
            return head.parent
    raise InputError(f"model: expected a model that jobs/finetune.py registered, got {model} of another kind")


def _files(mlflow: MlflowClient, model: str, asked: dict[str, Any]) -> str:
    """Address of the files of a version; models:/ itself would be looked up in MLflow's global store."""
    from mlflow.exceptions import MlflowException

    try:
        if asked["alias"]:
            one: Any = mlflow.get_model_version_by_alias(asked["name"], asked["alias"])
        elif asked["version"] == "latest":
            one = max(mlflow.search_model_versions(f"name = '{asked['name']}'"), key=lambda some: int(some.version))
        else:
            one = mlflow.get_model_version(asked["name"], asked["version"])
    except ValueError:
        raise InputError(f"model: expected one of MLflow's registry, got {model}, which has no version") from None
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise InputError(f"model: expected one of MLflow's registry, got {model}, which is not there") from None
        raise
    return str(mlflow.get_model_version_download_uri(one.name, str(one.version)))


def _named(mlflow: MlflowClient, name: str) -> None:
    """Make the registered model, unless it is there."""
    from mlflow.exceptions import MlflowException

    try:
        mlflow.create_registered_model(name, description="k-MTR; a research model, not a medical device")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
