"""Settings of a run: what changes its numbers, and how it is executed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from kmtr.config.core import Section
from kmtr.types import DISEASES, PHENOTYPES, STUDIED, VIEWS

MIN_TEMPERATURE = 0.01
"""Least learnt contrastive temperature: below it the softmax is all or nothing."""


def _among(known: Iterable[str], what: str) -> pydantic.AfterValidator:
    """One or more of the known names."""
    names = tuple(known)

    def check(value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or set(value) - set(names):
            raise ValueError(f"expected {what} of {', '.join(names)}, got {', '.join(value) or 'none'}")
        return value

    return pydantic.AfterValidator(check)


Phenotypes = Annotated[tuple[str, ...], _among(PHENOTYPES, "phenotypes")]
"""One or more of `types.PHENOTYPES`."""

Diseases = Annotated[tuple[str, ...], _among(DISEASES, "diseases")]
"""One or more of `types.DISEASES`."""

MIN_ALIGNED_SUBJECTS = 8
"""InfoNCE against fewer negatives than this says next to nothing; refused."""


class Data(Section):
    root: str = Field("runs/data", description="dataset folder (manifest.json and Parquet shards): local path or URI")
    more: tuple[str, ...] = Field((), description="further datasets that train and validate together with data.root")
    weights: tuple[float, ...] = Field(
        (), description="share of each dataset in every batch, data.root first; empty: in proportion to subjects"
    )
    views: tuple[Literal["sax", "lax_2ch", "lax_3ch", "lax_4ch"], ...] = Field(
        ("sax", "lax_2ch", "lax_3ch", "lax_4ch"), description="view groups read"
    )
    sax_slices: int = Field(
        6, gt=0, le=1000, description="short-axis slices per subject, evenly chosen; fewer are padded"
    )
    frames: int = Field(25, gt=0, le=10_000, description="cardiac frames per subject, evenly chosen; fewer are padded")
    matrix: tuple[int, int] = Field(
        (128, 128), description="largest (ny, nx); smaller sources sit in the middle of k-space, larger ones need crop"
    )
    coils: int = Field(1, gt=0, le=1000, description="most coils per slice; fewer are padded")
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
        if min(self.matrix) < 8 or max(self.matrix) > 16_384 or any(n % 2 for n in self.matrix):
            raise ValueError(f"data.matrix: expected even sizes from 8 to 16384, got {self.matrix}")
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


class Augment(Section):
    """Augmentation consistent in k-space; each kind is drawn per subject and epoch."""

    shift: float = Field(0.0, ge=0, le=0.5, description="translation at most, share of the field of view")
    rotation_deg: float = Field(0.0, ge=0, le=180, description="in-plane rotation at most; not of undersampled sources")
    flip: bool = Field(False, description="mirror along y, along x, each in half of the draws: mirrors anatomy")
    phase: bool = Field(False, description="a random constant phase per slice")
    coil_dropout: float = Field(0.0, ge=0, lt=1, description="share of coils silenced; one always stays")
    noise: float = Field(0.0, ge=0, description="SD of complex noise at most, share of the RMS of the acquired lines")


class Sampling(Section):
    family: Literal["gaussian", "gaussian-wide", "equispaced", "kt-gaussian-acs", "file"] = Field(
        "gaussian", description="k-t pattern family (kmtr/tasks/README.md); file: the patterns of sampling.file"
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


class Model(Section):
    width: int = Field(512, gt=0, le=1_000_000, description="channels of a token")
    depth: int = Field(12, gt=0, le=1000, description="transformer blocks of an encoder")
    head_width: int = Field(64, gt=0, le=65_536, description="channels of an attention head")
    mlp_ratio: int = Field(4, gt=0, le=64, description="hidden width of the MLP over width")
    decoder_width: int = Field(
        256, gt=0, le=65_536, description="channels of a token in the decoders of masked pretraining"
    )
    decoder_depth: int = Field(2, gt=0, le=1000, description="blocks of the decoders of masked pretraining")
    patch: tuple[int, int, int] = Field((5, 8, 8), description="image patch (t, y, x)")
    encoder_inputs: Literal["kspace", "zerofilled", "both"] = Field(
        "kspace", description="input of the k-space encoder: visible lines, patches of their zero-filled image, both"
    )
    readout: Literal["kspace", "hybrid"] = Field(
        "kspace", description="a line along kx, or along x after the inverse FFT of what readout_fraction leaves"
    )
    readout_fraction: float = Field(1.0, gt=0, le=1, description="central share of kx that enters a line token")
    line_parts: Literal["static+dynamic", "whole"] = Field(
        "static+dynamic", description="a line as temporal mean and deviation from it, or as it is"
    )
    coils: int = Field(
        0, ge=0, le=1000, description="virtual coils of a line, told by the visible lines; 0: coils as stored"
    )
    remove: Literal["phase+gain", "gain", "none"] = Field(
        "phase+gain", description="removed before all else: phase of each slice and coil, gain of each subject"
    )
    normalisation: Literal["population", "line", "none"] = Field(
        "population",
        description="population: its mean taken off, over its SD^power; line: over each line's own RMS, whose log is "
        "kept; none: one factor for all",
    )
    normalisation_power: float = Field(0.5, ge=0, le=1, description="power of the population's SD, for population")
    centre: int = Field(
        0,
        ge=0,
        le=1024,
        multiple_of=2,
        description="pixels along each side of the temporally shared image of low resolution that the k-space encoder "
        "sees beside its tokens, made of the lines that it may see; 0: none",
    )
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="stochastic depth per subject in training: rate of the last encoder block, 0 first"
    )
    checkpointing: bool = Field(False, description="encoder blocks are run again in the backward pass: less memory")
    projection: int = Field(128, gt=0, le=65_536, description="width of the alignment space")

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


class Masked(Section):
    steps: int = Field(20_000, ge=0, description="optimizer steps of masked pretraining")
    mask_ratio: float = Field(0.7, gt=0, lt=1, description="share of acquired lines hidden from the encoder")
    target: Literal["acquired", "all"] = Field(
        "acquired", description="lines predicted: acquired and hidden, or all that are not shown (what the source has)"
    )
    target_lines: float = Field(
        0.0, ge=0, lt=1, description="share of those lines that is drawn for the loss, anew each epoch; 0: all of them"
    )
    image_mask_ratio: float = Field(0.7, gt=0, lt=1, description="share of image patches hidden from the encoder")
    kspace_loss: Literal["mse", "l1", "hdr"] = Field("mse", description="loss on hidden normalised lines")
    image_weight: float = Field(1.0, ge=0, description="weight of the image domain's loss against k-space's")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of the stage")
    warmup_steps: int = Field(40, ge=0, description="steps of linear warm-up, then optimizer.schedule")


class Align(Section):
    steps: int = Field(5_000, ge=0, description="optimizer steps of alignment")
    temperature: float = Field(0.1, gt=0, description="contrastive temperature of InfoNCE")
    learn_temperature: bool = Field(False, description="the temperature is where learning starts, 0.01 its least")
    chunk: int = Field(0, ge=0, description="anchors whose similarities are held at once; 0: all of a worker's")
    static_weight: float = Field(0.05, ge=0, description="weight of InfoNCE on the static part")
    dynamic_weight: float = Field(0.2, ge=0, description="weight of InfoNCE on the dynamic part")
    masked_weight: float = Field(
        1.0, ge=0, description="weight of the masked loss, kept so that motion is not forgotten"
    )
    guard: bool = Field(
        True,
        description="stop where the probe falls below the end of masked pretraining (stage=both), export that encoder",
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


class Task(Section):
    tasks: tuple[str, ...] = Field((), description="tasks that stage=task trains, one or several in one model")
    system: str = Field("kspace", description="system that they are trained on (kmtr/systems)")
    input: str = Field(
        "",
        description="image that unet and resnet50 see: full, zerofilled, shared (temporally), or lowrank (and sparse); "
        "empty: zerofilled",
    )
    unet_width: int = Field(
        32,
        gt=0,
        le=512,
        description="channels of unet, linet and xf at full resolution, twice as many at each lower one up to 512",
    )
    unet_motion: bool = Field(
        False,
        description="unet sees of each frame its slice's mean over the cycle and what moves too, as three channels",
    )
    cascades: int = Field(
        3, gt=0, le=12, description="times that xf lets a network change the image and puts the acquired lines back"
    )
    encoder: str = Field(
        "",
        description="encoder that kspace or image starts from: a folder, or models:/NAME@ALIAS of MLflow's registry; "
        "empty: of the finished pretraining with these settings; none: from scratch",
    )
    targets: Phenotypes = Field(STUDIED, description="phenotypes that the task phenotypes regresses")
    diseases: Diseases = Field(("dcm", "hcm"), description="diseases that the task diseases tells apart")
    labels: int = Field(
        0, ge=0, description="training subjects whose labels are used, each number's among a larger one's; 0: all"
    )
    steps: int = Field(400, ge=0, description="optimizer steps of training on labels")
    patience: int = Field(
        0, ge=0, description="validations in a row without a better val/score, after which the run ends; 0: off"
    )
    keep: Literal["best", "last"] = Field(
        "best", description="model that is left: of the best val/score, whose labels count as well, or of the last step"
    )
    frozen: bool = Field(False, description="the system is not trained, only the heads are")
    begin: Literal["probe", "mean"] = Field(
        "probe",
        description="heads begin as regressions (of phenotypes on the system's vectors, of diseases on phenotypes), or "
        "at the mean",
    )
    learning_rate: float = Field(5e-4, gt=0, description="peak learning rate of the stage")
    warmup_steps: int = Field(10, ge=0, description="steps of linear warm-up, then optimizer.schedule")
    head_factor: float = Field(2.0, gt=0, description="learning rate of the heads over that of the stage")
    decoder_factor: float = Field(
        2.0, gt=0, description="the same of the decoders that make masks and images of an encoder's tokens"
    )
    patch: tuple[int, int] = Field((8, 8), description="pixels (y, x) of a query of segmentation and reconstruction")
    queries: Literal["position", "shared"] = Field(
        "shared", description="a query knows its place alone, or sees its patch of the temporally shared image too"
    )
    channels: int = Field(32, gt=0, description="channels of the image from which masks and images are made")
    frames: int = Field(
        0, ge=0, description="frames of a subject whose pixels are learnt in a step, drawn anew each epoch; 0: all"
    )
    data_consistency: bool = Field(False, description="acquired lines are put back into the reconstructed image")


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


@dataclass(frozen=True)
class Workers:
    """Numbers of training processes that a run may use; a fixed number where both are equal."""

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}..{self.most}"

    @property
    def elastic(self) -> bool:
        """True if the run follows the size of the cluster."""
        return self.least < self.most

    def sizes(self, global_batch: int) -> tuple[int, ...]:
        """Numbers of workers that share a global batch evenly, ascending; a number between two of them is not used."""
        return tuple(n for n in range(self.least, self.most + 1) if global_batch % n == 0)


def _workers(value: Any) -> Any:
    """``4``, ``'4'`` and ``'2..8'`` -> Workers."""
    if isinstance(value, Workers):
        least, most = value.least, value.most
    elif isinstance(value, int) and not isinstance(value, bool):
        least = most = value
    else:
        words = value.split("..") if isinstance(value, str) else []
        if not 1 <= len(words) <= 2 or not all(word.strip().isdecimal() for word in words):
            raise ValueError(f"expected an integer from 1 or a range as 2..8, got {value!r}")
        least, most = int(words[0]), int(words[-1])
    if not 1 <= least <= most:
        raise ValueError(f"expected an integer from 1 or a range as 2..8, got {value!r}")
    return Workers(least, most)


class Train(Section):
    workers: Annotated[
        Workers,
        pydantic.PlainValidator(_workers),
        pydantic.PlainSerializer(lambda w: str(w) if w.elastic else w.least),
    ] = Field(
        Workers(1, 1),
        description="training processes, on GPU nodes one per GPU; 2..8: as many as the cluster has room for, the run "
        "grows and shrinks with it",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where the cluster has GPUs")
    cpus_per_worker: float = Field(0.5, gt=0, description="CPUs that Ray reserves per worker")
    threads: int = Field(0, ge=0, description="threads of a worker on a CPU; 0: its share of the node's cores")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="what DeepSpeed shards: 1 optimizer, 2 gradients, 3 weights")
    offload: bool = Field(
        False, description="optimizer in the host's memory (zero_stage 1 to 3): slower, less GPU memory"
    )
    bf16: bool = Field(False, description="bfloat16 engine; FFT, softmax of InfoNCE and sums stay fp32")
    compile: bool = Field(False, description="torch.compile of the transformer blocks, once for all numbers of tokens")
    accumulation: int = Field(
        1,
        gt=0,
        description="micro-batches per step and worker, at the most workers (with fewer there are more); the objective "
        "stays the same",
    )
    deterministic: bool = Field(
        False, description="only kernels that repeat bit for bit, on a GPU too: slower; what has none ends the run"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="a loss or gradient that is not finite ends the run, or leaves the weights as they are"
    )
    max_skipped: int = Field(10, ge=0, description="steps of a run that on_nonfinite=skip may skip; one more stops it")
    log_every: int = Field(10, gt=0, description="steps between lines and logged metrics")
    checkpoint_every: int = Field(200, gt=0, description="steps between checkpoints")
    eval_every: int = Field(200, gt=0, description="steps between validation loss and probe; multiple of log_every")
    eval_subjects: int = Field(256, gt=0, description="subjects of each of the two splits used by that probe")
    until: int = Field(0, ge=0, description="step at which the run pauses, with a checkpoint; 0: it goes to its end")
    eval_seed: int | None = Field(
        None,
        ge=0,
        description="seed of validation's subjects and patterns, the same for runs that compare; empty: seed",
    )
    keep: int = Field(2, ge=1, description="newest checkpoints kept; one that is damaged gives way to the one before")
    max_failures: int = Field(3, ge=0, description="lost workers or nodes survived; other errors are never retried")
    resize_every_s: float = Field(60.0, ge=0, description="time between looks for more room, where workers is a range")
    silent_s: float = Field(
        30.0, ge=0, description="time without a sign of life after which a worker counts as lost; 0: never"
    )
    hang_s: float = Field(
        1800.0,
        ge=0,
        description="time in which no worker finishes anything (a step, a validation, a checkpoint) after which all "
        "are lost; 0: never",
    )

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
    name: str = Field("", description="run name; empty: recipe and hash of what changes its numbers")
    fresh: bool = Field(False, description="start anew even though this run exists")
    begin: str = Field(
        "",
        description="checkpoint (folder) of another run, at which a new one branches off: weights, optimizer and place "
        "in the order of subjects are that one's, settings may differ if the model stays the same; needs run.name",
    )

    @pydantic.field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        if value and not re.fullmatch(r"\w[\w.+-]{0,99}", value):
            raise ValueError(f"expected letters, digits and _.+- (at most 100), got {value!r}")
        return value


class Storage(Section):
    root: str = Field("runs", description="folder of checkpoints, encoders and reports: a path that all nodes reach")


class Tracking(Section):
    uri: str = Field("", description="MLflow store; empty: MLFLOW_TRACKING_URI, else SQLite in storage.root")
    experiment: str = Field("kmtr", description="MLflow experiment")
    model: str = Field(
        "", description="name in MLflow's registry, of which a model of tasks is a new version; empty: none"
    )

    encoder: str = Field(
        "", description="name in MLflow's registry, of which a pretrained encoder is a new version; empty: none"
    )
    system_s: float = Field(
        10.0, ge=0, description="seconds between readings of CPU, memory, network and GPUs of each node; 0: none"
    )

    @pydantic.field_validator("model", "encoder")
    @classmethod
    def _name(cls, value: str) -> str:
        if value and not re.fullmatch(r"\w[\w. -]{0,99}", value):
            raise ValueError(f"expected letters, digits, blanks and _.- (at most 100), got {value!r}")
        return value
