"""A run is found again by what it is, and another run's folder is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kmtr.config import RunConfig, override
from kmtr.config.recipes import RECIPES
from kmtr.data.dataset.reader import Dataset
from kmtr.train import driver, folder
from kmtr.types import InputError, KmtrError

NAMES = {"tiny": "tiny-962af888", "base": "base-7d8da823", "large": "large-36d4c3bd"}
"""Of the recipes over a dataset of digest 0: a new key with its default renames no run."""


def begun(config: RunConfig) -> Path:
    dataset = Dataset.open(config.data)
    _, place = folder.run_folder(config, dataset)
    folder.begin(place, config, dataset)
    return place


@pytest.fixture
def named(small: RunConfig, tmp_path: Path) -> RunConfig:
    return override(small, {"run.name": "w2", "storage.root": str(tmp_path / "runs")})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 7}, "seed: run w2 has 0, got 7"),
        ({"masked.mask_ratio": 0.9}, "masked.mask_ratio: run w2 has 0.5, got 0.9"),
        ({"masked.steps": 5}, "masked.steps: run w2 has 4, got 5"),
        ({"sampling.accelerations": (4,)}, "sampling.accelerations: run w2 has 2,4, got 4"),
        ({"train.bf16": True}, "train.bf16: run w2 has False, got True"),
    ],
)
def test_a_name_does_not_make_two_runs_one(named: RunConfig, change: dict[str, object], said: str) -> None:
    place = begun(named)
    with pytest.raises(InputError, match=f"^{said}; take another run.name, or run.fresh=true$"):
        folder.run_folder(override(named, change), Dataset.open(named.data))
    folder.finish(folder.Outcome("id", "w2", str(place), "", {}))
    with pytest.raises(InputError, match=said):
        driver.fit(override(named, change))
    fresh = override(named, change | {"run.fresh": True})
    assert folder.run_folder(fresh, Dataset.open(named.data))[0] == "w2.2"


def test_other_data_under_the_name_is_refused(named: RunConfig) -> None:
    place = begun(named)
    known = json.loads((place / folder.IDENTITY).read_text())
    (place / folder.IDENTITY).write_text(json.dumps(known | {"dataset": "0" * 64}))
    with pytest.raises(InputError, match=r"^data\.root: run w2 learnt from other data"):
        folder.run_folder(named, Dataset.open(named.data))


@pytest.mark.parametrize(
    "change",
    [
        {"train.workers": 4},
        {"train.zero_stage": 3},
        {"train.accumulation": 4},
        {"data.loader": "ray"},
        {"search.trials": 9},
    ],
)
def test_how_a_run_is_executed_may_change(named: RunConfig, change: dict[str, object]) -> None:
    place = begun(named)
    assert folder.run_folder(override(named, change), Dataset.open(named.data)) == ("w2", place)


@pytest.mark.parametrize("name", ["../evil", "/abs", "a/b", "..", ".hidden", "a b", "x" * 101, "it's"])
def test_a_name_stays_in_storage_root(small: RunConfig, name: str) -> None:
    with pytest.raises(InputError, match=r"^run\.name: expected letters, digits and _\.\+- \(at most 100\)"):
        override(small, {"run.name": name})


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_keep_their_names(recipe: str) -> None:
    assert RECIPES[recipe]().run_name("0" * 64) == NAMES[recipe]


def test_a_password_stays_out_of_files_and_errors(forked: None, config: RunConfig) -> None:
    """The store does not answer, so the run ends where it opens it, behind all that it writes of its settings."""
    config = override(config, {"tracking.uri": "http://somebody:secret@127.0.0.1:9"})
    with pytest.raises(KmtrError, match=r"^MLflow at http://\*\*\*@127.0.0.1:9 failed") as caught:
        driver.fit(config, quiet=True)
    assert "secret" not in str(caught.value)
    written = [path for path in Path(config.storage.root).rglob("*") if path.is_file()]
    assert "config.json" in {path.name for path in written}
    assert not [path for path in written if b"secret" in path.read_bytes()]
