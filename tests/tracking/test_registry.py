"""A registered model, on a real SQLite store: any MLflow loads it, without Ray, and it is no pickle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from exported import TARGETS, model_folder

import kmtr
from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import statistics
from kmtr.data.sources import read
from kmtr.exported import MODEL_HEAD, WEIGHTS, export_encoder
from kmtr.model.encoder import line_encoder
from kmtr.tracking import fetch, open_run, point, register, tracking_uri
from kmtr.tracking.store import client
from kmtr.train.resolve import open_data
from kmtr.types import InputError

pytestmark = pytest.mark.slow

ASK = """
import json, sys
import mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
study = sys.argv[3]
print(json.dumps({
    "given": model.predict(pandas.DataFrame({"path": [study, study], "acceleration": [2, 4]})).to_dict("list"),
    "all": model.predict(pandas.DataFrame({"path": [study]})).to_dict("list"),
    "ray": "ray" in sys.modules,
    "inputs": [one["name"] for one in model.metadata.signature.inputs.to_dict()],
    "outputs": [one["name"] for one in model.metadata.signature.outputs.to_dict()],
}))
"""


def test_it_is_registered_once_and_any_process_loads_it(
    small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = override(small, {"storage.root": str(tmp_path / "runs"), "data.views": ("sax",)})
    tables = statistics.fit(config, Dataset.open(config.data).reader("train", config.data)).tensors()
    folder = model_folder(tmp_path / "runs" / "model", config, tables)
    uri = tracking_uri(config)
    run_id = open_run(config, name="tuned")
    assert register(uri, run_id, "heart", folder) == ("1", True)
    assert register(uri, run_id, "heart", folder) == ("1", False)
    assert register(uri, open_run(config, name="again"), "heart", folder) == ("2", True)
    client(uri).set_registered_model_alias("heart", "clinic", "1")
    saved = fetch(uri, "models:/heart/latest", tmp_path / "latest")
    assert (saved / MODEL_HEAD).read_bytes() == (folder / MODEL_HEAD).read_bytes()
    assert "not a medical device" in (saved / "README.md").read_text()
    whole = tmp_path / "latest"
    assert [path for path in whole.rglob("*") if path.suffix in (".pkl", ".pt", ".pth", ".bin")] == []
    assert kmtr.load_model(fetch(uri, "models:/heart@clinic", tmp_path / "clinic")).units.keys() == set(TARGETS)

    values = np.random.default_rng(0).random((32, 32, 2, 4), np.float32)
    path = tmp_path / "study" / "sub-1" / "sax.nii.gz"
    path.parent.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1.5, 1.5, 8.0, 1.0])), path)
    command = [sys.executable, "-W", "ignore", "-c", ASK, uri, "models:/heart@clinic", str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert not said["ray"]
    assert said["inputs"] == ["path", "acceleration"]
    assert said["outputs"] == list(TARGETS)
    model, study = kmtr.load_model(folder), read(str(path))
    with pytest.warns(UserWarning, match="R = "):
        alone = {r: model.predict(study, acceleration=r) for r in (2, 4, None)}
    for target in TARGETS:
        np.testing.assert_allclose(said["given"][target], [alone[2][target], alone[4][target]], rtol=1e-5)
        np.testing.assert_allclose(said["all"][target], [alone[None][target]], rtol=1e-5)

    for asked, says in (
        ("models:/heart", "expected models:/name/version"),
        ("models:/heart/7", "which is not there"),
        ("models:/heart@nobody", "which is not there"),
        ("models:/liver/latest", "which has no version"),
    ):
        with pytest.raises(InputError, match=says) as error:
            fetch(uri, asked, tmp_path / "none")
        assert "\n" not in str(error.value)


def aliases(uri: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in client(uri).get_registered_model("reader").aliases.items()}


def test_an_encoder_is_registered_beside_models_and_found_by_its_alias(
    small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own it gives the embedding that its folder gives; a command downloads it once."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = override(small, {"storage.root": str(tmp_path / "runs"), "data.views": ("sax",)})
    tables = statistics.fit(config, Dataset.open(config.data).reader("train", config.data)).tensors()
    torch.manual_seed(5)
    weights = line_encoder(config.data, config.model).state_dict()
    folder = tmp_path / "runs" / "encoder"
    export_encoder(folder, config, weights, tables)
    uri = tracking_uri(config)
    runs = [open_run(config, name=name) for name in ("first", "second")]
    assert [register(uri, run_id, "reader", folder)[0] for run_id in runs] == ["1", "2"]
    point(uri, "reader", "1", {"best": True, "confirmed": True}, "confirmed: trial 3")
    point(uri, "reader", "2", {"best": True, "confirmed": False}, "no difference", ours=[runs[1]])
    assert aliases(uri) == {"best": "2", "confirmed": "1"}
    assert client(uri).get_model_version("reader", "2").description == "no difference"
    point(uri, "reader", "2", {"best": True, "confirmed": False}, "no difference", ours=runs)
    assert aliases(uri) == {"best": "2"}

    path = tmp_path / "study" / "sub-1" / "sax.nii.gz"
    path.parent.mkdir(parents=True)
    values = np.random.default_rng(0).random((32, 32, 2, 4), np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1.5, 1.5, 8.0, 1.0])), path)
    command = [sys.executable, "-W", "ignore", "-c", ASK, uri, "models:/reader@best", str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["outputs"], said["ray"]) == (["embedding"], False)
    encoder, study = kmtr.load_encoder(folder), read(str(path))
    np.testing.assert_allclose(said["given"]["embedding"][1], encoder(study, acceleration=4), atol=1e-5)
    np.testing.assert_allclose(said["all"]["embedding"][0], encoder(study), atol=1e-5)

    asked = override(config, {"evaluate.encoder": "models:/reader@best", "tracking.uri": uri})
    for _ in range(2):
        place = Path(open_data(asked)[0].evaluate.encoder)
        assert (place / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert [one.name for one in (tmp_path / "runs" / "registered").iterdir()] == [f"reader-2-{runs[1][:8]}"]
    with pytest.raises(InputError, match=r"expected a model that jobs/finetune\.py registered"):
        fetch(uri, "models:/reader/1", tmp_path / "model")
