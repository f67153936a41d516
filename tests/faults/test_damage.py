"""Checkpoints damaged while nobody trains: an earlier one serves, with the same numbers, or one line says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import forked_workers
import pytest
from forked_workers import Dying, instead_of_ray_train
from torch.multiprocessing import ProcessExitedException

from kmtr.config import RunConfig, override
from kmtr.train import checkpoint, driver
from kmtr.train.folder import RESULT, Outcome
from kmtr.types import KmtrError


def newest(folder: Path) -> list[Path]:
    """Checkpoints of a run, the newest last."""
    return sorted((folder / "train").glob("checkpoint_*"))


def flip(place: Path) -> None:
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(content)


def cut(place: Path) -> None:
    place.write_bytes(place.read_bytes()[:-100])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a bit of the weights": lambda folder: flip(folder / "state-rank01.safetensors"),
    "weights cut short": lambda folder: cut(folder / "state-rank00.safetensors"),
    "weights missing": lambda folder: (folder / "state-rank01.safetensors").unlink(),
    "head missing": lambda folder: (folder / checkpoint.HEAD).unlink(),
    "head unreadable": lambda folder: (folder / checkpoint.HEAD).write_bytes(b"\xff{"),
    "head of something else": lambda folder: (folder / checkpoint.HEAD).write_text("[1, 2]"),
    "head without its step": lambda folder: (folder / checkpoint.HEAD).write_text(json.dumps({"format": 1})),
    "a worker's hashes missing": lambda folder: (folder / "sha256-rank01.json").unlink(),
    "a worker's hashes unreadable": lambda folder: flip(folder / "sha256-rank00.json"),
}
SHORT = {"a bit of the weights", "head unreadable"}
"""Cases that run by default."""


@pytest.fixture
def interrupted(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a run that was killed behind its second checkpoint; the same command goes on from there."""
    instead_of_ray_train(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(forked_workers, "WORK", Dying(2))
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            driver.fit(config, quiet=True)
    resolved, dataset = driver.resolve(config)
    folder = driver.run_folder(resolved, dataset)[1]
    assert [checkpoint.read_head(place)["progress"]["step"] for place in newest(folder)] == [4, 8]
    return folder


@pytest.mark.parametrize(
    "what", [name if name in SHORT else pytest.param(name, marks=pytest.mark.full) for name in DAMAGE]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    what: str, interrupted: Path, config: RunConfig, calm: Outcome
) -> None:
    DAMAGE[what](newest(interrupted)[-1])
    outcome = driver.fit(config, quiet=True)
    assert outcome.metrics == pytest.approx(calm.metrics, rel=1e-6)
    assert len(newest(interrupted)) == 4, "it trained again from the first: step 8, and the end"


def test_where_none_is_whole_the_line_says_so(interrupted: Path, config: RunConfig) -> None:
    for folder in newest(interrupted):
        flip(folder / "state-rank00.safetensors")
    with pytest.raises(
        KmtrError, match=r"checkpoint at step 8: state-rank00.safetensors is missing or changed"
    ) as caught:
        driver.fit(config, quiet=True)
    assert "run.fresh=true" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_model_s_checkpoint_is_refused_not_passed_over(interrupted: Path, config: RunConfig) -> None:
    head = newest(interrupted)[-1] / checkpoint.HEAD
    content = json.loads(head.read_text())
    name = next(iter(content["model"]))
    content["model"][name] = [1, 2, 3]
    head.write_text(json.dumps(content))
    hashes = newest(interrupted)[-1] / "sha256-rank00.json"
    known = json.loads(hashes.read_text()) | {checkpoint.HEAD: checkpoint._sha256(head)}
    hashes.write_text(json.dumps(known))
    with pytest.raises(KmtrError, match=f"checkpoint: expected {name} of shape .* it is another model's"):
        driver.fit(config, quiet=True)


@pytest.mark.full
def test_what_is_exported_was_verified(interrupted: Path, config: RunConfig, calm: Outcome) -> None:
    """The last checkpoint is damaged behind the end of training: trained again from the one before it."""
    outcome = driver.fit(config, quiet=True)
    Path(outcome.folder, RESULT).unlink()  # as if the command had been killed before it exported
    flip(newest(interrupted)[-1] / "state-rank00.safetensors")
    assert driver.fit(override(config, {}), quiet=True).metrics == pytest.approx(calm.metrics, rel=1e-6)
