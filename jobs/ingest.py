"""python jobs/ingest.py FORMAT SOURCE [key=value ...]      nifti | cmrxrecon -> data.root

SOURCE is a file or a folder of them. Subjects get pseudonyms by a keyed hash; KMTR_SUBJECT_KEY is the key (keep it: the
same key gives the same pseudonyms). Fewer than 20 subjects are not split (shards.split)."""

from __future__ import annotations

import hashlib
import os
import sys
from functools import partial
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs._main import Bar, main, refuse_relative_under_submit, start_ray
from jobs.simulate import summary
from kmtr.config import RunConfig, override
from kmtr.data import pipeline, shards, sources, storage
from kmtr.types import InputError, Study


def ingested(item: int, items: list[sources.Item], config: RunConfig, subject_key: bytes) -> Study:
    """The study of one source item."""
    i = config.ingest
    options = sources.Options(i.matrix, config.seed, i.axes, i.oversampling, i.coils, int(i.gib * 2**30))
    return sources.read(items[item], options, subject_key=subject_key)


def run(words: list[str]) -> dict[str, Any]:
    if len(words) < 2 or "=" in words[0] or "=" in words[1]:
        raise InputError(f"expected FORMAT SOURCE first, FORMAT one of {', '.join(sources.FORMATS)}; see --help")
    changes: dict[str, Any] = {}
    for word in words[2:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"expected key=value, got {word!r}")
        changes[key] = value
    config = override(RunConfig(), changes)
    refuse_relative_under_submit(config)
    root = storage.absolute(config.data.root)
    subject_key = os.environ.get("KMTR_SUBJECT_KEY", "kmtr").encode()
    items = sources.discover(words[0], storage.absolute(words[1]))
    ids = [sources.pseudonym(item.subject, subject_key) for item in items]
    source = made_by(config, words[0], ids)
    if shards.present(root):
        manifest = shards.read_manifest(root)
        if manifest.source != source:
            raise InputError(f"data.root: {root} holds another dataset; choose another folder, or remove that one")
        shards.preflight(root, manifest)
        print(f"ingest: {root} is complete, reused")
        return summary(root, manifest) | {"reused": True}
    start_ray()
    plan = pipeline.shard_jobs(ids, config.shards.rows, config.shards.split)
    make = partial(ingested, items=items, config=config, subject_key=subject_key)
    try:
        manifest, refused = pipeline.write_dataset(
            root, plan, make, config.shards.dtype, source, Bar("ingest: subjects")
        )
    except InputError as error:
        raise InputError(f"{words[1]}: {error}") from None
    for line in refused:
        print(f"ingest: refused: {line}")
    for view, shapes in manifest.shapes.items():
        print(f"ingest: {view} (slice coil t ky kx): " + ", ".join(" x ".join(map(str, s)) for s in shapes))
    if len(items) < shards.MIN_SPLIT_SUBJECTS and config.shards.split == "auto":
        print(f"ingest: {len(items)} subjects are too few to split; all are in train (shards.split)")
    return summary(root, manifest) | {"refused": len(refused)}


def made_by(config: RunConfig, format: str, ids: list[str]) -> str:
    """What decides the content, without the names of patients or their files."""
    subjects = hashlib.sha256("".join(ids).encode()).hexdigest()[:16]
    return (
        f"ingest {format} subjects={len(ids)} of={subjects} matrix={config.ingest.matrix} axes={config.ingest.axes} "
        f"seed={config.seed} dtype={config.shards.dtype} rows={config.shards.rows} split={config.shards.split}"
    )


if __name__ == "__main__":
    main(__doc__ or "", run)
