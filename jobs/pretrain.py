"""python jobs/pretrain.py RECIPE [key=value ...]      stage=reconstruct | align (default: both, one after the other)

The same command resumes an unfinished run and prints the result of a finished one; run.fresh=true starts anew."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs._main import main, recipe_config, start_ray
from kmtr.data import pipeline
from kmtr.data.batch import unreached
from kmtr.train import driver


def run(words: list[str]) -> dict[str, Any]:
    config = recipe_config(words, __doc__ or "")
    config, dataset = driver.resolve(config)
    name, folder = driver.run_folder(config, dataset)
    done = driver.finished(folder)
    if done is not None:
        print(f"pretrain: {name} is finished, reused (run.fresh=true starts anew)")
        return asdict(done)
    print(
        f"pretrain: {name}: {dataset.rows('train')} subjects, {config.reconstruct_steps} steps of reconstruction and "
        f"{config.align_steps} of alignment, batch {config.data.global_batch} on {config.train.workers} worker(s), "
        f"ZeRO-{config.train.zero_stage}, {'bf16' if config.train.bf16 else 'fp32'}",
        flush=True,
    )
    if advice := unreached(config.data, dataset):
        print(f"pretrain: note: {advice}")
    plan = pipeline.plan_of(config, dataset)
    if len(shapes := pipeline.shapes_of(plan)) > 1:
        padding = pipeline.padding_of(config, dataset, plan).total
        print(
            f"pretrain: {len(shapes)} batch shapes, {100 * padding:.1f} % of them padding (jobs/verify.py lists them)"
        )
    start_ray()
    began = time.perf_counter()
    outcome = driver.fit(config)
    print(f"pretrain: {name} finished in {time.perf_counter() - began:.0f} s")
    print(f"  encoder   {outcome.encoder}\n  tracking  {config.tracking.uri} (make ui), run {outcome.run_id}")
    return asdict(outcome)


if __name__ == "__main__":
    main(__doc__ or "", run)
