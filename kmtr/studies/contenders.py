"""Contenders of a study, as which its rows are trained: k-MTR and its opponents. Adding one is a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kmtr.config import RunConfig
from kmtr.studies.task_rows import FLOORS, PRETRAINED, SCRATCH, Asked


@dataclass(frozen=True)
class Contender:
    """One of them.

    Attributes:
        title: in tables and figures.
        changes: of the study's settings.
        tasks: that it can learn; empty: all of the study's.
        pretrained: begins from an encoder that a pretraining with the same changes leaves.
        long: trains for the seconds of k-MTR's pretraining as well.
        paced: contender whose number of steps it takes, having the same network on another image: what making the
            image takes, anew at each pass, does not count.
        bound: sees what nobody has at R: trained until validation stops improving, and no opponent.
        first, then: reconstruct, then analyse: the contender (or `LOWRANK`) whose images the trained model of another
            one, of full images, is given. Nothing is trained for it.
        once: of the first seed alone: its row says how it compares, not how seeds differ.
        style: place in the figures' colours, and line style.
    """

    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    pretrained: bool = False
    long: bool = False
    paced: str = ""
    bound: bool = False
    first: str = ""
    then: str = ""
    once: bool = False
    style: tuple[int, str] = (5, ":")

    def learns(self, config: RunConfig) -> tuple[str, ...]:
        """Its tasks among those of a study."""
        if self.first in CONTENDERS and not CONTENDERS[self.first].learns(config):
            return ()
        return tuple(task for task in config.task.tasks if task in self.tasks or not self.tasks)


LOWRANK = "lowrank"
FLOOR = "floor"
IMAGES = {
    "zerofilled": ("zero-filled image", (1, "-")),
    "shared": ("temporally shared image", (2, "-")),
    LOWRANK: ("low-rank + sparse image", (2, "--")),
    "full": ("full image (bound)", (4, "--")),
}
"""`task.input` -> its name, and the style of who sees it."""


def _on_images(system: str, title: str, images: Sequence[str], *tasks: str, **changes: Any) -> dict[str, Contender]:
    """A system on each of some images."""
    found = {}
    for image in images:
        (name, style), own = IMAGES[image], {"task.system": system, "task.input": image, **changes}
        paced = f"{system}-shared" if image == LOWRANK else ""
        found[f"{system}-{image}"] = Contender(
            f"{title}, {name}", own, tasks, paced=paced, bound=image == "full", style=style
        )
    return found


def _on_reconstructions(system: str, title: str, *tasks: str) -> dict[str, Contender]:
    """A system trained on full images, on each reconstruction."""
    firsts = {LOWRANK: ("low-rank + sparse", (4, "-.")), "xf": ("x-f U-Net", (4, ":")), "kgin": ("k-GIN", (1, ":"))}
    return {
        f"{first}-{system}": Contender(
            f"{name}, then {title}", tasks=tasks, first=first, then=f"{system}-full", once=True, style=style
        )
        for first, (name, style) in firsts.items()
    }


CONTENDERS: dict[str, Contender] = {
    PRETRAINED: Contender("k-MTR", pretrained=True, style=(0, "-")),
    SCRATCH: Contender("k-MTR from scratch", style=(0, "--")),
    "scratch-long": Contender("k-MTR from scratch, with pretraining's seconds", long=True, once=True, style=(0, ":")),
    "tokens-zerofilled": Contender(
        "k-MTR on zero-filled patches in place of lines",
        {"model.encoder_inputs": "zerofilled"},
        pretrained=True,
        style=(3, "-"),
    ),
    # Rates of opponents are those that learnt most in trials (RESULTS.md): at the stage's 5e-4 this one would still be
    # at the mean mask where 3e-3 has half of the loss, and ResNet-50 would learn nothing.
    **_on_images("unet", "nnU-Net topology", [*IMAGES], "segmentation", **{"task.learning_rate": 3e-3}),
    # What k-MTR's decoder of masks sees beside its tokens, without the tokens.
    "unet-motion": Contender(
        "nnU-Net topology, temporally shared image, its mean and motion",
        {"task.system": "unet", "task.input": "shared", "task.unet_motion": True, "task.learning_rate": 3e-3},
        ("segmentation",),
        once=True,
        style=(2, ":"),
    ),
    # A regression on its first vectors is soon worse than none, since they change faster than it can follow.
    **_on_images(
        "resnet50",
        "ResNet-50",
        ["zerofilled", "shared", "full"],
        "phenotypes",
        "diseases",
        **{"task.begin": "mean", "task.learning_rate": 1e-4},
    ),
    "kmae": Contender(
        "KMAE-style (k-GIN's encoder, pooled)",
        {"task.system": "kmae"},
        ("phenotypes", "diseases"),
        once=True,
        style=(1, "--"),
    ),
    "image-full": Contender(
        "image encoder, full image (bound)",
        {"task.system": "image", "task.queries": "position", "masked.image_weight": 1.0, "align.steps": 0},
        ("phenotypes", "diseases", "segmentation"),
        pretrained=True,
        bound=True,
        style=(3, "--"),
    ),
    "linet": Contender(
        "LI-Net-style",
        {"task.system": "linet", "task.learning_rate": 3e-3},
        ("segmentation",),
        once=True,
        style=(3, "-."),
    ),
    "xf": Contender(
        "x-f U-Net with data consistency",
        # It computes all frames of a subject, so that learning from all costs it nothing; so does k-GIN.
        {"task.system": "xf", "task.learning_rate": 2e-3, "task.frames": 0},
        ("reconstruction",),
        once=True,
        style=(2, "-."),
    ),
    "kgin": Contender(
        "k-GIN", {"task.system": "kgin", "task.frames": 0}, ("reconstruction",), once=True, style=(1, "-.")
    ),
    **_on_reconstructions("unet", "nnU-Net topology", "segmentation"),
    **_on_reconstructions("resnet50", "ResNet-50", "phenotypes", "diseases"),
}
"""Name (`Asked.start`) -> contender, in the order in which a seed's are trained."""


def decided(name: str) -> dict[str, Any]:
    """Settings that decide a contender's rows beside the study's, for JSON, ``changes``; empty: none do."""
    row = contender(name)
    every = {one: dict(contender(one).changes) for one in (name, row.first, row.then) if contender(one).changes}
    for changes in every.values():
        if changes.get("task.begin") == "mean":
            changes["scaled"] = True  # rows of before 2026-11-30 had heads of another scale
    if LOWRANK in (row.first, row.changes.get("task.input")):
        every[LOWRANK] = {"momentum": True}  # those of before 2026-12-01 had images of 20 steps without
    return {"changes": every} if every else {}


def title_of(name: str) -> str:
    return FLOOR if name == FLOORS else contender(name).title


def names_of(rows: Iterable[Asked]) -> list[str]:
    """Contenders that have rows, in their order, then the floor."""
    there = {one.start for one in rows}
    return [name for name in (*CONTENDERS, FLOORS) if name in there]


def contender(name: str) -> Contender:
    """The contender of this name; one without properties for floors, which nothing is trained for."""
    return CONTENDERS.get(name, Contender(name))
