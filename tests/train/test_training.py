"""The promises of a run: it survives a killed worker with the same numbers, fails at once where a retry can't help."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from forked_workers import instead_of_ray_train

from kmtr import tracking
from kmtr.config import RunConfig, override
from kmtr.data.dataset import record
from kmtr.data.dataset.reader import Reader
from kmtr.encoder import load_encoder
from kmtr.tracking.store import client
from kmtr.train import checkpoint, driver
from kmtr.train.folder import RESULT, Outcome
from kmtr.train.loop import MASKED_ENCODER
from kmtr.train.progress import Display, Sender
from kmtr.types import KmtrError


def training_workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended since it was listed, or a zombie
            if "RayTrainWorker" in " ".join(process.cmdline() or [process.name()]):
                found.append(process)
    return found


def kill_after_checkpoint(folder: Path, killed: list[int]) -> None:
    """SIGKILL one training worker as soon as the run has a checkpoint."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if list((folder / "train").glob(f"checkpoint_*/{checkpoint.HEAD}")):
            for process in training_workers()[:1]:
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
                return
        time.sleep(0.02)


def curve(config: RunConfig, run_id: str, name: str) -> dict[int, list[float]]:
    points: dict[int, list[float]] = {}
    for point in client(tracking.tracking_uri(config)).get_metric_history(run_id, name):
        points.setdefault(point.step, []).append(point.value)
    return points


@pytest.mark.ray
@pytest.mark.xdist_group("faults")  # both are held against `undisturbed`
def test_a_killed_worker_changes_no_number(
    cluster: None, longer: RunConfig, undisturbed: tuple[RunConfig, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = longer
    resolved, dataset = driver.resolve(config)
    name, folder = driver.run_folder(resolved, dataset)
    killed: list[int] = []
    thread = threading.Thread(target=kill_after_checkpoint, args=(folder, killed))
    thread.start()
    outcome = driver.fit(config, quiet=True)
    thread.join()
    assert killed, "no worker was killed: the test proved nothing"
    run = client(resolved.tracking.uri).get_run(outcome.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == name

    calm, other = undisturbed
    assert other.metrics == pytest.approx(outcome.metrics, rel=1e-6)
    collapse = {"val/effective_rank", "val/embedding_deviation", "val/lvef_r2_static", "val/lvef_r2_dynamic"}
    assert collapse <= outcome.metrics.keys()
    for metric in (*collapse, "align/top1_dynamic", "align/top1_chance"):
        assert curve(resolved, outcome.run_id, metric), f"{metric} is not in MLflow"
    for metric in ("masked/loss", "align/infonce_dynamic"):
        ours = curve(resolved, outcome.run_id, metric)
        assert all(len(values) == 1 for values in ours.values()), "a step is in MLflow twice"
        theirs = curve(calm, other.run_id, metric)
        assert ours.keys() == theirs.keys()
        for step, values in ours.items():
            assert values[0] == pytest.approx(theirs[step][0], rel=1e-6)

    again = driver.fit(config, quiet=True)
    assert again.reused
    assert again.run_id == outcome.run_id
    (folder / RESULT).unlink()  # as if the driver had been killed behind the last step
    instead_of_ray_train(monkeypatch)
    ended = driver.fit(override(config, {"train.workers": 1, "train.zero_stage": 3}), quiet=True)
    assert (ended.reused, ended.metrics) == (False, outcome.metrics)
    encoder = load_encoder(outcome.encoder)
    reader = Reader(dataset, "test")
    embedding = encoder(record.to_study(reader.read([0])), acceleration=4)
    assert embedding.ndim == 1
    assert abs(embedding).sum() > 0
    artifacts = {f.path for f in client(resolved.tracking.uri).list_artifacts(outcome.run_id, "encoder")}
    assert {"encoder/encoder.safetensors", "encoder/encoder.json"} <= artifacts
    assert client(resolved.tracking.uri).list_artifacts(outcome.run_id, "figures")
    inputs = client(resolved.tracking.uri).get_run(outcome.run_id).inputs.dataset_inputs
    assert inputs[0].dataset.digest == dataset.digest[:36]


def test_the_guard_ends_alignment_that_costs_what_was_learnt(forked: None, config: RunConfig) -> None:
    """A learning rate that wrecks the encoder: what is exported is the end of masked pretraining."""
    changes = {
        "data.loader": "threads",
        "align.guard": True,
        "align.steps": 20,
        "align.learning_rate": 0.5,
        "train.eval_every": 2,
        "masked.image_weight": 0.0,
    }
    wrecked = driver.fit(override(config, changes | {"optimizer.clip_norm": 1e3}), quiet=True)
    assert 6 < wrecked.metrics["align_stopped"] < 26
    kept = load_encoder(wrecked.encoder).module.state_dict()
    for name, weight in load_encoder(Path(wrecked.folder) / MASKED_ENCODER).module.state_dict().items():
        torch.testing.assert_close(kept[name], weight, rtol=0, atol=0)
    run = client(tracking.tracking_uri(config)).get_run(wrecked.run_id)
    assert run.info.status == "FINISHED"
    history = curve(config, wrecked.run_id, "val/probe_r2")
    assert wrecked.metrics["val/probe_r2"] == pytest.approx(history[6][0])
    assert max(history) == wrecked.metrics["align_stopped"]


def failed(config: RunConfig) -> tuple[str, str]:
    """Message and MLflow status of a run that must fail, without a second try."""
    resolved, dataset = driver.resolve(config)
    name, _ = driver.run_folder(resolved, dataset)
    with pytest.raises(KmtrError) as caught:
        driver.fit(config, quiet=True)
    run_id = tracking.find_run(resolved.tracking.uri, config.tracking.experiment, name)
    assert run_id is not None
    return str(caught.value), client(resolved.tracking.uri).get_run(run_id).info.status


def test_a_loss_that_is_not_finite_stops_before_the_update(forked: None, config: RunConfig) -> None:
    changes = {"data.loader": "threads", "masked.learning_rate": 1e30, "masked.warmup_steps": 0}
    message, status = failed(override(config, changes))
    assert "expected a finite number" in message
    assert "\n" not in message
    assert status == "FAILED"


def test_too_many_skipped_steps_stop_the_run(forked: None, config: RunConfig) -> None:
    """The weights explode in the first step; from then on every gradient is left out, counted and logged."""
    changes = {
        "data.loader": "threads",
        "masked.learning_rate": 1e30,
        "masked.warmup_steps": 0,
        "masked.steps": 9,
        "train.on_nonfinite": "skip",
        "train.max_skipped": 2,
        "train.deterministic": True,
        "train.eval_every": 9,
        "train.checkpoint_every": 9,
    }
    message, status = failed(override(config, changes))
    assert "step 4: 3 steps had a gradient that is not finite, expected at most train.max_skipped=2" in message
    assert status == "FAILED"
    run_id = tracking.find_run(tracking.tracking_uri(config), config.tracking.experiment, run_name(changes, config))
    assert run_id is not None
    assert curve(config, run_id, "run/skipped_steps") == {2: [1.0], 3: [2.0], 4: [3.0]}


@pytest.mark.ray
def test_the_driver_hears_the_first_failure_and_all_lines(cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    with Display("progress-of-a-test", total=4, quiet=False) as display:
        ray.get(display.mailbox.drain.remote())  # it has started
        first, second = Sender("progress-of-a-test"), Sender("progress-of-a-test")
        assert display.first_failure() == ""
        first.say("a line")
        first.fail("shards/train-00000.parquet: damaged")
        second.fail("connection closed by peer")
        assert display.first_failure() == "shards/train-00000.parquet: damaged"
    assert "a line\n" in capsys.readouterr().out
    Sender("nobody").say("lost, without an error")


def run_name(changes: dict[str, object], config: RunConfig) -> str:
    resolved, dataset = driver.resolve(override(config, changes))
    return driver.run_folder(resolved, dataset)[0]


@pytest.mark.parametrize("place", ["forked", pytest.param("cluster", marks=[pytest.mark.ray, pytest.mark.full])])
def test_damage_in_mid_run_ends_all_ranks_at_once(
    place: str, config: RunConfig, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The worker that met it says so first; the other one, which only lost its peer, is not listened to."""
    request.getfixturevalue(place)
    config = override(config, {"data.loader": "ray" if place == "cluster" else "threads"})
    root = tmp_path / "damaged"
    source = Path(config.data.root)
    (root / "shards").mkdir(parents=True)
    (root / "manifest.json").write_bytes((source / "manifest.json").read_bytes())
    for file in (source / "shards").iterdir():
        content = bytearray(file.read_bytes())
        if file.name == "train-00000.parquet":
            middle = len(content) // 3
            content[middle : middle + 64] = bytes(b ^ 0xFF for b in content[middle : middle + 64])
        (root / "shards" / file.name).write_bytes(content)
    tables = driver.fitted_tables
    healthy = override(config, {"train.workers": 2})
    resolved, dataset = driver.resolve(healthy)
    damaged = override(config, {"data.root": str(root)})
    # The statistics of the healthy data: the damage must first be met in training.
    _, folder = driver.run_folder(driver.resolve(damaged)[0], dataset)
    folder.mkdir(parents=True)
    tables(resolved, dataset, folder)
    message, status = failed(damaged)
    assert "train-00000.parquet" in message
    assert "\n" not in message
    assert status == "FAILED"
