"""Speed of a training step: beside reference settings, beside plain PyTorch DDP, and against the machine's ceiling.

The step is that of training (kmtr.train.loop without logging): a batch from shards, patterns, objectives, DeepSpeed.
Whatever is compared steps in turns within the same processes, so that what else the machine does meets both alike;
medians count, and intervals are bootstraps over the turns. k-space is random: no time depends on its values.
"""

from __future__ import annotations

import json
import os
import statistics as stats
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.multiprocessing.spawn import ProcessException, start_processes

from kmtr import machine
from kmtr.bench.blocks import RESAMPLES
from kmtr.bench.data import load_of_machine, written
from kmtr.bench.parts import PARTS
from kmtr.bench.reference import BATCH, HEAD, Reference, count, our_parameters, widening_of
from kmtr.bench.step_worker import TABLES, work
from kmtr.config import RunConfig, override, to_json
from kmtr.data.dataset import storage
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import statistics
from kmtr.report.html import Table, text_table
from kmtr.types import InputError, KmtrError, first_line

LINES_ON_CPU = 2000


def run(config: RunConfig) -> dict[str, Any]:
    """Measure, print and keep; what the last line on stdout says."""
    check_folder(config)
    if config.model.encoder_inputs != "kspace":
        raise InputError(
            f"model.encoder_inputs: expected kspace, which the reference reads, got {config.model.encoder_inputs}"
        )
    device = device_of(config)
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    most = config.train.workers.most
    world = min(most, gpus) if gpus else max(2, most)
    limit = config.bench.lines or (0 if gpus else LINES_ON_CPU)
    changes = {
        "train.device": device,
        "data.more": (),
        "data.weights": (),
        "data.loader": "threads",
        "data.crop": False,
        "train.workers": world,
    }
    config = fitting(override(config, changes), limit)
    widening = widening_of(config)
    with torch.device("meta"):
        parameters = {"ours": our_parameters(config), "reference": count(Reference(config, "all", widening))}
    d = config.data
    print(
        f"bench: {config.recipe}, {d.slices} slices x {d.frames} frames x {d.matrix[0]} x {d.matrix[1]}, "
        f"{d.slices * d.frames * d.matrix[0]} lines a subject, batch of {d.global_batch}, "
        f"{'bf16' if config.train.bf16 else 'fp32'}, ZeRO-{config.train.zero_stage}, {device}; "
        f"{parameters['ours'] / 1e6:.2f} M parameters, reference {parameters['reference'] / 1e6:.2f} M",
        flush=True,
    )
    load = load_of_machine()
    stages = stages_of(config)
    threads = machine.threads(world)
    with tempfile.TemporaryDirectory() as folder:
        config = on_random_data(config, Path(folder))
        together = processes("together", config, stages, folder, threads)
        share = {"data.global_batch": d.global_batch // world, "train.workers": 1, "stage": "masked"}
        alone = processes("alone", override(config, share), stages, folder, threads)
    result = summarise(config, alone, together)
    print("\n\n".join(text_table(table) for table in report(config, result)))
    result |= {
        "parameters": parameters,
        "recipe": config.recipe,
        "lines_per_subject": d.slices * d.frames * d.matrix[0],
        "global_batch": d.global_batch,
        "precision": "bf16" if config.train.bf16 else "fp32",
        "device": torch.cuda.get_device_name(0) if gpus else f"{os.cpu_count()} CPUs",
        "load": round(load, 2),
    }
    return result | keep(config, result, {"alone": alone, "together": together})


def check_folder(config: RunConfig) -> None:
    """Refuse a place for the data that is not on this machine.

    Raises:
        InputError: it is a URI.
    """
    if "://" in config.bench.folder:
        raise InputError(f"bench.folder: expected a local folder, got {config.bench.folder!r}")


def on_random_data(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration on random k-space of its shape, which is written; its statistics lie in the folder."""
    data = written(config, "random k-space", 2 * config.data.global_batch)
    config = override(config, {"data.root": str(data.folder / "ours")})
    fitted = statistics.tables(config, Dataset.open(config.data).reader("train", config.data))
    tables = {k: torch.view_as_real(v).contiguous() if v.is_complex() else v for k, v in fitted.items()}
    save_file(tables, folder / TABLES)
    return config


def device_of(config: RunConfig) -> str:
    """``cpu`` or ``cuda``.

    Raises:
        InputError: a GPU is asked for and there is none.
    """
    found = machine.device(config.train.device)
    if config.train.device == "cuda" and found != "cuda":
        raise InputError("train.device: expected a GPU, got none; use train.device=cpu")
    return found


def fitting(config: RunConfig, limit: int) -> RunConfig:
    """The configuration with at most `limit` lines a subject (0: no limit): fewer frames, then slices, then views.

    Raises:
        InputError: one slice and the frames of one patch have more.
    """
    step = config.model.patch[0]
    while limit and (lines := config.data.slices * config.data.frames * config.data.matrix[0]) > limit:
        data = config.data
        if data.frames > step:
            config = override(config, {"data.frames": data.frames - step})
        elif data.sax_slices > 1 and "sax" in data.views:
            config = override(config, {"data.sax_slices": data.sax_slices - 1})
        elif len(data.views) > 1:
            config = override(config, {"data.views": data.views[:-1]})
        else:
            raise InputError(f"bench.lines: expected at least the {lines} lines of one slice, got {limit}")
    return config


def stages_of(config: RunConfig) -> tuple[str, ...]:
    steps = {"masked": config.masked_steps, "align": config.align_steps}
    return tuple(stage for stage, count in steps.items() if count)


def processes(program: str, config: RunConfig, stages: tuple[str, ...], folder: str, threads: int) -> Any:
    """Answers of a program of `step_worker`, on ``train.workers`` processes.

    Raises:
        KmtrError: one of them failed; its last words.
    """
    world = config.train.workers.most
    print(f"bench: {program}, {world} process(es) with {threads} thread(s) each", flush=True)
    arguments = (world, program, to_json(config), folder, threads, stages)
    try:
        start_processes(work, arguments, nprocs=world, daemon=True, start_method="spawn")
    except ProcessException as error:
        said = sorted(Path(folder).glob(f"{program}-*.error"))
        words = said[0].read_text() if said else f"{first_line(error)}; out of memory?"
        raise KmtrError(f"bench: {program}: {words}") from None
    return json.loads((Path(folder) / f"{program}.json").read_text())


# ---------------------------------------------------------------------------------------------------------- reporting


def ratio(theirs: Sequence[float], ours: Sequence[float], scale: float = 1.0) -> dict[str, Any]:
    """Speed of ours over the other: ratio of medians, with a 95 % bootstrap interval over the turns.

    Args:
        scale: of their time, where a step of theirs does another amount of work.
    """
    pairs = np.stack([np.array(theirs) * scale, np.array(ours)])
    drawn = np.random.default_rng(0).integers(0, pairs.shape[1], (RESAMPLES, pairs.shape[1]))
    medians = np.median(pairs[:, drawn], axis=-1)
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    value = np.median(pairs[0]) / np.median(pairs[1])
    return {"ratio": round(float(value), 3), "interval": [round(float(low), 3), round(float(high), 3)]}


def summarise(config: RunConfig, alone: dict[str, Any], together: dict[str, Any]) -> dict[str, Any]:
    """The last line's numbers: those of the first stage, and of alignment under ``align``."""
    first, *others = stages_of(config)
    sweep = {r: round(stats.median(seconds), 4) for r, seconds in alone["sweep"].items()}
    times = list(sweep.values())
    found = of_stage(config, alone[first], together[first])
    found |= {
        "stage": first,
        "cost_vs_acceleration": sweep,
        "cost_falls": all(a > b for a, b in pairwise(times)),
    }
    return found | {stage: of_stage(config, alone[stage], together[stage]) for stage in others}


def of_stage(config: RunConfig, alone: dict[str, Any], together: dict[str, Any]) -> dict[str, Any]:
    batch, seconds = config.data.global_batch // config.train.workers.most, alone["seconds"]
    ours = stats.median(seconds["ours"])
    flops = sum(alone["flops_per_subject"].values())
    ceiling = alone["matmul_flops"] / min(seconds["matmul"])
    found: dict[str, Any] = {}
    for key, positions in (("ratio_to_reference", "all"), ("ratio_to_reference_acquired", "acquired")):
        times = seconds.get(f"reference_{positions}")
        compared = ratio(times, seconds["ours"], batch / BATCH) if times else {"ratio": None, "interval": None}
        found |= {key: compared["ratio"], f"{key}_interval": compared["interval"]}
    ddp = ratio(together["seconds"]["ddp"], together["seconds"]["ours"])
    parts = together["parts"]
    total = sum(parts.values())
    return found | {
        "ratio_to_ddp": ddp["ratio"],
        "ratio_to_ddp_interval": ddp["interval"],
        "pairs": len(seconds["ours"]),
        "mfu": round(flops * batch / ours / ceiling, 4),
        "matmul_tflops": round(ceiling / 1e12, 4),
        "step_s": round(ours, 4),
        "subjects_per_s": round(batch / ours, 3),
        "tokens_per_s": round(alone["lines_per_subject"] * batch / ours, 1),
        "reference_subjects_per_s": round(BATCH / stats.median(seconds["reference_all"]), 3)
        if "reference_all" in seconds
        else None,
        "gflops_per_subject": round(flops / 1e9, 4),
        "flops_counted_over_formula": round(alone["flops_counted_over_formula"], 4),
        "flops_on_padding": round(alone["padding_flops"], 4),
        "memory_gib": {name: round(value, 3) for name, value in alone["memory_gib"].items()},
        "refused": alone["refused"],
        "workers_step_s": round(stats.median(together["seconds"]["ours"]), 4),
        "ddp_step_s": round(stats.median(together["seconds"]["ddp"]), 4),
        "parts_s": {part: round(value, 4) for part, value in parts.items()},
        "parts_share": {part: round(value / total, 4) for part, value in parts.items()},
    }


def report(config: RunConfig, result: dict[str, Any]) -> list[Table]:
    first, *others = stages_of(config)
    found = {first: result} | {stage: result[stage] for stage in others}
    names = tuple(found)
    world = config.train.workers.most

    def interval(key: str) -> tuple[str | None, ...]:
        spans = [(found[s][key], found[s][f"{key}_interval"]) for s in names]
        return tuple(f"{value:.2f} [{span[0]:.2f}, {span[1]:.2f}]" if span else None for value, span in spans)

    def row(name: str, key: str) -> tuple[str | float | None, ...]:
        return (name, *(found[s][key] for s in names))

    speed = Table(
        caption="Speed of a step",
        columns=("what", *names),
        rows=(
            row("subjects/s", "subjects_per_s"),
            row("tokens/s", "tokens_per_s"),
            row("step s", "step_s"),
            row("GFLOP a subject", "gflops_per_subject"),
            row("FLOPs counted / formula", "flops_counted_over_formula"),
            row("FLOPs on padding", "flops_on_padding"),
            row("matmul ceiling TFLOP/s", "matmul_tflops"),
            row("MFU", "mfu"),
            ("memory GiB", *(found[s]["memory_gib"]["ours"] for s in names)),
            ("memory GiB, reference", *(found[s]["memory_gib"].get("reference_all") for s in names)),
            row("subjects/s, reference", "reference_subjects_per_s"),
            ("ratio to reference", *interval("ratio_to_reference")),
            ("the same, decoder on acquired lines", *interval("ratio_to_reference_acquired")),
            row(f"step s, {world} worker(s)", "workers_step_s"),
            row(f"step s, {world} worker(s), DDP", "ddp_step_s"),
            ("ratio to DDP", *interval("ratio_to_ddp")),
        ),
        note="Ratios: how many times faster ours is; medians of steps in turns, 95 % interval.\n"
        "tokens/s: acquired lines. MFU: FLOPs by formula, over the best large matmul of this run.\n"
        f"Reference: fp32, attention matrices in memory, heads of {HEAD}, decoders on all positions, batch of {BATCH}, "
        "same losses and data.\n"
        f"All but the last three lines: one of {world} workers alone, with its share of CPUs and of the batch.",
    )
    shares = Table(
        caption=f"Parts of a step, {world} worker(s), timed one after the other",
        columns=("part", *(f"{s} {unit}" for s in names for unit in ("s", "share")), "is"),
        rows=tuple(
            (part, *(found[s][key][part] for s in names for key in ("parts_s", "parts_share")), what)
            for part, what in PARTS.items()
        ),
    )
    sweep = Table(
        caption="Time of a step of masked reconstruction at one R (fewer ACS lines where R would leave no others)",
        columns=("R", "step s"),
        rows=tuple((r, seconds) for r, seconds in result["cost_vs_acceleration"].items()),
    )
    return [speed, shares, sweep]


def keep(config: RunConfig, result: dict[str, Any], raw: dict[str, Any]) -> dict[str, str]:
    """``step-RECIPE.json`` in ``storage.root/bench``, with every single time; its path."""
    whole = result | {"raw": raw, "torch": torch.__version__, "config": json.loads(to_json(config))}
    store, base = storage.open_root(config.storage.root)
    store.create_dir(f"{base}/bench", recursive=True)
    path = f"{base}/bench/step-{config.recipe}.json"
    storage.write_atomic(store, path, json.dumps(whole, indent=1).encode())
    return {"results": path}
