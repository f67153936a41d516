"""Damage of a dataset's files: every shard against its manifest, checksum by checksum."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kmtr.data.dataset import record, shards, storage
from kmtr.data.dataset.manifest import Shard, has_dataset, read_manifest
from kmtr.progress import Bar
from kmtr.types import InputError

CHUNK = 8 << 20


def damages(root: str) -> Iterator[str]:
    """One line per damaged file of a dataset.

    Raises:
        InputError: there is no dataset.
    """
    if not has_dataset(root):
        read_manifest(root)  # says how to make one
    try:
        manifest = read_manifest(root)
    except InputError as error:  # there is one, damaged
        yield str(error)
        return
    bar = Bar(f"verify: shards of {root}")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for done, found in enumerate(pool.map(partial(damage, root), manifest.shards), 1):
            bar(done, len(manifest.shards))
            if found:
                yield found


def damage(root: str, shard: Shard) -> str:
    """Damage of one shard or of the index beside it, in one line; empty: none."""
    store, base = storage.open_root(root)
    path = f"{base}/{shard.name}"
    remedy = "restore it from a copy, or write the dataset anew"
    info = store.get_file_info(path)
    if info.size is None:
        return f"{shard.name}: all row groups: the file is missing; {remedy}"
    if info.size != shard.bytes:
        size = f"expected {shard.bytes} bytes, got {info.size}"
        return f"{shard.name}: {_row_groups(store, path, shard) or 'row groups unknown'}: {size}; {remedy}"
    try:
        changed = _sha256(store, path) != shard.sha256
    except OSError as error:
        return f"{shard.name}: all row groups: {storage.reason(error)}; {remedy}"
    where = _row_groups(store, path, shard)
    if changed:
        return f"{shard.name}: {where or 'outside of the row groups'}: SHA-256 is not the manifest's; {remedy}"
    if where:
        return f"{shard.name}: {where}: what the manifest was written for is not readable; write the dataset anew"
    index = shards.index_name(shard.name)
    if shard.index and (
        not storage.exists(store, f"{base}/{index}") or _sha256(store, f"{base}/{index}") != shard.index
    ):
        return f"{index}: no row group: not the index that was written; {remedy} (until then it is read from the shard)"
    return ""


def _row_groups(store: Any, path: str, shard: Shard) -> str:
    """Row groups that can't be read, page checksums included, in words; empty: all can."""
    bad = []
    try:
        with store.open_input_file(path) as source:
            file = pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True)
            if (file.metadata.num_rows, file.num_row_groups) != (shard.rows, shard.row_groups):
                return f"{file.num_row_groups} row groups of {file.metadata.num_rows} rows"
            if wrong := record.check_version(file.schema_arrow.metadata):
                return f"all row groups of {wrong}"
            for group in range(file.num_row_groups):
                try:
                    file.read_row_group(group, use_threads=False)
                except (pa.ArrowException, OSError):
                    bad.append(group)
    except (pa.ArrowException, OSError):
        return "all row groups (no readable footer)"
    return f"row group {', '.join(map(str, bad))}" if bad else ""


def _sha256(store: Any, path: str) -> str:
    digest = hashlib.sha256()
    with store.open_input_stream(path) as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
