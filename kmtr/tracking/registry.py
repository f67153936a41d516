"""MLflow's model registry: exported encoders and models as versions that MLflow loads as Python functions, and back to
a folder.

A version is saved through a loader module (`kmtr.served`), never as a Python object: nothing of it is unpickled.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmtr.exported import HEAD, MODEL_HEAD, MODEL_WEIGHTS, WEIGHTS
from kmtr.tracking.store import SERVERS, reaching
from kmtr.types import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

LOADER = "kmtr.served"
SCHEME = "models:/"
REGISTERED = "registered"
"""Folder in storage.root of what `kept` downloads."""
_FILES = {
    HEAD: (WEIGHTS, "an encoder that jobs/pretrain.py"),
    MODEL_HEAD: (MODEL_WEIGHTS, "a model that jobs/finetune.py"),
}
_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+|latest)|@(?P<alias>[^/@]+))")


def register(uri: str, run_id: str, name: str, folder: Path) -> tuple[str, bool]:
    """Make the encoder or model in a folder a new version of a registered model, which MLflow calls
    ``models:/name/latest`` then.

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


def point(
    uri: str, name: str, version: str, aliases: Mapping[str, bool], said: str, ours: Collection[str] = ()
) -> None:
    """Describe a version, and point aliases at it.

    Args:
        aliases: alias -> True: ``models:/name@alias`` is this version from now on; False: it is taken from the version
            that has it, if one of `ours` made that.
        said: description of the version.
        ours: ids of runs.

    Raises:
        KmtrError: the store cannot be reached or refuses.
    """
    with reaching(uri) as mlflow:
        mlflow.update_model_version(name, version, description=said)
        known = mlflow.get_registered_model(name).aliases
        for alias, holds in aliases.items():
            if holds:
                mlflow.set_registered_model_alias(name, alias, version)
            elif alias in known and mlflow.get_model_version(name, str(known[alias])).run_id in ours:
                mlflow.delete_registered_model_alias(name, alias)


def save(folder: Path, target: Path, model_id: str | None = None, run_id: str | None = None) -> None:
    """Save the encoder or model in a folder as MLflow keeps one: its files, the loader module, and a signature.

    Input: a row per study, `path` of its file or folder and, optionally, `acceleration` (nominal R that is drawn; 0:
    all lines that the study has). Output: a column per number that a model predicts; of an encoder `embedding`, an
    array.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    encodes = (folder / HEAD).is_file()
    head = {} if encodes else json.loads((folder / MODEL_HEAD).read_text())
    units = head.get("units", {})
    extra = "[baselines]" if head.get("settings", {}).get("task.system") in ("unet", "resnet50", "xf") else ""
    inputs: list[Any] = [ColSpec(DataType.string, "path"), ColSpec(DataType.long, "acceleration", required=False)]
    outputs: list[Any] = [ColSpec(DataType.double, name) for name in units]
    outputs += [ColSpec(Array(DataType.double), "embedding")] if encodes else []
    mlflow.pyfunc.save_model(
        str(target),
        loader_module=LOADER,
        data_path=str(folder),
        mlflow_model=Model(model_id=model_id, run_id=run_id),
        signature=ModelSignature(Schema(inputs), Schema(outputs)),
        pip_requirements=[f"kmtr{extra}=={version('kmtr')}"],
        metadata={"units": units},
    )


def fetch(uri: str, model: str, place: Path, head: str = MODEL_HEAD) -> Path:
    """Folder of a registered model, downloaded to `place`; for `kmtr.load_model`.

    Args:
        uri: the store.
        model: ``models:/name/version``, ``models:/name/latest`` or ``models:/name@alias``.
        head: file that its folder has; `HEAD`: an encoder is wanted, for `kmtr.load_encoder`.

    Raises:
        InputError: another form, no such model, or one that kmtr did not register.
        KmtrError: the store cannot be reached.
    """
    with reaching(uri) as mlflow:
        _download(mlflow, uri, _version(mlflow, model), place)
    return _inside(place, model, head)


def kept(uri: str, model: str, root: Path, head: str = HEAD) -> Path:
    """As `fetch`, to a folder in `root` of each version, downloaded once; by default for an encoder.

    Raises:
        InputError: another form, no such model, or one of another kind.
        KmtrError: the store cannot be reached.
    """
    with reaching(uri) as mlflow:
        one = _version(mlflow, model)
        place = root / REGISTERED / f"{one.name}-{one.version}-{(one.run_id or '')[:8]}"
        if not place.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place.parent) as half:
                _download(mlflow, uri, one, Path(half) / "whole")
                try:
                    (Path(half) / "whole").rename(place)
                except OSError:
                    if not place.is_dir():  # else another command was as fast
                        raise
        log.warning("%s is version %s", model, one.version)
    return _inside(place, model, head)


def _inside(place: Path, model: str, head: str) -> Path:
    """The exported folder among downloaded files."""
    weights, kind = _FILES[head]
    for found in sorted(place.glob(f"**/data/*/{head}")):
        if (found.parent / weights).is_file():
            return found.parent
    raise InputError(f"model: expected {kind} registered, got {model} of another kind")


def _download(mlflow: MlflowClient, uri: str, one: Any, place: Path) -> None:
    """The files of a version; models:/ itself would be looked up in MLflow's global store."""
    from mlflow.artifacts import download_artifacts

    place.mkdir(parents=True, exist_ok=True)
    where = str(mlflow.get_model_version_download_uri(one.name, str(one.version)))
    download_artifacts(where, dst_path=str(place), tracking_uri=uri)


def _version(mlflow: MlflowClient, model: str) -> Any:
    """The version that an address names.

    Raises:
        InputError: another form, or no such model.
    """
    from mlflow.exceptions import MlflowException

    found = _URI.fullmatch(model)
    if found is None:
        raise InputError(
            f"model: expected models:/name/version, models:/name/latest or models:/name@alias, got {model!r}"
        )
    asked = found.groupdict()
    try:
        if asked["alias"]:
            return mlflow.get_model_version_by_alias(asked["name"], asked["alias"])
        if asked["version"] == "latest":
            return max(mlflow.search_model_versions(f"name = '{asked['name']}'"), key=lambda some: int(some.version))
        return mlflow.get_model_version(asked["name"], asked["version"])
    except ValueError:
        raise InputError(f"model: expected one of MLflow's registry, got {model}, which has no version") from None
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise InputError(f"model: expected one of MLflow's registry, got {model}, which is not there") from None
        raise


def _named(mlflow: MlflowClient, name: str) -> None:
    """Make the registered model, unless it is there."""
    from mlflow.exceptions import MlflowException

    try:
        mlflow.create_registered_model(name, description="k-MTR; a research model, not a medical device")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
