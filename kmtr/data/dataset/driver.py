"""The driver of writing a dataset: splits, the writing itself, what they say about it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from kmtr.config import RunConfig
from kmtr.data.dataset import shards, splits, storage, writing
from kmtr.data.dataset.manifest import Manifest, has_dataset, preflight, read_manifest
from kmtr.data.dataset.ray import write_dataset
from kmtr.data.sources import Unused
from kmtr.progress import Bar
from kmtr.ray_start import start_ray
from kmtr.types import InputError, Study


def write(
    what: str,
    config: RunConfig,
    ids: Sequence[str],
    make: Callable[[int], Study],
    source: str,
    strata: Callable[[], list[str]],
    unused: Sequence[Unused] = (),
) -> tuple[Manifest, dict[str, Any]]:
    """Write the dataset at data.root, or find that it is there.

    Args:
        what: the command's name.
        ids: pseudonym of each item.
        make: item -> Study.
        source: what decides the content; the splits' settings are added.
        strata: of each item, where known before reading; asked only for a stratified split.
        unused: files of the source that belong to no item.

    Returns:
        The manifest, and what the last line says.

    Raises:
        InputError: another dataset lies there, or no subject can be read.
    """
    root, s = storage.absolute(config.data.root), config.shards
    earlier: dict[str, str] = {}
    source += f" dtype={s.dtype} compression={s.compression} rows={s.rows} split={s.split}"
    if s.split_from:
        other = storage.absolute(s.split_from)
        found = read_manifest(other)
        source += f" split_from={found.digest[:16]}"
        earlier = shards.splits_of(other, found)
    if has_dataset(root):
        return _reused(what, root, source)
    start_ray()
    assigned = splits.assign(ids, s.split, strata() if s.split == "stratified" else None, earlier)
    if s.split_from:
        print(f"{what}: {sum(i in earlier for i in ids)} of {len(ids)} subjects keep the split of shards.split_from")
    began = time.perf_counter()
    left = tuple(dataclasses.asdict(files) for files in unused)
    task = writing.WriteShards(root, writing.shard_jobs(assigned, s.rows), list(ids), make, s, source, left)
    manifest, refused, cost = write_dataset(task, Bar(f"{what}: subjects"))
    seconds = time.perf_counter() - began
    _say_refused(what, refused, len(ids))
    _say_report(what, writing.report(root))
    said = summary(root, manifest) | {"seconds": round(seconds, 1)}
    if cost.subjects:
        frames = cost.subjects * _frames(manifest)
        said["written"] = cost.subjects  # by this run: others were there already
        said["frames_per_s"] = round(frames / seconds, 1)
        said["subjects_per_core_minute"] = round(60 * cost.subjects / max(cost.core_s, 1e-9), 1)
        said["core_seconds"] = round(cost.core_s, 1)
        said["peak_memory_gib"] = round(cost.peak_bytes / 2**30, 2)
        print(
            f"{what}: {cost.subjects} subjects in {seconds:.0f} s: {said['frames_per_s']} frames/s, "
            f"{said['subjects_per_core_minute']} subjects per core-minute (processor time of the tasks), "
            f"{said['peak_memory_gib']} GiB in the largest process"
        )
    return manifest, said


def summary(root: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "data": storage.shown(root),
        "subjects": {split: manifest.rows(split) for split in splits.SPLITS},
        "refused": len(writing.refused(root)),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "digest": manifest.digest,
    }


def _reused(what: str, root: str, source: str) -> tuple[Manifest, dict[str, Any]]:
    manifest = read_manifest(root)
    if manifest.source != source:
        raise InputError(
            f"data.root: {storage.shown(root)} holds another dataset ({manifest.source}); choose another folder, or "
            "remove that one"
        )
    preflight(root, manifest)
    print(f"{what}: {storage.shown(root)} is complete, reused")
    return manifest, summary(root, manifest) | {"reused": True}


def _say_refused(what: str, refused: Sequence[dict[str, str]], subjects: int) -> None:
    if refused:
        print(f"{what}: refused {len(refused)} of {subjects} subjects, all of them in {writing.REPORT}:")
        for line in writing.reasons(refused):
            print(f"  {line}")


def _say_report(what: str, report: dict[str, Any]) -> None:
    """The notes on subjects that are in the dataset, and the files that are in none."""
    if notes := report["notes"]:
        print(f"{what}: notes on {len({n['subject'] for n in notes})} subjects, all of them in {writing.REPORT}:")
        for line in writing.reasons(notes, key="note"):
            print(f"  {line}")
    if left := report["unused"]:
        listed = "; ".join(f"{len(files['files'])} x {files['reason']}" for files in left)
        print(f"{what}: {sum(len(f['files']) for f in left)} files not used (numbers in {writing.REPORT}): {listed}")


def _frames(manifest: Manifest) -> float:
    """Slices times frames of a subject, mean over all."""
    total = rows = 0
    for shard in manifest.shards:
        for count, number in shard.shapes:
            rows += count
            total += count * sum(shape[0] * shape[2] for shape in manifest.subject_shapes[number].values())
    return total / max(rows, 1)
