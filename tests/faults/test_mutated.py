"""What people hand in, changed at random: each is taken as it was, or refused in one line; nothing else happens.

KMTR_MUTATIONS=10000 python -m pytest tests/faults/test_mutated.py       so many in all; by default 500
"""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import maps_of, model_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kmtr import area_maps
from kmtr.card import FILES
from kmtr.config import RunConfig, flatten, parse, typed
from kmtr.config.recipes import RECIPES, tiny
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader.collate import collate
from kmtr.encoder import load_encoder
from kmtr.exported import export_encoder
from kmtr.inference import load_model
from kmtr.model.encoder import line_encoder
from kmtr.train import checkpoint
from kmtr.train.state import Content
from kmtr.types import KmtrError

KINDS = 5
EXAMPLES = int(os.environ.get("KMTR_MUTATIONS", "500")) // KINDS
MEMORY = 1 << 29
"""Bytes that all mutations together may add to the process at most."""

many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class Mutation:
    """A change of a file's bytes: at a share of its length."""

    kind: str
    at: float
    content: bytes

    def __call__(self, whole: bytes) -> bytes:
        place, size = int(self.at * max(len(whole) - 1, 0)), len(self.content)
        if self.kind == "cut":
            return whole[:place]
        if self.kind == "insert":
            return whole[:place] + self.content + whole[place:]
        if self.kind == "remove":
            return whole[:place] + whole[place + size :]
        if self.kind == "flip" and whole:
            return whole[:place] + bytes([whole[place] ^ (1 << size % 8)]) + whole[place + 1 :]
        return whole[:place] + self.content + whole[place + size :]


bytes_changed = st.builds(
    Mutation,
    st.sampled_from(["flip", "cut", "insert", "remove", "write"]),
    st.floats(0, 1),
    st.one_of(
        st.binary(min_size=1, max_size=64), st.sampled_from([b"\0" * 64, b"\xff" * 8, b"../" * 9, b"1e999", b"-1"])
    ),
)
NAN, GONE = float("nan"), "gone"
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    float("nan"),
    "",
    "../../x",
    "1",
    [],
    {},
    [[]],
    {"a": 1},
    "\0",
    [None],
]


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else []
    return [(content, key) for key in keys] + [place for key in keys for place in places(content[key])]


def value_at(turn: int, odd: Any) -> Callable[[bytes], bytes]:
    """Another value, or none, at some place of a JSON file."""

    def change(whole: bytes) -> bytes:
        content = json.loads(whole)
        every = places(content)
        container, key = every[turn % len(every)]
        if odd == GONE:
            del container[key]
        else:
            container[key] = odd
        return json.dumps(content).encode()

    return change


value_changed = st.builds(value_at, st.integers(0, 1 << 20), st.sampled_from([*ODD, GONE]))


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """What asks for a lot of memory gets an error, and takes no other process's."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def taken_or_refused(call: Callable[[], Any]) -> Any:
    """What `call` returns; None where it refused, in one line."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, said = None, "taken"
    try:
        found = call()
    except KmtrError as error:
        said = str(error)
    assert said
    assert "\n" not in said
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY
    return found


def changed(source: Path, target: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of a folder in which one file is changed."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    (target / name).write_bytes(change((target / name).read_bytes()))
    return target


# ------------------------------------------------------------------------------------------ dataset


def content_of(root: Path, config: RunConfig) -> np.ndarray:
    """K-space of the training subjects."""
    reader = Dataset.of(str(root)).reader("train", config.data)
    batch = collate(reader.samples(range(len(reader))), config)
    return np.asarray(batch.stored.numpy())


@pytest.fixture(scope="module")
def few(small: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    root = tmp_path_factory.mktemp("few") / "data"
    shutil.copytree(small.data.root, root)
    return root, content_of(root, small)


@many
@given(change=bytes_changed)
def test_a_shard(change: Mutation, few: tuple[Path, np.ndarray], small: RunConfig, tmp_path: Path) -> None:
    root, whole = few
    (name,) = [path.name for path in sorted((root / "shards").glob("train-*.parquet"))[:1]]
    place = changed(root, tmp_path / "data", f"shards/{name}", change)
    found = taken_or_refused(lambda: content_of(place, small))
    assert found is None or np.array_equal(found, whole), "other numbers than were written, without a word"


@many
@given(change=st.one_of(bytes_changed, value_changed))
def test_a_manifest(
    change: Callable[[bytes], bytes], few: tuple[Path, np.ndarray], small: RunConfig, tmp_path: Path
) -> None:
    root, _ = few
    place = changed(root, tmp_path / "data", "manifest.json", change)
    taken_or_refused(lambda: content_of(place, small))


# ------------------------------------------------------------------------------------------ settings

KEYS = sorted(flatten(tiny()))
VALUES = sorted({typed(value) for value in flatten(tiny()).values()})
words = st.one_of(
    st.builds("{}={}".format, st.sampled_from(KEYS), st.one_of(st.text(max_size=20), st.sampled_from(VALUES))),
    st.builds("{}={}".format, st.text(max_size=20), st.text(max_size=20)),
    st.text(max_size=30),
    st.builds("{}={}".format, st.sampled_from(KEYS), st.one_of(st.integers(), st.floats()).map(str)),
)


@many
@given(given_words=st.lists(words, min_size=1, max_size=4))
def test_settings(given_words: list[str]) -> None:
    config = taken_or_refused(lambda: parse(given_words, "tiny", RECIPES))
    assert config is None or isinstance(config, RunConfig)


# ------------------------------------------------------------------------------------------ checkpoints


class Pieces:
    """What `checkpoint.save` asks of an engine."""

    def collect(self) -> Content:
        return Content({"weight:0:a": torch.arange(64.0), "exp_avg:0:a": torch.ones(64)}, updates=7)

    def shapes(self) -> dict[str, list[int]]:
        return {"a": [8, 8]}


@pytest.fixture(scope="module")
def saved(small: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    folder.mkdir()
    progress = checkpoint.Progress(step=7, metrics={"val/kspace_loss": 0.5}, layouts=[(0, {"workers": 1})])
    checkpoint.collect.__wrapped__(Pieces(), progress, small, 0, 1).write(folder)  # type: ignore[attr-defined]
    return folder


@many
@given(
    name=st.sampled_from([checkpoint.HEAD, "state-rank00.safetensors", "sha256-rank00.json"]),
    change=bytes_changed,
    value=st.one_of(st.none(), value_changed),
)
def test_a_checkpoint(
    name: str, change: Mutation, value: Callable[[bytes], bytes] | None, saved: Path, small: RunConfig, tmp_path: Path
) -> None:
    how = value if value is not None and name.endswith(".json") else change
    place = changed(saved, tmp_path / "checkpoint", name, how)

    def read() -> checkpoint.Progress:
        checkpoint.check_whole(place, 0, 1)
        return checkpoint.fitting(place, {"a": [8, 8]}, small)

    found = taken_or_refused(read)
    same = all(
        (place / one.name).read_bytes() == one.read_bytes() for one in saved.iterdir() if "sha256" not in one.name
    )
    assert found is None or same, "another checkpoint than was written, without a word"


# ------------------------------------------------------------------------------------------ encoders and models


@pytest.fixture(scope="module")
def exported(small: RunConfig, tables: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    export_encoder(folder / "encoder", small, line_encoder(small.data, small.model).state_dict(), tables)
    model_folder(folder / "model", small, tables, ("phenotypes", "segmentation"))
    area_maps.export(folder / "model", maps_of(small, ("lvedv_ml",)))
    return folder


EXPORTED = ("encoder/encoder.json", "encoder/encoder.safetensors", *(f"model/{name}" for name in FILES))


@many
@given(
    name=st.sampled_from(EXPORTED),
    change=bytes_changed,
    value=st.one_of(st.none(), value_changed),
)
def test_an_encoder_or_a_model(
    name: str, change: Mutation, value: Callable[[bytes], bytes] | None, exported: Path, tmp_path: Path
) -> None:
    kind, file = name.split("/")
    how = value if value is not None and name.endswith(".json") else change
    place = changed(exported / kind, tmp_path / kind, file, how)
    load = load_encoder if kind == "encoder" else load_model
    taken_or_refused(lambda: load(place))
