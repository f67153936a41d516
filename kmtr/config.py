"""Frozen, validated configuration and its one way in: ``RECIPE key=value ...`` with dotted keys.

A ``RunConfig`` is what a person, a job and a Tune trial all change in the same way (`override`), what is printed, saved
beside the weights (`to_json`, `from_json`) and logged to MLflow (`flatten`). Whatever can't work dies here, before a
worker starts, on one line that says what to change.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from kmtr.types import PHENOTYPES, VIEWS, InputError


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _known(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value or set(value) - set(PHENOTYPES):
        raise ValueError(f"expected phenotypes of {', '.join(PHENOTYPES)}, got {', '.join(value) or 'none'}")
    return value


Phenotypes = Annotated[tuple[str, ...], pydantic.AfterValidator(_known)]
"""One or more of `types.PHENOTYPES`."""


class Data(Section):
    root: str = Field("runs/data", description="dataset folder (manifest.json and Parquet shards): local path or URI")
    more: tuple[str, ...] = Field((), description="further datasets that train and validate together with data.root")
    weights: tuple[float, ...] = Field(
        (), description="share of each dataset in every batch, data.root first; empty: in proportion to subjects"
    )
    views: tuple[Literal["sax", "lax_2ch", "lax_3ch", "lax_4ch"], ...] = Field(
        ("sax", "lax_2ch", "lax_3ch", "lax_4ch"), description="view groups read"
    )
    sax_slices: int = Field(6, gt=0, description="short-axis slices per subject, evenly chosen; fewer are padded")
    frames: int = Field(25, gt=0, description="cardiac frames per subject, evenly chosen; fewer are padded")
    matrix: tuple[int, int] = Field(
        (128, 128), description="largest (ny, nx); smaller sources sit in the middle of k-space, larger ones need crop"
    )
    coils: int = Field(1, gt=0, description="most coils per slice; fewer are padded")
    crop: bool = Field(False, description="allow cropping or padding sources of another matrix (image domain)")
    global_batch: int = Field(64, gt=0, description="subjects per optimizer step, over all workers")
    loader: Literal["ray", "threads"] = Field("ray", description="what executes the plan: identical batches")
    prefetch: int = Field(2, ge=1, description="batches read ahead per worker")
    readers: int = Field(1, gt=0, description="Ray Data actors that read for each worker")
    read_cpus: float = Field(0.5, gt=0, description="CPUs that Ray reserves per reader")
    verify_pages: Literal["always", "once", "never"] = Field(
        "always", description="page checksums: of every read, of a page's first read in a process, or none"
    )
    cache: str = Field("", description="local folder that keeps shards of an object store; empty: none")
    cache_gib: float = Field(64.0, gt=0, description="size of data.cache at most; the oldest read goes first")

    @property
    def roots(self) -> tuple[str, ...]:
        """All datasets, `root` first."""
        return (self.root, *self.more)

    @property
    def slices(self) -> int:
        """Slices per subject over all views: `sax_slices` and one per long-axis view."""
        return len(self.view_types)

    @property
    def view_types(self) -> tuple[int, ...]:
        """Index into VIEWS of every slice slot, in order."""
        return tuple(VIEWS.index(v) for v in self.views for _ in range(self.slots(v)))

    def slots(self, view: str) -> int:
        """Slice slots of one view."""
        return self.sax_slices if view == "sax" else 1

    @pydantic.model_validator(mode="after")
    def _check(self) -> Data:
        if not self.views or len(set(self.views)) < len(self.views):
            raise ValueError(f"data.views: expected one or more different views, got {','.join(self.views) or 'none'}")
        if min(self.matrix) < 8 or any(n % 2 for n in self.matrix):
            raise ValueError(f"data.matrix: expected even sizes of at least 8, got {self.matrix}")
        if self.weights and (len(self.weights) != len(self.roots) or min(self.weights) <= 0):
            raise ValueError(
                f"data.weights: expected one positive number for each of the {len(self.roots)} datasets, "
                f"got {self.weights}"
            )
        return self


class Plan(Section):
    tail: Literal["drop", "pad"] = Field(
        "drop", description="end of an epoch: drop what fills no batch, or fill up with repeats that no loss counts"
    )
    window: int = Field(4, gt=0, description="row groups that small rows are shuffled among; reads stay sequential")
    shapes: int = Field(8, gt=0, description="different batch shapes at most; subjects are padded up to the next")
    subjects: int = Field(0, ge=0, description="bench.py data: only plan, for a dataset of this many subjects")
    world_size: int = Field(1024, gt=0, description="bench.py data: workers of that plan")


class Augment(Section):
    """k-space-consistent; each drawn per subject and pass."""

    shift: float = Field(0.0, ge=0, le=0.5, description="translation at most, share of the field of view")
    rotation_deg: float = Field(0.0, ge=0, le=180, description="in-plane rotation at most; not of undersampled sources")
    flip: bool = Field(False, description="mirror along y, along x, each in half of the draws: mirrors anatomy")
    phase: bool = Field(False, description="a random constant phase per slice")
    coil_dropout: float = Field(0.0, ge=0, lt=1, description="share of coils silenced; one always stays")
    noise: float = Field(0.0, ge=0, description="SD of complex noise at most, share of the RMS of the acquired lines")


class Sampling(Section):
    family: Literal["gaussian", "gaussian-wide", "equispaced", "kt-gaussian-acs", "file"] = Field(
        "gaussian", description="k-t pattern family (README: Sampling); file: the patterns of sampling.file"
    )
    file: str = Field("", description="pattern (.txt, .npy, .mat) of family file, on all nodes; its R is measured")
    accelerations: tuple[int, ...] = Field((4, 8, 16), description="nominal R drawn per subject during training")
    acs_lines: int = Field(4, ge=0, description="central lines of every frame, in the budget (kt-gaussian-acs: on top)")

    @pydantic.field_validator("accelerations")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 1:
            raise ValueError(f"expected one or more integers from 1, got {value or 'none'}")
        return value

    def budget(self, lines: int, acceleration: int) -> tuple[int, int]:
        """Lines that the family draws of so many at this R, and the least that make sense: more than the ACS lines
        where those are counted among them. A file's lines are what they are.
        """
        if self.family == "kt-gaussian-acs":
            return (2 * lines + acceleration) // (2 * acceleration), 1
        left = lines // acceleration
        return left, 1 if self.family == "gaussian-wide" else 0 if self.family == "file" else self.acs_lines + 1


class Model(Section):
    width: int = Field(512, gt=0, description="channels of a token")
    depth: int = Field(12, gt=0, description="transformer blocks of an encoder")
    head_width: int = Field(64, gt=0, description="channels of an attention head")
    mlp_ratio: int = Field(4, gt=0, description="hidden width of the MLP over width")
    decoder_width: int = Field(256, gt=0, description="channels of a token in the decoders of masked reconstruction")
    decoder_depth: int = Field(2, gt=0, description="blocks of the decoders of masked reconstruction")
    patch: tuple[int, int, int] = Field((5, 8, 8), description="image patch (t, y, x)")
    encoder_inputs: Literal["kspace", "zerofilled", "both"] = Field(
        "kspace", description="what the k-space encoder reads: visible lines, patches of their zero-filled image, both"
    )
    readout: Literal["kspace", "hybrid"] = Field(
        "kspace", description="a line along kx, or along x after the inverse FFT of what readout_fraction leaves"
    )
    readout_fraction: float = Field(1.0, gt=0, le=1, description="central share of kx that enters a line token")
    line_parts: Literal["static+dynamic", "whole"] = Field(
        "static+dynamic", description="a line as temporal mean and deviation from it, or as it is"
    )
    coils: int = Field(0, ge=0, description="virtual coils of a line, told by the visible lines; 0: coils as stored")
    gauge: Literal["phase+gain", "gain", "none"] = Field(
        "phase+gain", description="taken off before all else: phase of each slice and coil, gain of each subject"
    )
    normalisation: Literal["population", "line", "none"] = Field(
        "population",
        description="population: its mean taken off, over its SD^power; line: over each line's own RMS, whose log is "
        "kept; none: one factor for all",
    )
    normalisation_power: float = Field(0.5, ge=0, le=1, description="power of the population's SD, for population")
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="stochastic depth per subject in training: rate of the last encoder block, 0 first"
    )
    checkpointing: bool = Field(False, description="encoder blocks are run again in the backward pass: less memory")
    projection: int = Field(128, gt=0, description="width of the alignment space")

    def readout_samples(self, nx: int) -> int:
        """Samples of a line of nx that enter its token: an even number of central ones."""
        return max(2, 2 * round(nx * self.readout_fraction / 2))

    @pydantic.model_validator(mode="after")
    def _check(self) -> Model:
        for name in ("width", "decoder_width"):
            if getattr(self, name) % self.head_width:
                raise ValueError(f"model.{name}: expected a multiple of model.head_width={self.head_width}")
        if self.head_width % 8 or self.head_width > 256:
            raise ValueError(
                f"model.head_width: expected a multiple of 8 up to 256, as fused attention takes, got {self.head_width}"
            )
        return self


class Reconstruct(Section):
    steps: int = Field(20_000, ge=0, description="optimizer steps of masked reconstruction (stage b)")
    mask_ratio: float = Field(0.7, gt=0, lt=1, description="share of acquired lines hidden from the encoder")
    target: Literal["acquired", "all"] = Field(
        "acquired", description="lines predicted: acquired and hidden, or all that are not shown (what the source has)"
    )
    target_lines: float = Field(
        0.0, ge=0, lt=1, description="share of those lines that is drawn for the loss, anew each pass; 0: all of them"
    )
    image_mask_ratio: float = Field(0.7, gt=0, lt=1, description="share of image patches hidden from the encoder")
    kspace_loss: Literal["mse", "l1", "hdr"] = Field("mse", description="loss on hidden normalised lines")
    image_weight: float = Field(1.0, ge=0, description="weight of the image domain's loss against k-space's")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of the stage")
    warmup_steps: int = Field(40, ge=0, description="steps of linear warm-up, then optimizer.schedule")


class Align(Section):
    steps: int = Field(5_000, ge=0, description="optimizer steps of alignment (stage c)")
    temperature: float = Field(0.1, gt=0, description="contrastive temperature of InfoNCE")
    learn_temperature: bool = Field(False, description="the temperature is where learning starts, 0.01 its least")
    chunk: int = Field(0, ge=0, description="anchors whose similarities are held at once; 0: all of a worker's")
    static_weight: float = Field(0.05, ge=0, description="weight of InfoNCE on what does not move")
    dynamic_weight: float = Field(0.2, ge=0, description="weight of InfoNCE on what moves")
    reconstruct_weight: float = Field(1.0, ge=0, description="weight of stage b's loss, kept so motion isn't forgotten")
    guard: bool = Field(
        True, description="stop where the probe falls below stage b's end (stage=both), and export stage b's encoder"
    )
    tolerance: float = Field(0.03, ge=0, description="R2 that a probe may lose before the guard stops")
    teacher: Literal["encoder", "components"] = Field(
        "encoder", description="image side: the image encoder, or principal components of the clean 16 x 16 image"
    )
    train_image_encoder: bool = Field(False, description="False: the image encoder is a frozen teacher")
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate of the stage")
    warmup_steps: int = Field(40, ge=0, description="steps of linear warm-up, then optimizer.schedule")
    head_steps: int = Field(0, ge=0, description="first steps in which the projections learn alone, without warm-up")
    head_factor: float = Field(1.0, gt=0, description="learning rate of the projections over that of the stage")


class Optimizer(Section):
    weight_decay: float = Field(0.05, ge=0, description="AdamW decay of matrices (not of biases, norms, tables)")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW moment decays")
    schedule: Literal["cosine", "plateau"] = Field(
        "cosine", description="after the warm-up: cosine to zero, or a plateau with a cooldown, the same however long"
    )
    cooldown: float = Field(0.2, gt=0, le=1, description="last share of the steps, linear to zero, of a plateau")
    layer_decay: float = Field(1.0, gt=0, le=1, description="learning rate of a block over that of the one above it")
    clip_norm: float = Field(1.0, gt=0, description="gradient norm limit")
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay per step of the averaged weights validated and exported, as .999; 0: off"
    )


class Train(Section):
    workers: int = Field(1, gt=0, description="training processes; on GPU nodes one per GPU")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where the cluster has GPUs")
    cpus_per_worker: float = Field(0.5, gt=0, description="CPUs that Ray reserves per worker")
    threads: int = Field(0, ge=0, description="threads of a worker on a CPU; 0: its share of the node's cores")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="what DeepSpeed shards: 1 optimizer, 2 gradients, 3 weights")
    offload: bool = Field(
        False, description="optimizer in the host's memory (zero_stage 1 to 3): slower, less GPU memory"
    )
    bf16: bool = Field(False, description="bfloat16 engine; FFT, softmax of InfoNCE and sums stay fp32")
    compile: bool = Field(False, description="torch.compile of the transformer blocks, once for all numbers of tokens")
    accumulation: int = Field(1, gt=0, description="micro-batches per step and worker; the objective stays the same")
    log_every: int = Field(10, gt=0, description="steps between lines and logged metrics")
    checkpoint_every: int = Field(200, gt=0, description="steps between checkpoints")
    eval_every: int = Field(200, gt=0, description="steps between validation loss and probe; multiple of log_every")
    eval_subjects: int = Field(256, gt=0, description="subjects of each of the two splits used by that probe")
    max_failures: int = Field(3, ge=0, description="lost workers or nodes survived; other errors are never retried")

    @pydantic.field_validator("zero_stage", mode="before")
    @classmethod
    def _as_typed(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.isdecimal() else value

    @pydantic.model_validator(mode="after")
    def _check(self) -> Train:
        if self.offload and not self.zero_stage:
            raise ValueError("train.offload: expected train.zero_stage of 1, 2 or 3, got 0, which shards no optimizer")
        return self


class Run(Section):
    name: str = Field("", description="run name; empty: recipe and hash of the configuration")
    fresh: bool = Field(False, description="start anew even though this run exists")


class Storage(Section):
    root: str = Field("runs", description="checkpoints, encoders, reports: local path or URI that all nodes reach")


class Tracking(Section):
    uri: str = Field("", description="MLflow store; empty: MLFLOW_TRACKING_URI, else SQLite in storage.root")
    experiment: str = Field("kmtr", description="MLflow experiment")


class Shards(Section):
    dtype: Literal["float16", "float32"] = Field(
        "float16", description="stored k-space; float16 with a scale per subject"
    )
    compression: Literal["none", "lz4"] = Field(
        "none", description="of k-space; none is read straight into the batch, lz4 saves where much is zero"
    )
    rows: int = Field(64, gt=0, description="subjects per shard file")
    split: Literal["auto", "hash", "stratified", "train"] = Field(
        "auto", description="hash: 70/10/20 % train/val/test by subject; train: no split; auto: train below 20 subjects"
    )
    split_from: str = Field("", description="dataset whose subjects keep the split that they have there")


class Ingest(Section):
    matrix: tuple[int, int] | None = Field(
        None, description="crop or pad to this (ny, nx) while reading; empty: as it is"
    )
    axes: str = Field(
        "",
        description="axis order of a .mat k-space ('t slice coil ky kx') or NIfTI ('x y slice t'), against the rules",
    )
    classes: str = Field(
        "", description="values of NIfTI contours, against name and shape: '1:lv_cavity,2:lv_myocardium,3:rv'"
    )
    oversampling: Literal["keep", "remove"] = Field(
        "remove", description="readout oversampling of raw data (ismrmrd), where the header tells it"
    )
    coils: int = Field(0, ge=0, description="virtual coils that raw data is compressed to at reading; 0: as acquired")
    labels: str = Field("", description="table (.csv, .parquet) of phenotypes and diseases, joined by subject")
    columns: str = Field("", description="its columns where names differ: 'subject=eid lvedv_ml=f24100_2_0 ...'")
    gib: float = Field(4.0, gt=0, description="largest array that a source may hold, GiB: larger claims are refused")


class Simulate(Section):
    subjects: int = Field(2000, gt=0, description="simulated subjects, over all splits")
    difficulty: Literal["easy", "medium", "hard"] = Field(
        "medium", description="how much nuisance and detail stand between the k-space and the labels (README: Cohort)"
    )
    coils: int = Field(1, gt=0, le=32, description="receiver coils; 1: a uniform one")
    oversampling: float = Field(1.0, ge=1, le=4, description="readout field of view over the image's; 1: none")
    snr_db: float = Field(30.0, description="power of the signal over that of the complex noise in k-space, dB")
    seed: int = Field(0, ge=0, description="a subject is a pure function of (seed, index)")


class Evaluate(Section):
    encoder: str = Field(
        "", description="exported encoder; empty: the one of the run with this configuration; none: controls only"
    )
    targets: Phenotypes = Field(
        ("lvedv_ml", "lvef_pct", "lvm_g"), description="phenotypes that are probed, where the dataset has them"
    )
    accelerations: tuple[int, ...] = Field((4, 8, 16), description="nominal R at which the probe is scored")
    labels: int = Field(1000, gt=0, description="labelled training subjects that the ridge probe is fitted on")
    subjects: int = Field(1000, gt=0, description="held-out subjects at most")
    bootstrap: int = Field(2000, gt=0, description="resamples of the held-out subjects for intervals")


class Verify(Section):
    workers: tuple[int, ...] = Field((), description="numbers of workers proved; empty: all up to 64 that can be")
    epochs: int = Field(2, gt=0, description="epochs of the plan that are proved")

    @pydantic.field_validator("workers")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value and min(value) < 1:
            raise ValueError(f"expected integers from 1, got {value}")
        return value


class Search(Section):
    trials: int = Field(8, gt=0, description="configurations tried")
    concurrent: int = Field(1, gt=0, description="trials at the same time")
    grace_steps: int = Field(100, gt=0, description="steps before ASHA may stop a trial")
    temperature: tuple[float, float] = Field((0.03, 0.3), description="log-uniform range of align.temperature")
    mask_ratio: tuple[float, float] = Field((0.3, 0.9), description="uniform range of reconstruct.mask_ratio")
    accelerations: tuple[int, ...] = Field((4, 8, 12), description="choices for sampling.accelerations")


class Bench(Section):
    gib: float = Field(4.0, gt=0, description="bench.py data: bytes of the dataset, GiB; every loader reads as many")
    folder: str = Field("runs/bench-data", description="local folder of that dataset in each loader's format; reused")
    seconds: float = Field(8.0, gt=0, description="time of one measurement, from its first batch on")
    epochs: int = Field(3, ge=2, description="epochs of a smaller dataset, for the waits at their borders")
    repeats: int = Field(3, gt=0, description="measurements of each loader, in turns; the median counts")
    peers: tuple[Literal["streaming", "webdataset", "datasets", "npz", "npz0"], ...] = Field(
        ("streaming", "webdataset", "datasets", "npz", "npz0"),
        description="loaders of others beside ours; npz: torch DataLoader with 2 workers, npz0: without; empty: none",
    )
    pairs: int = Field(20, ge=2, description="bench.py step: steps of ours and of what it is compared with, in turns")
    lines: int = Field(
        0, ge=0, description="bench.py step: lines of a subject at most; 0: 2,000 on a CPU, as the recipe on a GPU"
    )


class Study(Section):
    """jobs/study.py: what pretraining is worth, and which of its choices matter."""

    seeds: tuple[int, ...] = Field((0, 1, 2), description="study.py: seeds; each pretrains and draws its labels anew")
    labels: tuple[int, ...] = Field((100, 200, 1000), description="study.py labels: numbers of labelled subjects")
    targets: Phenotypes = Field(
        ("lvedv_ml", "lvesv_ml", "lvef_pct", "lvm_g", "rvedv_ml"), description="phenotypes that its R2 is the mean of"
    )
    longer_steps: int = Field(
        0, ge=0, description="study.py labels: more of stage b, as a control of stage c; 0: as many as take its time"
    )
    controls: int = Field(1, gt=0, description="study.py labels: so many of the seeds also train that control")
    batch: int = Field(32, gt=0, description="labelled subjects per step of fine-tuning and of training from scratch")
    warmup_steps: int = Field(10, ge=0, description="their steps of linear warm-up, then a cosine to zero")
    steps: int = Field(300, gt=0, description="optimizer steps of fine-tuning, one model for all R")
    learning_rate: float = Field(5e-4, gt=0, description="peak learning rate of fine-tuning")
    scratch_steps: int = Field(300, gt=0, description="optimizer steps of supervised training from scratch")
    scratch_learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of training from scratch")
    shift: float = Field(0.05, ge=0, le=0.5, description="augment.shift of both")
    rotation_deg: float = Field(
        10.0, ge=0, le=180, description="augment.rotation_deg of both; 0 for sources that are undersampled already"
    )
    copies: int = Field(
        8, gt=0, description="study.py labels: of each labelled subject at most, for ridges and probes on moved copies"
    )
    ablation_steps: int = Field(300, gt=0, description="study.py ablation: steps of stage b of every variant")
    ablation_align_steps: int = Field(100, gt=0, description="study.py ablation: steps of stage c where a group asks")
    ablation_labels: tuple[int, ...] = Field((200, 1000), description="study.py ablation: labelled subjects of a probe")
    groups: tuple[str, ...] = Field((), description="study.py ablation: questions that are asked; empty: all")
    concurrent: int = Field(2, gt=0, description="study.py ablation: runs at the same time, one worker each")

    @pydantic.model_validator(mode="after")
    def _different(self) -> Study:
        for key, least in (("seeds", 0), ("labels", 3), ("ablation_labels", 3)):
            value = getattr(self, key)
            if not value or min(value) < least or len(set(value)) < len(value):
                raise ValueError(
                    f"study.{key}: expected one or more different integers from {least}, got {value or 'none'}"
                )
        return self


class RunConfig(Section):
    """Everything that a command does follows from one of these."""

    recipe: str = Field("", description="the recipe it came from")
    stage: Literal["both", "reconstruct", "align"] = Field(
        "both", description="pretraining stages, one after the other"
    )
    seed: int = Field(0, ge=0, description="of weights, order, patterns and hiding")
    data: Data = Data()
    plan: Plan = Plan()
    augment: Augment = Augment()
    sampling: Sampling = Sampling()
    model: Model = Model()
    reconstruct: Reconstruct = Reconstruct()
    align: Align = Align()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    run: Run = Run()
    storage: Storage = Storage()
    tracking: Tracking = Tracking()
    shards: Shards = Shards()
    simulate: Simulate = Simulate()
    ingest: Ingest = Ingest()
    evaluate: Evaluate = Evaluate()
    search: Search = Search()
    bench: Bench = Bench()
    verify: Verify = Verify()
    study: Study = Study()

    @pydantic.model_validator(mode="after")
    def _check(self) -> RunConfig:
        d, t = self.data, self.train
        share = t.workers * t.accumulation
        if d.global_batch % share:
            raise ValueError(
                f"data.global_batch: expected a multiple of train.workers * train.accumulation = {t.workers} * "
                f"{t.accumulation}, got {d.global_batch}"
            )
        lines = d.matrix[0]
        for key, accelerations in (
            ("sampling", self.sampling.accelerations),
            ("evaluate", self.evaluate.accelerations),
        ):
            for r in accelerations:
                left, least = self.sampling.budget(lines, r)
                if r > 1 and left < least:
                    raise ValueError(
                        f"{key}.accelerations: R = {r} leaves {left} of {lines} lines, expected at least {least} for "
                        f"sampling.family={self.sampling.family}, sampling.acs_lines={self.sampling.acs_lines}"
                    )
        if d.frames % self.model.patch[0] or any(n % p for n, p in zip(d.matrix, self.model.patch[1:], strict=True)):
            raise ValueError(
                f"model.patch: expected a divisor of (data.frames, *data.matrix) = {(d.frames, *d.matrix)}, "
                f"got {self.model.patch}"
            )
        if self.model.coils > d.coils:
            raise ValueError(f"model.coils: expected at most data.coils={d.coils}, got {self.model.coils}")
        if t.eval_every % t.log_every:
            raise ValueError(
                f"train.eval_every: expected a multiple of train.log_every={t.log_every}, got {t.eval_every}"
            )
        if self.total_steps == 0:
            raise ValueError("reconstruct.steps, align.steps: expected at least one step in the chosen stage, got 0")
        if self.align.learn_temperature and self.align.temperature <= MIN_TEMPERATURE:
            raise ValueError(
                f"align.temperature: expected more than {MIN_TEMPERATURE}, the least that is learnt, got "
                f"{self.align.temperature}"
            )
        if self.align.teacher == "components" and self.align.train_image_encoder:
            raise ValueError(
                "align.train_image_encoder: expected false with align.teacher=components, which are fixed, got true"
            )
        if self.align_steps and d.global_batch < MIN_ALIGNED_SUBJECTS:
            raise ValueError(
                f"data.global_batch: alignment needs at least {MIN_ALIGNED_SUBJECTS} distinct subjects as negatives, "
                f"got {d.global_batch}; use stage=reconstruct"
            )
        return self

    @property
    def reconstruct_steps(self) -> int:
        return self.reconstruct.steps if self.stage != "align" else 0

    @property
    def align_steps(self) -> int:
        return self.align.steps if self.stage != "reconstruct" else 0

    @property
    def has_image_encoder(self) -> bool:
        """Whether a stage reads images by an encoder of their own, be it one that this run leaves out."""
        return bool(self.reconstruct.image_weight) or (self.align.steps > 0 and self.align.teacher == "encoder")

    @property
    def has_components(self) -> bool:
        """Whether components of the clean image are alignment's teacher."""
        return self.align.steps > 0 and self.align.teacher == "components"

    @property
    def total_steps(self) -> int:
        return self.reconstruct_steps + self.align_steps

    def run_name(self, digest: str) -> str:
        """Recipe and hash of all that changes the numbers: the same command finds its run again.

        Args:
            digest: of the data, and of the pattern file where there is one.
        """
        if self.run.name:
            return self.run.name
        sections = {"stage", "seed", "augment", "sampling", "model", "reconstruct", "align", "optimizer"}
        what = self.model_dump(mode="json", include=sections)
        del what["sampling"]["file"]  # its content counts, which the caller adds to the digest
        what["data"] = self.data.model_dump(
            mode="json", exclude={"root", "more", "loader", "prefetch", "readers", "read_cpus", *_CARE}
        )
        what["plan"] = self.plan.model_dump(mode="json", include={"tail", "window", "shapes"})
        what["precision"] = "bf16" if self.train.bf16 else "fp32"
        what["dataset"] = digest
        return f"{self.recipe}-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]}"


MIN_TEMPERATURE = 0.01
"""Of a learnt contrastive temperature: below it the softmax is all or nothing."""

MIN_ALIGNED_SUBJECTS = 8
"""InfoNCE against fewer negatives than this says next to nothing; refused."""


_CARE = ("verify_pages", "cache", "cache_gib")
"""Keys of `Data` that say how carefully bytes are read, not which."""


def keys(model: type[BaseModel] | BaseModel = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and pydantic field of every setting, in order."""
    cls = model if isinstance(model, type) else type(model)
    for name, info in cls.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from keys(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value of every setting."""
    values: dict[str, Any] = {}
    for key, _ in keys():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        values[key] = value
    return values


def override(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The configuration with dotted keys changed; values may be strings as typed on a command line.

    Raises:
        InputError: an unknown key (names the nearest), a wrong type or an impossible combination.
    """
    known = dict(keys())
    tree = config.model_dump()
    for key, value in changes.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown key {key!r}; the nearest one is {near!r} (all keys: --help)")
        node = tree
        *parents, leaf = key.split(".")
        for part in parents:
            node = node[part]
        if isinstance(value, str) and _is_tuple(known[key].annotation):
            value = None if not value and type(None) in get_args(known[key].annotation) else _parse(value)
        node[leaf] = value
    try:
        return RunConfig.model_validate(tree)
    except pydantic.ValidationError as error:
        raise InputError(_one_line(error, changes)) from None


def parse(words: Sequence[str], recipe: str, recipes: dict[str, Any]) -> RunConfig:
    """The configuration of ``RECIPE key=value ...``; `recipes` maps a name to a function returning a RunConfig."""
    if recipe not in recipes:
        raise InputError(f"recipe: expected one of {', '.join(recipes)}, got {recipe!r}")
    changes: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"expected key=value, got {word!r}")
        if key in changes:
            raise InputError(f"{key}: given twice")
        changes[key] = value
    return override(recipes[recipe](), changes)


def to_json(config: RunConfig) -> str:
    return config.model_dump_json(indent=2)


def from_json(text: str) -> RunConfig:
    try:
        return RunConfig.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise InputError(_one_line(error, {})) from None


def _is_tuple(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(get_origin(part) is tuple for part in get_args(annotation))


def _parse(text: str) -> list[str]:
    """``4,8`` or ``(4, 8)`` or ``[4, 8]`` -> its items as strings; pydantic converts them."""
    return [item.strip().strip("'\"") for item in text.strip().strip("()[]").split(",") if item.strip()]


def _one_line(error: pydantic.ValidationError, changes: dict[str, Any]) -> str:
    first = error.errors()[0]
    parts = [str(p) for p in first["loc"]]
    known = dict(keys())
    key = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known), "")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and not key:
        return message
    message = message[0].lower() + message[1:]
    got = changes.get(key, first.get("input"))
    key = key or ".".join(parts) or "configuration"
    return f"{key}: {message}" + ("" if "got" in message else f", got {got!r}")
