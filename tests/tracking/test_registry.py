"""A registered model, on a real SQLite store: any MLflow loads it, without Ray, and it is no pickle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from exported import TARGETS, model_folder

import kmtr
from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import statistics
from kmtr.data.sources import read
from kmtr.exported import MODEL_HEAD
from kmtr.tracking import fetch, open_run, register, tracking_uri
from kmtr.tracking.store import client
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
