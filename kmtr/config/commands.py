"""Settings of the commands other than training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from kmtr.config.core import Section
from kmtr.config.run import Phenotypes
from kmtr.types import PROBED, STUDIED


class Shards(Section):
    dtype: Literal["float16", "float32"] = Field(
        "float16", description="stored k-space; float16 with a scale per subject"
    )
    compression: Literal["none", "lz4"] = Field(
        "none", description="codec of k-space; none is read straight into the batch, lz4 saves where much is zero"
    )
    rows: int = Field(64, gt=0, description="subjects per shard file")
    split: Literal["auto", "hash", "stratified", "train", "test"] = Field(
        "auto",
        description="hash: 70/10/20 % train/val/test by subject; train, test: all there; auto: train below 20 subjects",
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
    columns: str = Field(
        "", description="columns of that table where names differ: 'subject=eid lvedv_ml=f24100_2_0 ...'"
    )
    gib: float = Field(4.0, gt=0, description="largest array that a source may hold, GiB: larger claims are refused")


class Simulate(Section):
    subjects: int = Field(2000, gt=0, description="simulated subjects, over all splits")
    difficulty: Literal["easy", "medium", "hard"] = Field(
        "medium", description="nuisance and detail between k-space and labels (kmtr/simulation/README.md)"
    )
    coils: int = Field(1, gt=0, le=32, description="receiver coils; 1: a uniform one")
    oversampling: float = Field(1.0, ge=1, le=4, description="readout field of view over the image's; 1: none")
    snr_db: float = Field(30.0, description="power of the signal over that of the complex noise in k-space, dB")
    seed: int = Field(0, ge=0, description="a subject is a pure function of (seed, index)")


class Evaluate(Section):
    encoder: str = Field(
        "",
        description="exported encoder, a folder or models:/NAME@ALIAS of MLflow's registry; empty: the one of the run "
        "with this configuration; none: baselines only",
    )
    targets: Phenotypes = Field(PROBED, description="phenotypes that are probed, where the dataset has them")
    accelerations: tuple[int, ...] = Field((4, 8, 16), description="nominal R at which the probe is scored")
    labels: int = Field(1000, gt=0, description="labelled training subjects that the ridge probe is fitted on")
    subjects: int = Field(1000, gt=0, description="held-out subjects at most")
    dense: int = Field(
        0, ge=0, description="of these, subjects at most whose masks and images are scored, the first drawn; 0: all"
    )
    mapped: int = Field(
        200,
        gt=0,
        description="labelled subjects at most whose masks are predicted too, for the maps from areas of masks to "
        "phenotypes; more of them make better ones of LVEF",
    )
    bootstrap: int = Field(2000, gt=0, description="resamples of the held-out subjects for intervals")


class Predict(Section):
    """jobs/predict.py: an exported model over a whole dataset."""

    out: str = Field("", description="folder or URI that predictions are written to; the same command resumes there")
    split: Literal["all", "train", "val", "test"] = Field("all", description="subjects that are predicted")
    accelerations: tuple[int, ...] = Field(
        (), description="nominal R, drawn as for the model's evaluation; empty: all lines that the source acquired"
    )
    embeddings: bool = Field(False, description="a table of the system's vectors too")
    masks: bool = Field(
        False,
        description="tables of masks and images too, and NIfTI files that lie on the source",
    )
    batch: int = Field(16, gt=0, description="subjects at once")
    rows: int = Field(64, gt=0, description="subjects per part: what a killed command loses at most, for each worker")
    workers: int = Field(0, ge=0, description="processes that predict; 0: one per GPU, without GPUs one per CPU")

    @pydantic.field_validator("accelerations")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value and (min(value) < 1 or len(set(value)) < len(value)):
            raise ValueError(f"expected different integers from 1, got {value}")
        return value


class Export(Section):
    """jobs/export.py: a dataset in the layout of another program."""

    out: str = Field("", description="local folder in which the dataset's own is made")
    number: int = Field(1, gt=0, le=999, description="number of nnU-Net's dataset, as in Dataset001_kmtr")
    input: Literal["full", "zerofilled", "shared", "lowrank"] = Field(
        "full", description="image, as task.input has it: fully sampled, or made of the acquired lines alone"
    )
    acceleration: int = Field(
        0, ge=0, description="nominal R, with the patterns of evaluation; 0: all lines, for the full image"
    )


class Verify(Section):
    workers: tuple[int, ...] = Field((), description="numbers of workers proved; empty: all up to 64 that can be")
    epochs: int = Field(2, gt=0, description="epochs of the plan that are proved")

    @pydantic.field_validator("workers")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value and min(value) < 1:
            raise ValueError(f"expected integers from 1, got {value}")
        return value


@dataclass(frozen=True)
class Confirm:
    """How many of the best trials run again, and with how many fresh seeds each."""

    best: int
    seeds: int

    def __str__(self) -> str:
        return f"{self.best}x{self.seeds}"


def _confirm(value: Any) -> Any:
    """``'2x3'`` -> Confirm(2, 3)."""
    words = str(value).split("x")
    if len(words) != 2 or not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"expected TRIALSxSEEDS as 2x3, 0x0 for none, got {value!r}")
    best, seeds = map(int, words)
    if (best, seeds) != (0, 0) and not (best >= 1 and seeds >= 2):
        raise ValueError(f"expected at least one trial and two seeds, as 1x2, or 0x0 for none, got {value!r}")
    return Confirm(best, seeds)


class Search(Section):
    """tune/search.py: which settings are best, and how sure that is."""

    space: dict[str, str] = Field(
        {},
        description="domain of a searched key, search.space.KEY=: uniform(LOW,HIGH), loguniform(LOW,HIGH), "
        "choice(A,B,...), or grid(A,B,...), all of whose combinations are tried; A|B|... where a value has commas. "
        "None: temperature, mask ratio and acceleration of pretraining",
    )
    trials: int = Field(8, gt=0, description="configurations tried; a space of grids alone is tried whole")
    concurrent: int = Field(1, gt=0, description="trials at the same time")
    sampler: Literal["random", "tpe"] = Field(
        "random", description="random: evenly over the space; tpe: near the best so far (Optuna), after startup trials"
    )
    startup: int = Field(10, gt=0, description="trials that tpe draws at random first")
    earlier: tuple[str, ...] = Field((), description="names of earlier searches whose trials tpe learns from")
    scheduler: Literal["none", "asha", "pbt"] = Field(
        "asha",
        description="asha: trials below the best 1/eta of those that came as far are stopped; none: all run whole",
    )
    grace_steps: int = Field(100, gt=0, description="steps before ASHA may stop a trial, or between two looks of pbt")
    eta: int = Field(2, ge=2, description="ASHA keeps one of so many, and looks again at so many times the steps")
    confirm: Annotated[Confirm, pydantic.PlainValidator(_confirm), pydantic.PlainSerializer(str)] = Field(
        Confirm(2, 3),
        description="best trials that run again with so many fresh seeds, whole, before one is called best",
    )
    noise_seeds: int = Field(
        4,
        ge=3,
        description="seeds of the recipe itself, whole: what the confirmed are compared with; unless confirm=0x0",
    )
    dry_run: bool = Field(False, description="only print the trials, what they reserve and how long they take")


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
    plan_subjects: int = Field(0, ge=0, description="bench.py data: only plan, for a dataset of this many subjects")
    plan_workers: int = Field(1024, gt=0, description="bench.py data: workers of that plan")
    pairs: int = Field(
        20,
        ge=2,
        description="bench.py step: steps of ours and of what it is compared with, in turns; bench.py tracking and "
        "search: blocks",
    )
    lines: int = Field(
        0, ge=0, description="bench.py step: lines of a subject at most; 0: 2,000 on a CPU, as the recipe on a GPU"
    )


class Study(Section):
    """jobs/study.py: what pretraining is worth, and which of its choices matter."""

    seeds: tuple[int, ...] = Field((0, 1, 2), description="study.py: seeds; each pretrains and draws its labels anew")
    labels: tuple[int, ...] = Field((100, 200, 1000), description="study.py labels: numbers of labelled subjects")
    targets: Phenotypes = Field(STUDIED, description="phenotypes that its R2 is the mean of")
    longer_steps: int = Field(
        0,
        ge=0,
        description="study.py labels: more masked pretraining, baseline of alignment; 0: as many as take its time",
    )
    longer_seeds: int = Field(
        1, gt=0, description="study.py labels: seeds that also train the baseline of longer_steps"
    )
    batch: int = Field(32, gt=0, description="labelled subjects per step of fine-tuning and of training from scratch")
    warmup_steps: int = Field(10, ge=0, description="first steps of both, a linear warm-up, then a cosine to zero")
    steps: int = Field(300, gt=0, description="optimizer steps of fine-tuning, one model for all R")
    learning_rate: float = Field(5e-4, gt=0, description="peak learning rate of fine-tuning")
    scratch_steps: int = Field(300, gt=0, description="optimizer steps of supervised training from scratch")
    scratch_learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of training from scratch")
    shift: float = Field(0.05, ge=0, le=0.5, description="augment.shift of both")
    rotation_deg: float = Field(
        10.0, ge=0, le=180, description="augment.rotation_deg of both; 0 for sources that are undersampled already"
    )
    copies: int = Field(
        8, gt=0, description="study.py labels: augmented copies of each labelled subject at most, for ridges and probes"
    )
    ablation_steps: int = Field(300, gt=0, description="study.py ablation: masked pretraining of each variant")
    ablation_align_steps: int = Field(100, gt=0, description="study.py ablation: alignment where a group asks")
    ablation_labels: tuple[int, ...] = Field((200, 1000), description="study.py ablation: labelled subjects of a probe")
    groups: tuple[str, ...] = Field((), description="study.py ablation: questions that are asked; empty: all")
    concurrent: int = Field(2, gt=0, description="study.py ablation: runs at the same time, one worker each")
    task_labels: tuple[int, ...] = Field(
        (100, 200, 1000, 0),
        description="study.py tasks: labelled subjects of the model of all task.tasks, pretrained and from scratch; "
        "0: all",
    )
    single_labels: tuple[int, ...] = Field(
        (200, 0),
        description="study.py tasks: those of task_labels at which each task is trained alone too; empty: none",
    )
    rows: str = Field(
        "",
        description="study.py tasks, systems: folder of finished rows, small enough to commit; empty: in storage.root",
    )
    validated: tuple[int, ...] = Field(
        (),
        description="study.py tasks, systems: R at which runs are validated, where rows are scored at other R "
        "(evaluate.accelerations): those of an earlier study, whose runs are then used; empty: the same",
    )
    systems: tuple[str, ...] = Field(
        (), description="study.py systems: those that are compared (kmtr/studies/contenders.py); empty: all"
    )
    bound_steps: int = Field(
        4000, gt=0, description="study.py systems: optimizer steps at most of those that see the full image"
    )
    bound_patience: int = Field(
        5, gt=0, description="study.py systems: validations in a row without a better val/score that end those"
    )
    train: bool = Field(True, description="study.py tasks, systems: false only reports the rows that are there")

    @pydantic.model_validator(mode="after")
    def _different(self) -> Study:
        for key, least in (
            ("seeds", 0),
            ("labels", 3),
            ("ablation_labels", 3),
            ("task_labels", 0),
            ("single_labels", 0),
        ):
            value = getattr(self, key)
            if (
                (not value and key != "single_labels")
                or min(value, default=least) < least
                or len(set(value)) < len(value)
            ):
                raise ValueError(
                    f"study.{key}: expected one or more different integers from {least}, got {value or 'none'}"
                )
        if other := sorted(set(self.single_labels) - set(self.task_labels)):
            raise ValueError(
                f"study.single_labels: expected some of study.task_labels={self.task_labels}, got {other[0]}"
            )
        return self
