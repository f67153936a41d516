"""Pretraining as a command: what it is about to do, its run, where the results are."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from kmtr import tracking
from kmtr.config import RunConfig
from kmtr.data.loader import planning
from kmtr.data.loader.planning import unreached
from kmtr.ray_start import start_ray
from kmtr.train import driver, registered


def run(config: RunConfig) -> dict[str, Any]:
    """Pretrain, or find that it is done; what the last line on stdout says."""
    registered.check(config)
    config, dataset = driver.resolve(config)
    name, folder = driver.run_folder(config, dataset)
    done = driver.finished(folder)
    if done is not None:
        print(f"pretrain: {name} is finished, reused (run.fresh=true starts anew)")
        driver.settled(done, config)
        return asdict(done) | registered.register(config, done.run_id, done.encoder)
    print(
        f"pretrain: {name}: {dataset.rows('train')} subjects, {config.masked_steps} steps of masked pretraining and "
        f"{config.align_steps} of alignment, batch {config.data.global_batch} on {config.train.workers} worker(s), "
        f"ZeRO-{config.train.zero_stage}, {'bf16' if config.train.bf16 else 'fp32'}",
        flush=True,
    )
    if advice := unreached(config.data, dataset):
        print(f"pretrain: note: {advice}")
    plan = planning.plan_of(config, dataset)
    if len(shapes := plan.shapes) > 1:
        padding = planning.padding_of(config, dataset, plan).total
        print(
            f"pretrain: {len(shapes)} batch shapes, {100 * padding:.1f} % of them padding (jobs/verify.py lists them)"
        )
    start_ray()
    began = time.perf_counter()
    outcome = driver.fit(config)
    if not outcome.encoder:
        print(f"pretrain: {name} pauses at step {outcome.metrics['step']:.0f} (train.until)")
        return asdict(outcome)
    print(f"pretrain: {name} finished in {time.perf_counter() - began:.0f} s")
    print(f"  encoder   {outcome.encoder}\n  tracking  {tracking.where(config.tracking.uri)}, run {outcome.run_id}")
    return asdict(outcome) | registered.register(config, outcome.run_id, outcome.encoder)
