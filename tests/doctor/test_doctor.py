"""Every check of the doctor, on what is really broken."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from inside import prepared, shown

from kmtr.bench import flops
from kmtr.config import RunConfig, override
from kmtr.data.loader.batch import Batch
from kmtr.doctor import check, cluster, environment, memory, recipe
from kmtr.tasks import Model, Preparer

pytestmark = pytest.mark.slow


@pytest.fixture
def config(small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A copy of the small dataset, to be damaged."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(small.data.root, tmp_path / "data")
    return override(
        small, {"data.root": str(tmp_path / "data"), "storage.root": str(tmp_path / "runs"), "train.workers": 2}
    )


def state(name: str, look: Any) -> tuple[str, str]:
    found = check.guarded(name, look)
    assert "\n" not in found.found
    return found.state, found.found


def answers(config: RunConfig, names: tuple[str, ...] = ("a", "b")) -> dict[str, dict[str, Any]]:
    """What nodes say that all are this machine."""
    said = {}
    for name in names:
        began = time.time()
        said[name] = cluster.look(config.storage.root, config.data.root, cluster.token(name))
        said[name] |= {"token": cluster.token(name), "asked": (began, time.time())}
    return said


def test_all_is_well(config: RunConfig) -> None:
    said = answers(config)
    assert state("storage", lambda: cluster.storage_shared(config, said))[0] == "ok"
    assert list(Path(config.storage.root).iterdir()) == []  # what it wrote is gone
    assert state("nodes", lambda: cluster.nodes_alike(config, said))[0] == "ok"
    for look in (recipe.dataset, recipe.shapes, recipe.plan, recipe.disk):
        assert state(look.__name__, lambda look=look: look(config))[0] == "ok"
    assert state("memory", lambda: recipe.memory(config, said))[0] == "ok"


def test_versions_against_pins(tmp_path: Path) -> None:
    assert environment.versions(Path(__file__).parents[2] / "pyproject.toml").state == "ok"
    other = tmp_path / "pyproject.toml"
    other.write_text(
        '[project]\nrequires-python = ">=3.11"\ndependencies = ["numpy==1.0", "no-such-package-here>=1"]\n'
    )
    found = environment.versions(other)
    assert found.state == "FAIL"
    assert "numpy==1.0, got" in found.found
    assert "no-such-package-here>=1, not installed" in found.found


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = environment.compiler()
    assert found.state == "warn"
    assert "no-such-compiler" in found.found


def test_a_truncated_shard(config: RunConfig) -> None:
    shard = next(Path(config.data.root).glob("shards/train-*.parquet"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    failed, found = state("dataset", lambda: recipe.dataset(config))
    assert failed == "FAIL"
    assert f"shards/{shard.name}: expected {len(content)} bytes, got {len(content) // 2}" in found


def test_a_flipped_byte_of_the_payload(config: RunConfig) -> None:
    for shard in Path(config.data.root).glob("shards/train-*.parquet"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 0xFF
        shard.write_bytes(content)
    failed, found = state("dataset", lambda: recipe.dataset(config))
    assert failed == "FAIL"
    assert "restore or rewrite it" in found


def test_no_dataset(config: RunConfig) -> None:
    other = override(config, {"data.root": config.data.root + "-elsewhere"})
    assert state("dataset", lambda: recipe.dataset(other))[0] == "FAIL"
    failed, found = state("nodes", lambda: cluster.nodes_alike(other, answers(other)))
    assert failed == "FAIL"
    assert "a cannot read data.root" in found


def test_shapes_that_do_not_fit(config: RunConfig) -> None:
    small = {"sampling.accelerations": "2", "evaluate.accelerations": "2", "data.matrix": "32,16"}
    failed, found = state("shapes", lambda: recipe.shapes(override(config, small)))
    assert failed == "FAIL"
    assert "set data.matrix=32,32" in found
    for key, value, said in (("data.matrix", "64,64", "set data.matrix=32,32"), ("data.coils", 2, "set data.coils=1")):
        warned, found = state("shapes", lambda k=key, v=value: recipe.shapes(override(config, {k: v})))
        assert warned == "warn"
        assert said in found


def test_more_than_the_dataset_has(config: RunConfig) -> None:
    failed, found = state("plan", lambda: recipe.plan(override(config, {"data.global_batch": 64})))
    assert failed == "FAIL"
    assert "data.global_batch: expected at most" in found


def test_storage_that_no_node_can_write(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    under_a_file = override(config, {"storage.root": str(tmp_path / "file" / "runs")})
    failed, found = state("storage", lambda: cluster.storage_shared(under_a_file, answers(under_a_file)))
    assert failed == "FAIL"
    assert "a cannot write" in found
    assert "b cannot write" in found
    assert state("tracking", lambda: recipe.tracking_store(under_a_file))[0] == "FAIL"


def test_storage_that_is_another_folder_on_another_node(config: RunConfig, tmp_path: Path) -> None:
    said = answers(config)
    said["b"] = said["b"] | {"token": "never-written-here"}
    failed, found = state("storage", lambda: cluster.storage_shared(config, said))
    assert failed == "FAIL"
    assert "what b wrote is not seen from here" in found


def test_nodes_that_differ(config: RunConfig) -> None:
    said = answers(config)
    said["b"] |= {"clock": said["b"]["clock"] - 60}
    found = cluster.nodes_alike(config, said)
    assert found.state == "warn"
    assert "the clock of b is 60 s away" in found.found
    said["b"] |= {"versions": said["b"]["versions"] | {"torch": "1.0"}, "manifest": "another"}
    found = cluster.nodes_alike(config, said)
    assert found.state == "FAIL"
    assert "torch is 1.0 and" in found.found
    assert "is another dataset on some nodes" in found.found
    said["c"] = {"lost": "died"}
    assert "c did not answer" in cluster.nodes_alike(config, said).found


def test_tracking_server_that_is_down_is_told_soon(config: RunConfig) -> None:
    tries = 0

    def hang_up(server: socket.socket) -> None:
        nonlocal tries
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                server.accept()[0].close()
                tries += 1

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=hang_up, args=(server,), daemon=True).start()
        down = override(config, {"tracking.uri": f"http://127.0.0.1:{port}"})
        failed, found = state("tracking", lambda: recipe.tracking_store(down))
        server.shutdown(socket.SHUT_RDWR)
    assert failed == "FAIL"
    assert 1 <= tries <= 4, "MLflow's own seven tries, each later than the one before, take minutes"
    assert f"http://127.0.0.1:{port}" in found


def test_tracking_leaves_no_run_behind(config: RunConfig) -> None:
    from mlflow import MlflowClient

    assert state("tracking", lambda: recipe.tracking_store(config))[0] == "ok"
    client = MlflowClient(f"sqlite:///{config.storage.root}/mlflow.db")
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    assert client.search_runs([experiment.experiment_id]) == []


def test_state_per_worker_by_zero_stage() -> None:
    """ZeRO's own example (Rajbhandari et al. 2020, figure 1), in GB: 7.5 B parameters, 64 workers; and a bucket.

    Its gradients are summed in bf16. Ours in fp32: 4 bytes more without sharding, 2 more with it, a bucket of 4.
    """
    sizes = [7_500_000] * 1000
    bucket = 0.1
    found = [memory.state_bytes(sizes, 64, stage, bf16=True).device / 1e9 for stage in range(4)]
    assert found == pytest.approx([120, 31.4 + 30, 16.64 + 0.23 + bucket, 1.88 + 0.23 + 2 * bucket], abs=0.02)
    assert memory.state_bytes([1], 1, 0, bf16=False).device == 16
    assert memory.state_bytes([1], 1, 0, bf16=False, ema=True).device == 20
    split = memory.state_bytes(sizes, 64, 3, bf16=True, offload=True)
    assert split.device / 1e9 == pytest.approx(7.5 * 6 / 64 + 2 * bucket)
    assert split.host / 1e9 == pytest.approx(7.5 * 16 / 64)


def test_tokens_are_at_most_those_of_the_lowest_acceleration(small: RunConfig, batch: Batch) -> None:
    most = memory.most_tokens(small)
    for name, count in vars(most).items():
        real = max(getattr(n, name) for n in flops.useful(batch, small))
        assert real <= 1.1 * count + 1
        assert 0.8 * count <= real


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("masked", {}),
        ("masked", {"model.depth": 4, "model.mlp_ratio": 4}),
        ("masked", {"model.depth": 4, "model.checkpointing": True, "masked.image_weight": 0.0}),
        ("align", {}),
        ("align", {"align.train_image_encoder": True}),
    ],
)
def test_activations_are_what_autograd_keeps(
    small: RunConfig, tables: dict[str, torch.Tensor], batch: Batch, stage: str, changes: dict[str, Any]
) -> None:
    """Bytes of the tensors that the graph saves, weights and inputs left out: within 25 %."""
    steps = {"stage": stage, "data.global_batch": 8, "train.workers": 1}
    config = override(small, {"model.width": 64, "model.decoder_width": 64} | steps | changes)
    module = Model(config)
    inputs = prepared(Preparer(config, tables, torch.device("cpu")), batch, stage)
    known = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = module(inputs)
    held = sum(storage.nbytes() for storage in saved.values())
    expected = memory.activation_bytes(config, flops.executed(inputs, config))
    if config.model.checkpointing:  # one block is whole only while it is run again
        block = (9 + 2 * config.model.mlp_ratio) * config.model.width * 4
        expected -= block * sum(shown(inputs).lines.lengths.host)
    assert kept
    assert expected == pytest.approx(held, rel=0.25)


def test_memory_and_disk_that_do_not_suffice(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = memory.parameters(config)
    assert sum(sizes) == sum(p.numel() for p in Model(config).parameters())
    said = answers(config, ("a",))
    train = config.train
    state = memory.state_bytes(sizes, 2, train.zero_stage, train.bf16).device
    active = memory.activation_bytes(config, [memory.most_tokens(config)] * 4)
    for there, expected in (
        (2 * state * 0.9, "FAIL"),
        (2 * (state + active) * 1.2, "warn"),
        (2 * (state + active) * 3, "ok"),
    ):
        said["a"] |= {"memory": there, "gpu": 0}
        assert recipe.memory(config, said).state == expected
    said["a"] |= {"memory": 1e12, "gpu": state * 0.8}  # a worker has a GPU of its own
    assert recipe.memory(config, said).state == "FAIL"
    offloaded = override(config, {"train.offload": True})
    assert "offloaded to the host" in recipe.memory(offloaded, said).found
    assert recipe.memory(offloaded, said | {"a": said["a"] | {"gpu": 1e12}}).state == "ok"
    said["a"] |= {"memory": state / 10, "gpu": 1e12}  # what is offloaded does not fit the host
    assert recipe.memory(offloaded, said).state == "FAIL"
    vast = override(config, {"model.width": 128_000})
    assert recipe.disk(vast).state == "FAIL"


def test_result_names_what_failed() -> None:
    done = [check.Check("a", "ok", ""), check.Check("b", "FAIL", ""), check.Check("c", "warn", "")]
    said = check.summary(done)
    assert said == {"checks": {"a": "ok", "b": "FAIL", "c": "warn"}, "failed": ["b"]}
    assert json.dumps(said)
