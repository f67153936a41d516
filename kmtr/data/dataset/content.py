"""Checks of a dataset's values, beyond being the bytes that were written: one shard at a time, then all together.

`inspect` reads a shard, a row group at a time, and returns small arrays; `judge` looks at all of them. Findings are
``wrong`` (no training should see this) or ``doubtful`` (somebody should look). Subjects are named by their pseudonyms.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kmtr.data.dataset import record, storage
from kmtr.data.dataset.manifest import DamagedShard, Manifest, Shard
from kmtr.data.dataset.tables import PLAUSIBLE
from kmtr.physics import centre
from kmtr.physics.fourier import ifft2c
from kmtr.types import COVARIATES, DISEASES, LABELS, PHENOTYPES, SEGMENTATION_CLASSES, UNLABELLED, VIEWS

UNITS = PHENOTYPES | dict.fromkeys(DISEASES, "0 or 1") | COVARIATES

PARSEVAL = 1e-4
"""Relative difference of the energies of k-space and image at most: float32 sums of a frame."""

EF_POINTS = 15.0
"""Between the ejection fraction of the masks and the label: more is doubtful."""

VOLUME_RATIO = 2.0
"""Between the LV's end-diastolic volume of the masks and the label, either way."""

SPACING_MM = (0.3, 60.0)
"""Plausible spacing of pixels."""

DISTANCE_MM = (0.3, 120.0)
"""Between slices: few ones, taken evenly, share the length of the heart."""

LIKE_OTHERS = 0.2
"""Fraction of the field of view: the heart's masks farther from the middle of the cohort's are doubtful."""

ENOUGH = 20
"""Subjects with masks, to say where masks usually are."""

CELLS = 16
"""Magnitudes are compared in so many means along y and x."""

THE_SAME = 0.9999
"""Correlation of these from which on two subjects' images are the same; of two scans of one heart it is less."""

FEW_FRAMES = 6
"""Fewer, taken evenly over the heartbeat, may miss end-systole by more than `EF_POINTS`; from here on none did."""

FRAME_TIME_S = (0.002, 0.5)
HEARTBEAT_S = 2.0
"""Cycle of a slow heart, s: few frames, taken evenly, may be farther apart than `FRAME_TIME_S`, but share that."""

EXAMPLES = 5
"""Findings of one kind that are listed one by one."""


@dataclass
class Findings:
    """Findings; kinds that many subjects share are told once, with their number.

    Attributes:
        wrong, doubtful: kind -> (where and what) of each case.
    """

    wrong: dict[str, list[str]] = field(default_factory=dict)
    doubtful: dict[str, list[str]] = field(default_factory=dict)

    def add(self, other: Findings) -> None:
        for ours, theirs in ((self.wrong, other.wrong), (self.doubtful, other.doubtful)):
            for kind, cases in theirs.items():
                ours.setdefault(kind, []).extend(cases)

    @staticmethod
    def lines(kinds: dict[str, list[str]]) -> Iterator[str]:
        for kind, cases in kinds.items():
            more = f", and {len(cases) - EXAMPLES} more" if len(cases) > EXAMPLES else ""
            yield f"{kind}: {'; '.join(cases[:EXAMPLES])}{more}"


@dataclass(frozen=True)
class Contents:
    """Content of one shard, rows in file order.

    Attributes:
        ids: pseudonyms.
        labels: float64 ``row label`` in the order of LABELS, NaN = unknown.
        masks: float64 ``row 2``: LV end-diastolic volume (mL) and ejection fraction (%) of the short-axis masks.
        prints: a hash of each subject's k-space.
        drawn: a hash of each subject's contours; empty where nothing is drawn.
        pictures: float32 ``row pixel``: coarse magnitudes of each subject, `_picture`.
        places: float64 ``row 2``: middle of the short axis' LV masks, as a share of the image along y and x.
        parseval: largest relative difference of energies.
        centreless: frames without a line near the centre of k-space, over all slices.
        findings: about single subjects.
    """

    split: str
    ids: list[str]
    labels: np.ndarray
    masks: np.ndarray
    prints: list[str]
    drawn: list[str]
    pictures: np.ndarray
    places: np.ndarray
    parseval: float
    centreless: int
    findings: Findings


def inspect(root: str, shard: Shard, subject_shapes: Sequence[dict[str, list[int]]]) -> Contents:
    """Read a shard whole; at most a row group is held in memory.

    Raises:
        DamagedShard: it can't be read (`jobs/verify.py` says more about that).
    """
    store, base = storage.open_root(root)
    findings, worst, centreless = Findings(), 0.0, 0
    ids: list[str] = []
    prints: list[str] = []
    drawn: list[str] = []
    labels, masks, shapes, places, pictures = [], [], [], [], []
    try:
        with store.open_input_file(f"{base}/{shard.name}") as source:
            file = pq.ParquetFile(source, pre_buffer=False)
            for line in schema_errors(file.schema_arrow):
                findings.wrong.setdefault("schema", []).append(f"{shard.name}: {line}")
            for group in range(file.num_row_groups):
                table = record.current(file.read_row_group(group, use_threads=False))
                for row in range(len(table)):
                    subject = str(table.column("subject_id")[row])
                    ids.append(subject)
                    error, frames, digest = _views(table, row, f"{subject} in {shard.name}", findings)
                    worst = max(worst, error)
                    centreless += frames
                    prints.append(digest)
                    masks.append(_volumes(table, row))
                    drawn.append(_drawn(table, row))
                    pictures.append(_picture(table, row))
                    places.append(_place(table, row))
                    shapes.append({v: s for v in VIEWS if (s := table.column(f"shape_{v}")[row].as_py()) is not None})
                labels.append(np.stack([table.column(n).to_numpy().astype(float) for n in LABELS], axis=1))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DamagedShard(f"{shard.name}: {storage.reason(error)}; restore or rewrite it") from None
    expected = [subject_shapes[number] for rows, number in shard.shapes for _ in range(rows)]
    if len(ids) != shard.rows or shapes != expected:
        findings.wrong.setdefault("counts", []).append(f"{shard.name}: rows or shapes are not the manifest's")
    return Contents(
        shard.split,
        ids,
        np.concatenate(labels),
        np.array(masks).reshape(-1, 2),
        prints,
        drawn,
        np.array(pictures).reshape(-1, CELLS * CELLS),
        np.array(places).reshape(-1, 2),
        worst,
        centreless,
        findings,
    )


def judge(contents: Sequence[tuple[int, Contents]], manifests: Sequence[Manifest]) -> Findings:
    """Findings of all shards, and those that none shows by itself: counts, label ranges, identities, one subject twice.

    Args:
        contents: (dataset, contents of a shard) of all shards of all datasets.
        manifests: of the datasets.
    """
    findings = Findings()
    for _, content in contents:
        findings.add(content.findings)
    for number, manifest in enumerate(manifests):
        here = [c.labels for d, c in contents if d == number]
        known = (~np.isnan(np.concatenate(here))).sum(0) if here else np.zeros(len(LABELS), int)
        for name, count in zip(LABELS, known.tolist(), strict=True):
            if count != manifest.labels.get(name, 0):
                findings.wrong.setdefault("counts", []).append(
                    f"{name}: {count} subjects have it, the manifest says {manifest.labels.get(name, 0)}"
                )
    ids = [subject for _, c in contents for subject in c.ids]
    values = np.concatenate([c.labels for _, c in contents]) if contents else np.zeros((0, len(LABELS)))
    _ranges(ids, values, findings)
    _identities(ids, values, findings)
    masks = np.concatenate([c.masks for _, c in contents]) if contents else np.zeros((0, 2))
    _against_masks(ids, values, masks, findings)
    _places(ids, np.concatenate([c.places for _, c in contents]) if contents else np.zeros((0, 2)), findings)
    where = [(d, c.split) for d, c in contents for _ in c.ids]
    _twice("a subject comes twice", ids, ids, where, findings.wrong)
    _twice("two subjects have the same k-space", [p for _, c in contents for p in c.prints], ids, where, findings.wrong)
    _twice(
        "two subjects have the same contours", [p for _, c in contents for p in c.drawn], ids, where, findings.doubtful
    )
    _alike(np.concatenate([c.pictures for _, c in contents]) if contents else np.zeros((0, 1)), ids, findings)
    return findings


def label_table(contents: Iterable[Contents]) -> list[str]:
    """Lines: every known label with its unit, subjects, mean, spread and range, and its mean in each split."""
    by_split: dict[str, list[np.ndarray]] = {}
    for content in contents:
        by_split.setdefault(content.split, []).append(content.labels)
    splits = [name for name in ("train", "val", "test") if name in by_split]
    parts = {name: np.concatenate(by_split[name]) for name in splits}
    if not parts:
        return []
    whole = np.concatenate(list(parts.values()))
    lines = [
        f"  {'label':<24}{'unit':<9}{'known':>8}{'mean':>9}{'SD':>8}{'least':>9}{'most':>9}  "
        + "".join(f"{'mean ' + name:>12}" for name in splits)
    ]
    for column, name in enumerate(LABELS):
        values = whole[:, column]
        values = values[~np.isnan(values)]
        if not values.size:
            continue
        means = []
        for split in splits:
            some = parts[split][:, column]
            some = some[~np.isnan(some)]
            means.append(f"{some.mean():.3g}" if some.size else "-")
        numbers = (f"{values.mean():.3g}", f"{values.std():.3g}", f"{values.min():.3g}", f"{values.max():.3g}")
        lines.append(
            f"  {name:<24}{UNITS[name]:<9}{values.size:>8}"
            + "".join(f"{text:>{width}}" for text, width in zip(numbers, (9, 8, 9, 9), strict=True))
            + "  "
            + "".join(f"{mean:>12}" for mean in means)
        )
    return lines


# ---------------------------------------------------------------------------------------------------- one subject


def schema_errors(found: pa.Schema) -> Iterator[str]:
    """Columns that are not what the schema says; those of earlier versions may lack what came later."""
    metadata = found.metadata or {}
    wanted = record.schema(metadata.get(b"kmtr.dtype", b"").decode())
    version = int(metadata.get(b"kmtr.schema_version", b"0"))
    for column in wanted:
        place = found.get_field_index(column.name)
        if place < 0:
            if record.added(column.name) <= version:
                yield f"no column {column.name}"
        elif found.field(place).type != column.type:
            yield f"column {column.name}: expected {column.type}, got {found.field(place).type}"
    for name in set(found.names) - set(wanted.names):
        yield f"unknown column {name}"


def _views(table: pa.Table, row: int, who: str, findings: Findings) -> tuple[float, int, str]:
    """Checks all views of a subject; its largest relative difference of energies, its frames without a line near the
    centre, and a hash of its k-space.
    """
    digest, worst, centreless = hashlib.blake2b(digest_size=16), 0.0, 0
    for view in VIEWS:
        what = f"{who}, {view}"
        try:
            raw = record.raw_kspace(table, row, view)
        except ValueError:
            findings.wrong.setdefault("k-space is not of its shape", []).append(what)
            continue
        if raw is None:
            continue
        stored, _ = raw
        digest.update(stored.data)
        slices, _, frames, ny, nx, _ = stored.shape
        packed, sampled = table.column(f"acquired_{view}")[row].as_py(), None
        if packed is not None and len(packed) != math.ceil(slices * frames * ny / 8):
            findings.wrong.setdefault("the pattern is not of the k-space's shape", []).append(what)
        elif packed is not None:
            sampled = record.unpack(packed, (slices, frames, ny))
        if (error := _energy(stored, what, findings)) is not None:
            worst = max(worst, error)
            centreless += _around_middle(stored, sampled, what, findings)
        _segmentation(table, row, view, (slices, frames, ny, nx), what, findings)
        spacing = table.column(f"spacing_mm_{view}")[row].as_py()
        limits = (DISTANCE_MM, SPACING_MM, SPACING_MM)
        if spacing is not None and not all(a <= s <= b for s, (a, b) in zip(spacing, limits, strict=True)):
            kind = "spacing that no scan has"
            findings.doubtful.setdefault(kind, []).append(f"{what}: {spacing}")
        affine = _affine(table, view, row)
        if affine is not None and not (len(affine) == 12 and np.isfinite(affine).all()):
            findings.wrong.setdefault("the affine is not of 3 x 4 finite numbers", []).append(what)
        time = table.column(f"frame_time_s_{view}")[row].as_py()
        longest = max(FRAME_TIME_S[1], HEARTBEAT_S / frames)
        if time is not None and not FRAME_TIME_S[0] <= time <= longest:
            findings.doubtful.setdefault(f"frame time outside of {FRAME_TIME_S} s", []).append(f"{what}: {time:.3g}")
    return worst, centreless, digest.hexdigest()


def _affine(table: pa.Table, view: str, row: int) -> list[float] | None:
    name = f"affine_{view}"
    return table.column(name)[row].as_py() if name in table.column_names else None


def _energy(stored: np.ndarray, what: str, findings: Findings) -> float | None:
    """Relative difference of the energies of k-space and image (Parseval), slice by slice; None: there is no energy."""
    worst = 0.0
    for values in stored:
        kspace = values.astype(np.float32).view(np.complex64)[..., 0]
        here = _sum_of_squares(kspace)
        if not math.isfinite(here) or not np.isfinite(kspace).all():
            findings.wrong.setdefault("k-space holds values that are not finite", []).append(what)
            return None
        image = ifft2c(kspace)
        worst = max(worst, abs(_sum_of_squares(image) - here) / here if here else 0.0)
    if not stored.any():
        findings.wrong.setdefault("k-space is nothing but zeros", []).append(what)
        return None
    if worst > PARSEVAL:
        findings.wrong.setdefault("energy of k-space and image differ", []).append(f"{what}: by {worst:.2g}")
    return worst


def _around_middle(stored: np.ndarray, sampled: np.ndarray | None, what: str, findings: Findings) -> int:
    """Doubts whether stored values are k-space around its middle; frames without a line near that."""
    kspace = stored.astype(np.float32, copy=False).view(np.complex64)[..., 0]
    if found := centre.problem(kspace, sampled):
        findings.doubtful.setdefault("k-space that is none, or is elsewhere", []).append(f"{what}: {found}")
    return 0 if sampled is None else centre.without_centre(sampled)


def _drawn(table: pa.Table, row: int) -> str:
    """Hash of all contours of a subject; empty where nothing is drawn."""
    digest, anything = hashlib.blake2b(digest_size=16), False
    for view in VIEWS:
        content = table.column(f"segmentation_{view}")[row].as_py()
        if content is not None:
            classes = np.frombuffer(content, np.uint8)
            anything = anything or bool(((classes > 0) & (classes != UNLABELLED)).any())
            digest.update(content)
    return digest.hexdigest() if anything else ""


def _picture(table: pa.Table, row: int) -> np.ndarray:
    """Magnitudes of a subject's first view in `CELLS` x `CELLS` means, of mean 0 and length 1; NaN: nothing to tell.

    Of the first frame of the slice in the middle. A phase, a scale or the precision of storage change it little.
    """
    unknown = np.full(CELLS * CELLS, np.nan, np.float32)
    for view in VIEWS:
        try:
            raw = record.raw_kspace(table, row, view)
        except ValueError:
            return unknown
        if raw is None:
            continue
        values = raw[0][raw[0].shape[0] // 2, :, 0].astype(np.float32).view(np.complex64)[..., 0]
        magnitude = np.sqrt(np.square(np.abs(ifft2c(values))).sum(0))
        if min(magnitude.shape) < CELLS or not np.isfinite(magnitude).all():
            return unknown
        for axis in (0, 1):
            starts = np.arange(CELLS) * magnitude.shape[axis] // CELLS
            magnitude = np.add.reduceat(magnitude, starts, axis)
        centred = magnitude.ravel() - magnitude.mean()
        length = float(np.linalg.norm(centred))
        return (centred / length).astype(np.float32) if length > 0 else unknown
    return unknown


def _place(table: pa.Table, row: int) -> tuple[float, float]:
    """Middle of the LV's masks in the short axis, as a share of the image along y and x; NaN: there are none."""
    content = table.column("segmentation_sax")[row].as_py()
    shape = table.column("shape_sax")[row].as_py()
    if content is None or shape is None or len(content) != math.prod(shape) // shape[1]:
        return math.nan, math.nan
    classes = np.frombuffer(content, np.uint8).reshape(-1, *shape[-2:])
    y, x = np.nonzero((classes == SEGMENTATION_CLASSES.index("lv_cavity")).any(0))
    return (float(y.mean()) / shape[-2], float(x.mean()) / shape[-1]) if len(y) else (math.nan, math.nan)


def _sum_of_squares(values: np.ndarray) -> float:
    """Sum of squares of complex64 ``coil t y x``: float32 within a frame, float64 over all."""
    frames = values.reshape(-1, values.shape[-2] * values.shape[-1])
    return math.fsum(float(np.vdot(frame, frame).real) for frame in frames)


def _segmentation(table: pa.Table, row: int, view: str, shape: tuple[int, ...], what: str, findings: Findings) -> None:
    content = table.column(f"segmentation_{view}")[row].as_py()
    contoured = table.column(f"contoured_{view}")[row].as_py()
    if content is None:
        if contoured:
            findings.wrong.setdefault("contoured classes without a segmentation", []).append(what)
        return
    if len(content) != math.prod(shape):
        findings.wrong.setdefault("the segmentation is not of the image's shape", []).append(what)
        return
    present = set(np.flatnonzero(np.bincount(np.frombuffer(content, np.uint8), minlength=256)).tolist())
    unknown = present - set(range(len(SEGMENTATION_CLASSES))) - {UNLABELLED}
    if unknown:
        findings.wrong.setdefault("unknown segmentation values", []).append(f"{what}: {sorted(unknown)}")
    if contoured is not None and (odd := present - {0, UNLABELLED} - set(contoured) - unknown):
        named = ", ".join(SEGMENTATION_CLASSES[c] for c in sorted(odd))
        findings.wrong.setdefault("classes that the source is said not to draw", []).append(f"{what}: {named}")


def _volumes(table: pa.Table, row: int) -> tuple[float, float]:
    """LV end-diastolic volume (mL) and ejection fraction (%) by counting cavity pixels of the short axis.

    Of the frames that hold a cavity: most sources contour end-diastole and end-systole only. The gaps between slices
    count as if the slices were that thick; fewer than three slices say nothing, and few frames at a known distance in
    time, all of them contoured, nothing about the fraction: end-systole may lie between them.
    """
    unknown = (math.nan, math.nan)
    content = table.column("segmentation_sax")[row].as_py()
    spacing = table.column("spacing_mm_sax")[row].as_py()
    shape = table.column("shape_sax")[row].as_py()
    if content is None or shape is None or shape[0] < 3 or len(content) != math.prod(shape) // shape[1]:
        return unknown
    cavity = np.frombuffer(content, np.uint8).reshape(shape[0], shape[2], -1) == SEGMENTATION_CLASSES.index("lv_cavity")
    pixels = cavity.sum((0, 2))
    even = table.column("frame_time_s_sax")[row].as_py() is not None and bool(pixels.all())
    pixels = pixels[pixels > 0]
    if pixels.size < 2:
        return unknown
    volume = pixels.max() * math.prod(spacing) / 1000 if spacing else math.nan
    return volume, math.nan if even and pixels.size < FEW_FRAMES else 100 * (1 - pixels.min() / pixels.max())


# -------------------------------------------------------------------------------------------------- all subjects


def _ranges(ids: Sequence[str], values: np.ndarray, findings: Findings) -> None:
    for column, name in enumerate(LABELS):
        low, high = PLAUSIBLE[name]
        some = values[:, column]
        whole = UNITS[name] != "0 or 1"
        bad = ((some < low) | (some > high)) if whole else ~(np.isnan(some) | (some == 0) | (some == 1))
        for index in np.flatnonzero(bad).tolist():
            unit = f"{low:g} to {high:g} {UNITS[name]}" if whole else UNITS[name]
            findings.wrong.setdefault(f"{name}, expected {unit}", []).append(f"{ids[index]} has {some[index]:.3g}")


def _identities(ids: Sequence[str], values: np.ndarray, findings: Findings) -> None:
    """Stroke volume and ejection fraction are what they are defined as; no chamber is larger when it is empty."""
    of = {name: values[:, column] for column, name in enumerate(LABELS)}
    volumes = {"lv": ("edv", "esv"), "rv": ("edv", "esv"), "la": ("v_max", "v_min"), "ra": ("v_max", "v_min")}
    for chamber, (full, empty) in volumes.items():
        most, least = of[f"{chamber}{full}_ml"], of[f"{chamber}{empty}_ml"]
        stroke, fraction = of[f"{chamber}sv_ml"], of[f"{chamber}ef_pct"]
        differs, other = abs(most - least - stroke) > 1 + 0.03 * most, abs(100 * (1 - least / most) - fraction) > 3
        checks = (
            ("wrong", f"{chamber}{empty}_ml above {chamber}{full}_ml", least >= most),
            ("doubtful", f"{chamber}sv_ml is not the difference of the volumes", differs),
            ("doubtful", f"{chamber}ef_pct is not the volumes' ejection fraction", other),
        )
        for kind, said, bad in checks:
            for index in np.flatnonzero(bad).tolist():
                getattr(findings, kind).setdefault(said, []).append(ids[index])


def _against_masks(ids: Sequence[str], values: np.ndarray, masks: np.ndarray, findings: Findings) -> None:
    volume, fraction = values[:, LABELS.index("lvedv_ml")], values[:, LABELS.index("lvef_pct")]
    for index in np.flatnonzero(abs(masks[:, 1] - fraction) > EF_POINTS).tolist():
        findings.doubtful.setdefault("lvef_pct is not the masks'", []).append(
            f"{ids[index]} has {fraction[index]:.0f}, its masks {masks[index, 1]:.0f}"
        )
    for index in np.flatnonzero(abs(np.log(masks[:, 0] / volume)) > math.log(VOLUME_RATIO)).tolist():
        findings.doubtful.setdefault("lvedv_ml is not the masks'", []).append(
            f"{ids[index]} has {volume[index]:.0f}, its masks {masks[index, 0]:.0f}"
        )


def _places(ids: Sequence[str], places: np.ndarray, findings: Findings) -> None:
    """Masks far from where the cohort has them: of another image, or stored another way round."""
    known = ~np.isnan(places).any(1)
    if known.sum() < ENOUGH:
        return
    off = np.linalg.norm(places - np.median(places[known], axis=0), axis=1)
    for index in np.flatnonzero(known & (off > LIKE_OTHERS)).tolist():
        findings.doubtful.setdefault("masks are not where the cohort's are", []).append(
            f"{ids[index]}: {off[index]:.0%} of the field of view away"
        )


def _alike(pictures: np.ndarray, ids: Sequence[str], findings: Findings, rows: int = 1024) -> None:
    """Pairs of subjects with the same images, whatever their phase; a block of rows at a time."""
    known = np.flatnonzero(~np.isnan(pictures).any(1))
    table = pictures[known]
    for start in range(0, len(table), rows):
        first, second = np.nonzero(table[start : start + rows] @ table[start:].T > THE_SAME)
        for i, j in zip(first.tolist(), second.tolist(), strict=True):
            if i < j:
                pair = ", ".join(sorted(ids[known[start + n]] for n in (i, j)))
                findings.doubtful.setdefault("two subjects have the same images", []).append(pair)


def ef_error(contents: Iterable[Contents]) -> float | None:
    """Median distance of the masks' ejection fraction from the label, points; None: nobody has both."""
    column = LABELS.index("lvef_pct")
    found = np.concatenate([abs(c.masks[:, 1] - c.labels[:, column]) for c in contents] or [np.zeros(0)])
    found = found[~np.isnan(found)]
    return float(np.median(found)) if found.size else None


def _twice(
    kind: str,
    keys: Sequence[str],
    ids: Sequence[str],
    where: Sequence[tuple[int, str]],
    into: dict[str, list[str]],
) -> None:
    """Keys that come more than once, and where, among the findings of one kind; empty keys do not count."""
    often = {key for key, count in Counter(keys).items() if key and count > 1}
    places: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        if key in often:
            places.setdefault(key, []).append(index)
    for indices in places.values():
        said = ", ".join(sorted({f"{ids[i]} in {where[i][1]} of dataset {where[i][0] + 1}" for i in indices}))
        into.setdefault(kind, []).append(said)
