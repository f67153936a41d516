"""Verification of a dataset: its bytes, what they mean, and the order of training; printed and drawn."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from kmtr.config import RunConfig
from kmtr.data.dataset import content, record, storage
from kmtr.data.dataset.damage import damages
from kmtr.data.dataset.manifest import Manifest
from kmtr.data.dataset.reader import Dataset
from kmtr.data.dataset.splits import SPLITS
from kmtr.data.loader import patterns, planning
from kmtr.data.loader.mixing import Mixing, mixing
from kmtr.data.loader.order import Plan
from kmtr.data.loader.proof import prove
from kmtr.progress import Bar
from kmtr.report import contact, figures_kspace
from kmtr.simulation.population import REFERENCE
from kmtr.types import InputError, KmtrError

SHOWN = 4
"""Subjects on the contact sheet."""
MOST_WORKERS = 64


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


def _numbered(dataset: Dataset) -> list[tuple[int, tuple[str, Manifest]]]:
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
    if centreless := sum(inspected.centreless for inspected in everything):
        print(f"verify: {centreless} frames of slices have no line near the centre of k-space: read all the same")
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
        "frames_without_centre": centreless,
        "doubtful": {kind: len(cases) for kind, cases in findings.doubtful.items()},
    }


def pictures(config: RunConfig, dataset: Dataset, found: Sequence[tuple[int, content.Contents]]) -> dict[str, str]:
    """Draw contact sheet, histograms and sampling under storage.root; what -> where it is."""
    readers = [dataset.reader(split, config.data) for split in SPLITS]
    places = [(reader, row) for reader in readers for row in range(len(reader))]
    rng = np.random.default_rng(int(dataset.digest[:8], 16))
    chosen = sorted(rng.choice(len(places), min(SHOWN, len(places)), replace=False).tolist())
    studies = [(reader.split, record.to_study(reader.read([row]))) for reader, row in (places[i] for i in chosen)]
    labels = np.concatenate([inspected.labels for _, inspected in found])
    simulated = all(manifest.simulated for manifest in dataset.manifests)
    what = f"{len(places)} subjects, {'simulated' if simulated else 'ingested'}, digest {dataset.digest[:8]}"
    drawn = {
        "contact_sheet": contact.contact_sheet(studies, f"{len(studies)} random subjects of {what}"),
        "histograms": contact.histograms(labels, f"Labels of {what}", REFERENCE if simulated else None),
        "sampling": figures_kspace.sampling(config, patterns.table(config.sampling)),
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


def worlds(config: RunConfig) -> tuple[int, ...]:
    """Numbers of workers to prove."""
    batch = config.data.global_batch
    return config.verify.workers or tuple(n for n in range(1, MOST_WORKERS + 1) if batch % n == 0)


# ------------------------------------------------------------------------------------------------------------- report


def shape_table(config: RunConfig, dataset: Dataset, plan: Plan) -> tuple[list[str], float]:
    """Lines about the batch shapes, and the padding over all."""
    waste = planning.padding_of(config, dataset, plan)
    lines = [f"  {'batch shape (sax slices, coils, frames, ny, nx)':<50}{'subjects':>10}{'padding':>10}"]
    for shape, subjects, share in zip(plan.shapes, waste.subjects, waste.shares, strict=True):
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


def run(config: RunConfig) -> dict[str, Any]:
    """Verify, print and draw; what the last line on stdout says.

    Raises:
        KmtrError: files are damaged, values are wrong, or the plan breaks a promise; each is named before.
    """
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
    drawn: dict[str, str] = {}
    plan, misfit = None, ""
    try:
        drawn = pictures(config, dataset, found_content)
        plan = planning.plan_of(config, dataset)
    except InputError as error:  # a fault of the settings, not of the dataset
        misfit = str(error)
    verified = {"data": list(dataset.roots), "digest": dataset.digest, "shards": files, "bytes": size}
    verified |= report(found_content, dataset) | drawn
    if plan is None:
        print(f"verify: no order of training is proved, since these settings do not fit the dataset: {misfit}")
        return verified | {"not_proved": misfit}
    return verified | proved(config, dataset, plan)


def proved(config: RunConfig, dataset: Dataset, plan: Plan) -> dict[str, Any]:
    """Prove the order of training and print what it is like; what the last line says of it.

    Raises:
        KmtrError: the plan breaks a promise.
        InputError: `verify.workers` do not share the global batch.
    """
    numbers = worlds(config)
    make = partial(planning.plan_of, config, dataset)
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
        "subjects": plan.subjects,
        "steps_per_epoch": plan.steps_per_epoch,
        "epochs": config.verify.epochs,
        "workers": list(numbers),
        "cursors": cursors,
        "batch_shapes": len(plan.shapes),
        "padding": round(padding, 4),
        "mixing": {name: round(value, 3) for name, value in vars(quality).items()},
    }
