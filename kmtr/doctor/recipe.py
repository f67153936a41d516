"""Checks of a recipe: tracking, dataset, shapes, plan, memory, disk."""

from __future__ import annotations

import shutil
import time
from typing import Any

import torch

from kmtr import tracking
from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.dataset.splits import SPLITS
from kmtr.data.loader import planning
from kmtr.data.loader.collate import collate
from kmtr.data.loader.planning import check_shapes, unreached
from kmtr.doctor.check import Check
from kmtr.doctor.cluster import SESSION
from kmtr.doctor.memory import activation_bytes, most_tokens, parameters, state_bytes
from kmtr.tracking.store import local_path, reaching
from kmtr.train import start
from kmtr.train.resolve import resolve

GIB = 2**30

KEPT_CHECKPOINTS = 3
"""Two that Ray Train keeps and the one being written."""

ROOM = 0.6
"""Share of a machine's memory that a worker's state and activations may take: batches, kernels and libraries need the
rest."""


def tracking_store(config: RunConfig) -> Check:
    """Check that a run can be created, found and deleted in MLflow."""
    uri = tracking.tracking_uri(config)
    name = f"doctor-{SESSION}"
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
    """Check that the dataset has the arrays that the recipe reads, by reading two subjects."""
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
    """Check that the steps can be shared by the workers, and all else that the driver of a run refuses."""
    resolved, data = resolve(config)
    train = config.train
    order = planning.plan_of(config, data, rows=start.budget(resolved, data))
    steps = order.steps_per_epoch
    accumulation = config.accumulation(workers := fewest(config))
    size = config.data.global_batch // workers // accumulation
    text = (
        f"{config.total_steps} steps of {config.data.global_batch} subjects = {config.total_steps / steps:.1f} epochs; "
        f"{train.workers} worker(s) x {accumulation} micro-batch(es) of {size}; "
        f"{len(order.shapes)} batch shape(s)"
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
    kept = "activations not counted" if config.stage == "task" else f"about {active / GIB:.2f} of activations"
    text += f" (ZeRO-{train.zero_stage}, {'bf16' if train.bf16 else 'fp32'}), {kept}"
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
