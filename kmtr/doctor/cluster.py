"""Checks of a cluster: storage, versions and clocks of its nodes, and room for the workers."""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
import uuid
from typing import Any

from kmtr import machine
from kmtr.config import RunConfig
from kmtr.data.dataset import storage
from kmtr.doctor.check import Check, lines
from kmtr.doctor.environment import SAME_EVERYWHERE
from kmtr.train.room import lacking, reserved, uses_gpus
from kmtr.types import KmtrError, last_line

NODE_TIMEOUT_S = 120
"""For an answer from a node: starting a Python process there takes seconds, on a busy one a minute."""

CLOCK_SKEW_S = 2.0


def look(storage_root: str, data_root: str, token: str) -> dict[str, Any]:
    """Report of one node, made there by a Ray task. Every failure is a text, since all nodes are to be reported.

    Returns:
        ``storage`` and ``data`` (empty: fine), ``manifest`` (SHA-256), ``clock`` (s since 1970), ``memory`` and ``gpu``
        (bytes), ``versions``.
    """
    said: dict[str, Any] = {"clock": time.time(), "memory": 0, "gpu": 0, "storage": "", "data": "", "manifest": ""}
    try:
        store, base = storage.open_root(storage_root)
        storage.make_folder(store, base)
        with store.open_output_stream(f"{base}/{token}") as stream:
            stream.write(token.encode())
    except (OSError, KmtrError) as error:
        said["storage"] = last_line(error)
    try:
        store, base = storage.open_root(data_root)
        said["manifest"] = hashlib.sha256(storage.read_bytes(store, f"{base}/manifest.json")).hexdigest()
    except (OSError, KmtrError) as error:
        said["data"] = last_line(error)
    said["memory"] = machine.memory()
    sizes = lines("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    if sizes:
        said["gpu"] = min(int(size) for size in sizes) * 2**20
    said["versions"] = {name: importlib.metadata.version(name) for name in SAME_EVERYWHERE}
    return said


def look_here(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Report of this machine, where no cluster can be asked."""
    began = time.time()
    said = look(config.storage.root, config.data.root, token("here"))
    return {"this machine": said | {"token": token("here"), "asked": (began, time.time())}}


def look_everywhere(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Node -> what `look` said there, or ``lost`` and why it could not be asked."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    tasks = {}
    for node in names:
        where = NodeAffinitySchedulingStrategy(node, soft=False)
        task = ray.remote(look).options(num_cpus=0, scheduling_strategy=where, max_retries=0)
        tasks[node] = task.remote(config.storage.root, config.data.root, token(node))
    said: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + NODE_TIMEOUT_S
    for place, (node, task) in enumerate(tasks.items(), 1):
        name = f"{names[node]} ({place} of {len(names)})"
        began = time.time()
        try:
            said[name] = ray.get(task, timeout=max(1.0, deadline - time.monotonic()))
            said[name]["token"] = token(node)
            said[name]["asked"] = (began, time.time())
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            said[name] = {"lost": last_line(error)}
    return said


SESSION = uuid.uuid4().hex[:12]


def token(node: str) -> str:
    return f".doctor-{SESSION}-{node[:12]}"


def storage_shared(config: RunConfig, said: dict[str, dict[str, Any]]) -> Check:
    """Check that all nodes write to one storage.root: a file from each is read here, then removed."""
    wrong = []
    for name, answer in said.items():
        if "lost" in answer:
            wrong.append(f"{name} did not answer: {answer['lost']}")
            continue
        if answer["storage"]:
            wrong.append(f"{name} cannot write: {answer['storage']}")
            continue
        store, base = storage.open_root(config.storage.root)
        path = f"{base}/{answer['token']}"
        try:
            if storage.read_bytes(store, path) != answer["token"].encode():
                wrong.append(f"{name} wrote something else than was read")
            store.delete_file(path)
        except OSError:
            wrong.append(f"what {name} wrote is not seen from here")
    if wrong:
        return Check(
            "storage",
            "FAIL",
            f"storage.root={config.storage.root}: {'; '.join(wrong)}: choose a folder that every node can write",
        )
    return Check("storage", "ok", f"{config.storage.root} is written by {len(said)} node(s) and read here")


def nodes_alike(config: RunConfig, said: dict[str, dict[str, Any]]) -> Check:
    """Check that the nodes have one dataset, one set of versions, one time."""
    answers = {name: answer for name, answer in said.items() if "lost" not in answer}
    wrong, odd = [f"{name} did not answer" for name in said if name not in answers], []
    for name, answer in answers.items():
        if answer["data"]:
            wrong.append(f"{name} cannot read data.root: {answer['data']}")
        low, high = answer["asked"]
        skew = max(low - answer["clock"], answer["clock"] - high, 0.0)
        if skew > CLOCK_SKEW_S:
            odd.append(f"the clock of {name} is {skew:.0f} s away from this one: set it by NTP")
    if len({answer["manifest"] for answer in answers.values() if answer["manifest"]}) > 1:
        wrong.append(f"data.root={config.data.root} is another dataset on some nodes: use a shared folder or a URI")
    for package in SAME_EVERYWHERE:
        found = {answer["versions"][package] for answer in answers.values()}
        if len(found) > 1:
            wrong.append(f"{package} is {' and '.join(sorted(found))} on different nodes: use one image or environment")
    if wrong or odd:
        return Check("nodes", "FAIL" if wrong else "warn", "; ".join(wrong + odd))
    return Check("nodes", "ok", "same dataset, same versions, clocks agree")


def room(config: RunConfig) -> Check:
    """Check that the cluster has the CPUs and GPUs that the workers and their readers reserve."""
    import ray

    train, have = config.train, ray.cluster_resources()
    wanted = reserved(config, train.workers.least, gpus=uses_gpus(train.device))
    text = ", ".join(f"{number:g} of {have.get(kind, 0):g} {kind}s" for kind, number in wanted.items())
    if lacking(wanted, have):
        return Check(
            "room",
            "FAIL",
            f"{train.workers} worker(s) with readers need {text}: lower train.workers (or train.cpus_per_worker and "
            "data.read_cpus), or add nodes; an autoscaling cluster may do that itself",
        )
    return Check("room", "ok", f"{train.workers} worker(s) with readers take {text}")
