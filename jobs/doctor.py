"""python jobs/doctor.py [RECIPE key=value ...]      everything that would fail later, found now

Without RECIPE only the environment is checked: versions, compiler, Ray. One line per check: ok, warn (it can run, but
look), or FAIL with what to do. Exit status 1 if anything FAILs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
import tomllib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from jobs._main import main, recipe_config, start_ray
from jobs.doctor_memory import activation_bytes, most_tokens, parameters, state_bytes
from kmtr import tracking
from kmtr.config import RunConfig, override
from kmtr.data import pipeline, storage
from kmtr.data.batch import check_shapes, collate, unreached
from kmtr.data.reader import Dataset
from kmtr.data.splits import SPLITS
from kmtr.tracking.store import local_path, reaching
from kmtr.train import driver
from kmtr.types import KmtrError

GIB = 2**30
NODE_TIMEOUT_S = 120
"""For an answer from a node: starting a Python process there takes seconds, on a busy one a minute."""
CLOCK_SKEW_S = 2.0
SAME_EVERYWHERE = ("torch", "ray", "deepspeed", "pyarrow", "numpy", "mlflow")
KEPT_CHECKPOINTS = 3
"""Two that Ray Train keeps and the one being written."""
ROOM = 0.6
"""Share of a machine's memory that a worker's state and activations may take: batches, kernels and libraries need the
rest."""


@dataclass(frozen=True)
class Check:
    """What a check found: one line, and with warn or FAIL what to do."""

    name: str
    state: Literal["ok", "warn", "FAIL"]
    found: str


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """A refusal of the project's own code is a check that failed."""
    try:
        return check()
    except KmtrError as error:
        return Check(name, "FAIL", str(error))


# ----------------------------------------------------------------------------------------------------- environment


def versions(project: Path) -> Check:
    """Python and the pinned packages against ``pyproject.toml``."""
    meta = tomllib.loads(project.read_text())["project"]
    have, wrong = [f"Python {platform.python_version()}"], []
    if not SpecifierSet(meta["requires-python"]).contains(platform.python_version(), prereleases=True):
        wrong.append(f"Python {meta['requires-python']}, got {platform.python_version()}")
    for requirement in map(Requirement, meta["dependencies"]):
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement}, not installed")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement}, got {found}")
        if requirement.name in SAME_EVERYWHERE:
            have.append(f"{requirement.name} {found}")
    if wrong:
        return Check("versions", "FAIL", f"expected {'; '.join(wrong)}: make setup")
    return Check("versions", "ok", ", ".join(have))


def compiler() -> Check:
    """What `train.compile` builds its kernels with; nothing else needs one."""
    cxx = os.environ.get("CXX", "c++")
    found = _first_line(cxx, "--version")
    if found is None:
        return Check("compiler", "warn", f"{cxx} not found on PATH: train.compile=true needs it (g++, clang or CXX)")
    return Check("compiler", "ok", found)


def cluster() -> Check:
    """Ray, started here if no cluster is named."""
    import ray

    start_ray()
    alive = [node for node in ray.nodes() if node["Alive"]]
    dead = len(ray.nodes()) - len(alive)
    have = ray.cluster_resources()
    found = f"{len(alive)} node(s), {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"
    if dead:
        return Check("ray", "warn", f"{found}; {dead} node(s) were lost since it started: see ray status")
    return Check("ray", "ok", found)


# --------------------------------------------------------------------------------------------------------- cluster


def look(storage_root: str, data_root: str, token: str) -> dict[str, Any]:
    """What one node can do: runs there, as a Ray task. Every failure is a text, since all nodes are to be told of.

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
        said["storage"] = _brief(error)
    try:
        store, base = storage.open_root(data_root)
        said["manifest"] = hashlib.sha256(storage.read_bytes(store, f"{base}/manifest.json")).hexdigest()
    except (OSError, KmtrError) as error:
        said["data"] = _brief(error)
    said["memory"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sizes = _lines("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    if sizes:
        said["gpu"] = min(int(size) for size in sizes) * 2**20
    said["versions"] = {name: importlib.metadata.version(name) for name in SAME_EVERYWHERE}
    return said


def look_here(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What this machine says, where no cluster can be asked."""
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
            said[name] = {"lost": _brief(error)}
    return said


def token(node: str) -> str:
    return f".doctor-{_SESSION}-{node[:12]}"


_SESSION = uuid.uuid4().hex[:12]


def storage_shared(config: RunConfig, said: dict[str, dict[str, Any]]) -> Check:
    """Whether all nodes write to one storage.root: a file from each is read here, then removed."""
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
            f"storage.root={config.storage.root}: {'; '.join(wrong)}: choose a folder or URI that every node can write",
        )
    return Check("storage", "ok", f"{config.storage.root} is written by {len(said)} node(s) and read here")


def nodes_alike(config: RunConfig, said: dict[str, dict[str, Any]]) -> Check:
    """Whether the nodes have one dataset, one set of versions, one time."""
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
    """Whether the cluster has the CPUs and GPUs that the workers and their readers reserve."""
    import ray

    train, data, have = config.train, config.data, ray.cluster_resources()
    wanted = {"CPU": train.workers.least * (train.cpus_per_worker + data.readers * data.read_cpus)}
    if train.device == "cuda" or (train.device == "auto" and have.get("GPU", 0)):
        wanted["GPU"] = float(train.workers.least)
    text = ", ".join(f"{number:g} of {have.get(kind, 0):g} {kind}s" for kind, number in wanted.items())
    if any(number > have.get(kind, 0) + 1e-6 for kind, number in wanted.items()):
        return Check(
            "room",
            "FAIL",
            f"{train.workers} worker(s) with readers need {text}: lower train.workers (or train.cpus_per_worker and "
            "data.read_cpus), or add nodes; an autoscaling cluster may do that itself",
        )
    return Check("room", "ok", f"{train.workers} worker(s) with readers take {text}")


# ------------------------------------------------------------------------------------------------------------ recipe


def tracking_store(config: RunConfig) -> Check:
    """Whether a run can be created, found and deleted in MLflow."""
    uri = tracking.tracking_uri(config)
    name = f"doctor-{_SESSION}"
    began = time.perf_counter()
    run_id = tracking.open_run(config, name=name)
    found = tracking.find_run(uri, config.tracking.experiment, name)
    tracking.end_run(uri, run_id, "FINISHED")
    with reaching(uri) as mlflow:
        mlflow.delete_run(run_id)
    if found != run_id:
        return Check("tracking", "FAIL", f"{uri}: a run just created was not found again")
    return Check(
        "tracking", "ok", f"{uri}: a run was created, found and deleted in {time.perf_counter() - began:.1f} s"
    )


def dataset(config: RunConfig) -> Check:
    """Manifest, size and footer of every shard, and the first batch of the plan with page checksums."""
    data = Dataset.open(config.data)
    data.preflight()
    reader = data.reader("train", override(config, {"data.verify_pages": "always"}).data)
    began = time.perf_counter()
    batch = collate(reader.samples(range(min(config.data.global_batch, len(reader)))), config)
    seconds = time.perf_counter() - began
    rows_of = ", ".join(f"{data.rows(split)} {split}" for split in SPLITS)
    files = sum(len(manifest.shards) for manifest in data.manifests)
    return Check(
        "dataset",
        "ok",
        f"{config.data.root}: {rows_of} subjects in {files} shards; "
        f"first batch of {len(batch)} read with checksums, {batch.stored.nbytes / 1e6 / seconds:.0f} MB/s",
    )


def shapes(config: RunConfig) -> Check:
    """Whether the dataset has what the recipe reads, proved on two subjects."""
    data = Dataset.open(config.data)
    check_shapes(config, data)
    reader = data.reader("train", config.data)
    batch = collate(reader.samples(range(min(2, len(reader)))), config).to(torch.device("cpu"))
    if not bool(torch.isfinite(torch.view_as_real(batch.kspace)).all()):
        return Check("shapes", "FAIL", "the first subjects hold values that are not finite: ingest them again")
    if advice := unreached(config.data, data):
        return Check("shapes", "warn", advice)
    return Check("shapes", "ok", "slice coil t ky kx = " + " x ".join(map(str, batch.kspace.shape[1:])))


def plan(config: RunConfig) -> Check:
    """Whether the steps can be dealt to the workers; all that the driver of a run refuses."""
    _, data = driver.resolve(config)
    train = config.train
    order = pipeline.plan_of(config, data)
    steps = order.steps_per_epoch
    accumulation = config.accumulation(workers := fewest(config))
    size = config.data.global_batch // workers // accumulation
    text = (
        f"{config.total_steps} steps of {config.data.global_batch} subjects = {config.total_steps / steps:.1f} epochs; "
        f"{train.workers} worker(s) x {accumulation} micro-batch(es) of {size}; "
        f"{len(pipeline.shapes_of(order))} batch shape(s)"
    )
    if not data.rows("val"):
        return Check("plan", "warn", f"{text}; no held-out subjects, validation will use training ones")
    return Check("plan", "ok", text)


def fewest(config: RunConfig) -> int:
    """Workers that a run has at the least: then each holds most."""
    return config.train.workers.sizes(config.data.global_batch)[0]


def memory(config: RunConfig, said: dict[str, dict[str, Any]]) -> Check:
    """Weights, optimizer and activations of the workers that share a node, or a GPU, against its memory."""
    train, workers = config.train, fewest(config)
    sizes = parameters(config)
    state = state_bytes(
        sizes,
        workers,
        train.zero_stage,
        train.bf16,
        offload=train.offload,
        ema=config.optimizer.ema > 0,
        accumulates=config.accumulation(workers) > 1,
    )
    size = config.data.global_batch // workers // config.accumulation(workers)
    active = activation_bytes(config, [most_tokens(config)] * size)
    text = (
        f"{sum(sizes) / 1e6:.1f} M parameters; per worker {state.device / GIB:.2f} GiB of weights, gradients, optimizer"
    )
    text += f" (ZeRO-{train.zero_stage}, {'bf16' if train.bf16 else 'fp32'}), about {active / GIB:.2f} of activations"
    if state.host:
        text += f", {state.host / GIB:.2f} offloaded to the host"
    answers = [answer for answer in said.values() if "lost" not in answer]
    if not answers:
        return Check("memory", "warn", f"{text}; the nodes' memory is not known")
    gpus = [answer["gpu"] for answer in answers if answer["gpu"]] if train.device != "cpu" else []
    share = -(-workers // len(answers))
    host = min(answer["memory"] for answer in answers)
    text += f"; {min(gpus) / GIB:.1f} GiB per GPU" if gpus else ""
    text += f"; {host / GIB:.1f} GiB per node ({share} worker(s) each)"
    if gpus:
        fixed = max(state.device / min(gpus), share * state.host / host)
        used = max((state.device + active) / min(gpus), share * state.host / host)
    else:
        fixed = share * (state.device + state.host) / host
        used = fixed + share * active / host
    if fixed > 1:
        return Check(
            "memory",
            "FAIL",
            f"{text}: use more train.workers with train.zero_stage=3, train.offload=true, or a smaller model",
        )
    if used > ROOM:
        return Check(
            "memory",
            "warn",
            f"{text}: little is left; raise train.accumulation, train.zero_stage or train.workers, or set "
            "model.checkpointing=true",
        )
    return Check("memory", "ok", text)


def disk(config: RunConfig) -> Check:
    """Free space for the checkpoints that exist at once: weights, master copy, moments and average of all
    workers together.
    """
    each = (2 if config.train.bf16 else 4) + 12 + (4 if config.optimizer.ema else 0)
    size = KEPT_CHECKPOINTS * sum(parameters(config)) * each
    root = local_path(config.storage.root)
    if root is None:
        return Check(
            "disk", "ok", f"checkpoints need {size / GIB:.2f} GiB in {config.storage.root}; free space unknown"
        )
    there = next(folder for folder in (root, *root.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    text = f"{KEPT_CHECKPOINTS} checkpoints need {size / GIB:.2f} GiB, {free / GIB:.1f} GiB are free in {root}"
    if size > free:
        return Check("disk", "FAIL", f"{text}: free some, or choose another storage.root")
    return Check("disk", "warn" if size > 0.5 * free else "ok", text)


# --------------------------------------------------------------------------------------------------------------- main


def absolute(config: RunConfig) -> RunConfig:
    roots = {"data.root": config.data.root, "storage.root": config.storage.root}
    return override(config, {key: storage.absolute(root) for key, root in roots.items()})


def run(words: list[str]) -> dict[str, Any]:
    config = absolute(recipe_config(words, __doc__ or "")) if words else None
    done: list[Check] = []

    def tell(name: str, check: Callable[[], Check]) -> Check:
        found = guarded(name, check)
        done.append(found)
        print(f"  {found.state:<5} {found.name:<9} {' '.join(found.found.split())}", flush=True)
        return found

    tell("versions", lambda: versions(Path(__file__).parents[1] / "pyproject.toml"))
    tell("compiler", compiler)
    reached = tell("ray", cluster).state != "FAIL"
    if config is not None:
        said = look_everywhere(config) if reached else look_here(config)
        if reached:
            tell("room", lambda: room(config))
        tell("storage", lambda: storage_shared(config, said))
        tell("nodes", lambda: nodes_alike(config, said))
        tell("tracking", lambda: tracking_store(config))
        if (
            tell("dataset", lambda: dataset(config)).state != "FAIL"
            and tell("shapes", lambda: shapes(config)).state != "FAIL"
        ):
            tell("plan", lambda: plan(config))
        tell("memory", lambda: memory(config, said))
        tell("disk", lambda: disk(config))
    return summary(done)


def summary(done: Sequence[Check]) -> dict[str, Any]:
    return {
        "checks": {check.name: check.state for check in done},
        "failed": [check.name for check in done if check.state == "FAIL"],
    }


def _lines(*command: str) -> list[str] | None:
    """Output of a command; None: it does not exist or failed."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [line.strip() for line in ran.stdout.splitlines() if line.strip()]


def _first_line(*command: str) -> str | None:
    lines = _lines(*command)
    return lines[0] if lines else None


def _brief(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[-1] if text else type(error).__name__


if __name__ == "__main__":
    results: list[dict[str, Any]] = []

    def noted(words: list[str]) -> dict[str, Any]:
        results.append(run(words))
        return results[-1]

    main(__doc__ or "", noted)
    sys.exit(1 if results and results[-1]["failed"] else 0)
