"""python jobs/simulate.py RECIPE [key=value ...]      write a simulated cohort to data.root"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs._main import Bar, main, recipe_config, start_ray
from kmtr.config import RunConfig
from kmtr.data import pipeline, shards, storage
from kmtr.physics import phantom
from kmtr.types import InputError, Study


def simulated(item: int, config: RunConfig) -> Study:
    """Subject number `item` of the cohort that the configuration describes."""
    return phantom.simulate(
        item,
        seed=config.simulate.seed,
        views=config.data.views,
        sax_slices=config.data.sax_slices,
        frames=config.data.frames,
        matrix=config.data.matrix,
        snr_db=config.simulate.snr_db,
    )


def made_by(config: RunConfig) -> str:
    """What decides a simulated cohort's content: the same text, the same data."""
    d, s = config.data, config.simulate
    return (
        f"simulate views={','.join(d.views)} sax_slices={d.sax_slices} frames={d.frames} matrix={d.matrix[0]},"
        f"{d.matrix[1]} subjects={s.subjects} seed={s.seed} snr_db={s.snr_db} dtype={config.shards.dtype} "
        f"rows={config.shards.rows} split={config.shards.split}"
    )


def run(words: list[str]) -> dict[str, Any]:
    config = recipe_config(words, __doc__ or "")
    root = storage.absolute(config.data.root)
    source = made_by(config)
    if shards.present(root):
        manifest = shards.read_manifest(root)
        if manifest.source != source:
            raise InputError(
                f"data.root: {root} holds another dataset ({manifest.source}); "
                "choose another folder, or remove that one"
            )
        shards.preflight(root, manifest)
        print(f"simulate: {root} is complete, reused")
        return summary(root, manifest) | {"reused": True}
    start_ray()
    ids = [phantom.subject_id(i, seed=config.simulate.seed) for i in range(config.simulate.subjects)]
    plan = pipeline.shard_jobs(ids, config.shards.rows, config.shards.split)
    began = time.perf_counter()
    manifest, _ = pipeline.write_dataset(
        root, plan, partial(simulated, config=config), config.shards.dtype, source, Bar("simulate: subjects")
    )
    seconds = time.perf_counter() - began
    print(f"simulate: {config.simulate.subjects} subjects in {seconds:.0f} s, {root}")
    return summary(root, manifest) | {"seconds": round(seconds, 1)}


def summary(root: str, manifest: shards.Manifest) -> dict[str, Any]:
    subjects = {split: manifest.rows(split) for split in shards.SPLITS}
    size = sum(shard.bytes for shard in manifest.shards)
    return {"data": root, "subjects": subjects, "bytes": size, "digest": manifest.digest}


if __name__ == "__main__":
    main(__doc__ or "", run)
