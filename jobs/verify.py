"""python jobs/verify.py RECIPE [key=value ...]      a dataset's bytes and content, and the plan proved

Reads all shards whole: SHA-256, page checksums. Each damaged file is one line (file, row group, remedy), and exit
status 1. Then looks at what the bytes say: schema and counts, finite values, the energy of k-space against the image's,
labels in their units, segmentations and what they make of the volumes, subjects that come twice or in two splits. What
is wrong ends with status 1, what is doubtful is said. A contact sheet of random subjects and histograms of all labels
are drawn under storage.root. Last it proves the order of training: each subject once an epoch, the same global batches
and as many steps at every number of workers (verify.workers), the same again from any cursor."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs._main import Bar, main, recipe_config
from kmtr import figures
from kmtr.config import RunConfig
from kmtr.data import content, pipeline, shards, storage
from kmtr.data.mixing import Mixing, mixing
from kmtr.data.plan import Plan, Slot
from kmtr.data.reader import Dataset
from kmtr.data.splits import SPLITS
from kmtr.report import contact
from kmtr.simulation.population import REFERENCE
from kmtr.types import InputError, KmtrError

CHUNK = 8 << 20
SHOWN = 4
"""Subjects on the contact sheet."""
MOST_WORKERS = 64
STEPS_PER_CURSOR = 32
"""Steps compared behind each cursor; from the first one, all."""


# -------------------------------------------------------------------------------------------------------------- bytes


def damages(root: str) -> Iterator[str]:
    """One line per damaged file of a dataset.

    Raises:
        InputError: there is no dataset.
    """
    if not shards.present(root):
        shards.read_manifest(root)  # says how to make one
    try:
        manifest = shards.read_manifest(root)
    except InputError as error:  # there is one, damaged
        yield str(error)
        return
    bar = Bar(f"verify: shards of {root}")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for done, found in enumerate(pool.map(partial(damage, root), manifest.shards), 1):
            bar(done, len(manifest.shards))
            if found:
                yield found


def damage(root: str, shard: shards.Shard) -> str:
    """What is wrong with one shard or the index beside it, in one line; empty: nothing."""
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
        return f"{shard.name}: all row groups: {shards.first_line(error)}; {remedy}"
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


def _row_groups(store: Any, path: str, shard: shards.Shard) -> str:
    """Row groups that can't be read, page checksums included, in words; empty: all can."""
    bad = []
    try:
        with store.open_input_file(path) as source:
            file = pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True)
            if (file.metadata.num_rows, file.num_row_groups) != (shard.rows, shard.row_groups):
                return f"{file.num_row_groups} row groups of {file.metadata.num_rows} rows"
            if wrong := shards.check_version(file.schema_arrow.metadata):
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


# ------------------------------------------------------------------------------------------------------------ content


def contents(dataset: Dataset) -> list[tuple[int, content.Contents]]:
    """(dataset, contents of a shard) of all shards; a row group for each processor is in memory."""
    jobs = [(d, root, m, shard) for d, (root, m) in _numbered(dataset) for shard in m.shards]
    bar = Bar("verify: content of subjects")
    total = sum(shard.rows for *_, shard in jobs)
    found: list[tuple[int, content.Contents]] = []
    done = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        looked = pool.map(lambda job: (job[0], content.inspect(job[1], job[3], job[2].subject_shapes)), jobs)
        for (*_, shard), (number, inspected) in zip(jobs, looked, strict=True):
            found.append((number, inspected))
            done += shard.rows
            bar(done, total)
    return found


def _numbered(dataset: Dataset) -> list[tuple[int, tuple[str, shards.Manifest]]]:
    return list(enumerate(zip(dataset.roots, dataset.manifests, strict=True)))


def report(found: Sequence[tuple[int, content.Contents]], dataset: Dataset) -> dict[str, Any]:
    """Print what the content is like.

    Raises:
        KmtrError: values that no training should see, each kind named on stderr before.
    """
    findings = content.judge(found, dataset.manifests)
    everything = [inspected for _, inspected in found]
    parseval = max((inspected.parseval for inspected in everything), default=0.0)
    ef = content.ef_error(everything)
    print("\n".join(content.label_table(everything)))
    for line in findings.lines(findings.doubtful):
        print(f"doubtful: {line}")
    for line in findings.lines(findings.wrong):
        print(f"wrong: {line}", file=sys.stderr, flush=True)
    if findings.wrong:
        cases = sum(map(len, findings.wrong.values()))
        raise KmtrError(f"{cases} wrong value(s) of {len(findings.wrong)} kind(s), named above; nothing was changed")
    masks = "" if ef is None else f"; ejection fraction of the masks {ef:.1f} points from the label (median)"
    print(
        f"verify: content: finite, schema and counts as the manifest says, nobody twice; energy of k-space and image "
        f"equal to {parseval:.1g}{masks}"
    )
    return {
        "parseval": float(f"{parseval:.3g}"),
        "ef_of_masks_points": None if ef is None else round(ef, 2),
        "doubtful": {kind: len(cases) for kind, cases in findings.doubtful.items()},
    }


def pictures(config: RunConfig, dataset: Dataset, found: Sequence[tuple[int, content.Contents]]) -> dict[str, str]:
    """Draw contact sheet, histograms and sampling under storage.root; what -> where it is."""
    readers = [dataset.reader(split, config.data) for split in SPLITS]
    places = [(reader, row) for reader in readers for row in range(len(reader))]
    rng = np.random.default_rng(int(dataset.digest[:8], 16))
    chosen = sorted(rng.choice(len(places), min(SHOWN, len(places)), replace=False).tolist())
    studies = [(reader.split, shards.to_study(reader.read([row]))) for reader, row in (places[i] for i in chosen)]
    labels = np.concatenate([inspected.labels for _, inspected in found])
    simulated = all(manifest.source.startswith("simulate") for manifest in dataset.manifests)
    what = f"{len(places)} subjects, {'simulated' if simulated else 'ingested'}, digest {dataset.digest[:8]}"
    drawn = {
        "contact_sheet": contact.contact_sheet(studies, f"{len(studies)} random subjects of {what}"),
        "histograms": contact.histograms(labels, f"Labels of {what}", REFERENCE if simulated else None),
        "sampling": figures.sampling(config),
    }
    store, base = storage.open_root(f"{storage.absolute(config.storage.root).rstrip('/')}/verify-{dataset.digest[:8]}")
    storage.make_folder(store, base)
    where = {}
    for name, figure in drawn.items():
        content_ = io.BytesIO()
        figure.savefig(content_, format="png", dpi=130)
        storage.write_atomic(store, f"{base}/{name}.png", content_.getvalue())
        where[name] = f"{base}/{name}.png"
        print(f"verify: {name.replace('_', ' ')}: {where[name]}")
    return where


# --------------------------------------------------------------------------------------------------------------- plan


def worlds(config: RunConfig) -> tuple[int, ...]:
    """Numbers of workers to prove."""
    batch = config.data.global_batch
    return config.verify.workers or tuple(n for n in range(1, MOST_WORKERS + 1) if batch % n == 0)


def prove(make: Callable[[], Plan], workers: Sequence[int], epochs: int, bar: Bar | None = None) -> list[int]:
    """Check all that a plan promises over the first epochs.

    Args:
        make: returns the plan, anew for each cursor.

    Returns:
        The cursors (steps) from which it went on identically.

    Raises:
        KmtrError: a promise is broken: which, and at which step.
        InputError: a number of workers does not divide the global batch.
    """
    plan = make()
    steps = epochs * plan.steps_per_epoch
    digests, drawn = [], []
    for step in range(steps):
        whole = plan.batch(step)
        digests.append(_digest([whole]))
        drawn.append(np.stack([whole.row, whole.visit])[:, ~whole.repeated])
        for world in workers:
            _same(plan, step, world, digests[step])
        if (step + 1) % plan.steps_per_epoch == 0:
            _once(plan, np.concatenate(drawn[-plan.steps_per_epoch :], axis=1), step)
        if bar:
            bar(step + 1, steps)
    _never_twice(plan, np.concatenate(drawn, axis=1))
    border = plan.steps_per_epoch
    cursors = sorted(c for c in {0, border // 2, border - 1, border, steps // 2} if c < steps)
    for cursor in cursors:
        again = make()
        for step in range(cursor, min(cursor + STEPS_PER_CURSOR, steps)):
            for world in workers:
                _same(again, step, world, digests[step], f" after a restart at step {cursor}")
    return cursors


def _same(plan: Plan, step: int, world: int, expected: str, when: str = "") -> None:
    parts = [plan.share(step, rank, world) for rank in range(world)]
    if {len(part) for part in parts} != {plan.global_batch // world}:
        raise KmtrError(f"plan: step {step}: {world} workers do not have shares of one size{when}")
    if _digest(parts) != expected:
        raise KmtrError(f"plan: step {step}: {world} workers read another global batch{when}")


def _once(plan: Plan, drawn: np.ndarray, step: int) -> None:
    """One epoch: without weights all rows but a dropped tail; with weights whole batches."""
    lost = sum(plan.draws) - drawn.shape[1]
    if not 0 <= lost < plan.global_batch or (lost and plan.tail == "pad"):
        raise KmtrError(f"plan: the epoch that ends at step {step} lacks {lost} of {sum(plan.draws)} draws")
    if drawn[0].min() < 0 or drawn[0].max() >= plan.subjects:
        raise KmtrError(f"plan: the epoch that ends at step {step} has rows outside of the dataset")


def _never_twice(plan: Plan, drawn: np.ndarray) -> None:
    """No row twice in one pass over its source."""
    key = np.sort(drawn[1] * plan.subjects + drawn[0])
    if (key[1:] == key[:-1]).any():
        raise KmtrError("plan: a subject comes twice in one pass over its dataset")


def _digest(parts: Sequence[Slot]) -> str:
    said = [np.concatenate([getattr(part, name) for part in parts]) for name in ("row", "visit", "repeated")]
    ends = repr(sorted({(part.bucket, part.real) for part in parts}))
    return hashlib.blake2b(b"".join(array.tobytes() for array in said) + ends.encode(), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------------------------------------- report


def shape_table(config: RunConfig, dataset: Dataset, plan: Plan) -> tuple[list[str], float]:
    """Lines about the batch shapes, and the padding over all."""
    waste = pipeline.padding_of(config, dataset, plan)
    lines = [f"  {'batch shape (sax slices, coils, frames, ny, nx)':<50}{'subjects':>10}{'padding':>10}"]
    for shape, subjects, share in zip(pipeline.shapes_of(plan), waste.subjects, waste.shares, strict=True):
        lines.append(f"  {' x '.join(map(str, shape)):<50}{subjects:>10}{100 * share:>9.1f}%")
    return [*lines, f"  {'all':<50}{int(waste.subjects.sum()):>10}{100 * waste.total:>9.1f}%"], waste.total


def mixing_table(found: Mixing) -> list[str]:
    rows = (
        ("steps between neighbours in the file", found.distance),
        ("neighbours under a tenth of an epoch apart", found.near),
        ("pairs of one row group in a batch", found.pairs),
        ("chi-square of file against epoch, per degree of freedom", found.chi_square),
    )
    return [f"  {'mixing, relative to a full shuffle':<60}", *(f"  {name:<60}{value:>10.2f}" for name, value in rows)]


def run(words: list[str]) -> dict[str, Any]:
    config = recipe_config(words, __doc__ or "")
    found = 0
    for root in map(storage.absolute, config.data.roots):
        for line in damages(root):
            found += 1
            print(f"damaged: {' '.join(line.split())}", file=sys.stderr, flush=True)
    if found:
        raise KmtrError(f"{found} damaged file(s), each named above; nothing was changed")
    dataset = Dataset.open(config.data)
    files = sum(len(manifest.shards) for manifest in dataset.manifests)
    size = sum(shard.bytes for manifest in dataset.manifests for shard in manifest.shards)
    print(f"verify: {files} shards, {size / 1e9:.2f} GB: as written")
    found_content = contents(dataset)
    drawn = pictures(config, dataset, found_content)
    said = report(found_content, dataset)
    plan = pipeline.plan_of(config, dataset)
    numbers = worlds(config)
    make = partial(pipeline.plan_of, config, dataset)
    cursors = prove(make, numbers, config.verify.epochs, Bar("verify: steps of the plan"))
    print(
        f"verify: {plan.subjects} subjects, {plan.steps_per_epoch} steps of {plan.global_batch} an epoch, "
        f"{config.verify.epochs} epochs: each subject once a pass, the same batches and steps for "
        f"{', '.join(map(str, numbers))} workers, and again from steps {', '.join(map(str, cursors))}"
    )
    shapes, padding = shape_table(config, dataset, plan)
    quality = mixing(plan)
    print("\n".join([*shapes, *mixing_table(quality)]))
    return {
        "data": list(dataset.roots),
        "digest": dataset.digest,
        "shards": files,
        "bytes": size,
        "subjects": plan.subjects,
        "steps_per_epoch": plan.steps_per_epoch,
        "epochs": config.verify.epochs,
        "workers": list(numbers),
        "cursors": cursors,
        "batch_shapes": len(pipeline.shapes_of(plan)),
        "padding": round(padding, 4),
        "mixing": {name: round(value, 3) for name, value in vars(quality).items()},
        **said,
        **drawn,
    }


if __name__ == "__main__":
    main(__doc__ or "", run)
