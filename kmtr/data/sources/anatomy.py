"""Meaning of contours: checked and told by their shape, and against the images.

In a short axis the myocardium surrounds the LV cavity and nothing else: of the cavity's outline 98 to 100 % leads to
myocardium in all contours of ACDC and Sunnybrook that were measured, of the right ventricle's 21 to 40 %, and of the
myocardium's own 28 to 45 % to the cavity. So the values of contours, which differ between data sets, are told by shape
(`meaning`), and rings that belong to another heart are refused (`check_surrounded`).

Blood is brighter than the wall around it in cine: their means differ by 1.7 to 3.5 standard deviations in the same
contours. Contours that fit the images only when they are turned over are stored another way round (`check_turned`).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import numpy as np

from kmtr.types import SEGMENTATION_CLASSES, InputError

LV_CAVITY, LV_MYOCARDIUM, RV, LA, RA = range(1, len(SEGMENTATION_CLASSES))

SURROUNDED = 0.5
"""Least share of a cavity's outline that leads to the myocardium around it."""

CLEARLY = 0.25
"""Least excess of surrounded outline over that of the layout's cavity, as a share; below it the layout counts."""

WITHIN, TOUCHES = 0.55, 0.15
"""Larger shares of the right ventricle's outline never lead to the LV's wall (a thin crescent: half), to its cavity."""

OUTSIDE = 0.1
"""Largest share of the inner contour's area outside of the outer one; hands differ by less."""

RING_PIXELS = 3
"""Width of the wall whose brightness is compared with the cavity's."""

TURNED = 0.5
"""Contours fit better when turned over: by this difference of contrasts, in standard deviations."""

ENOUGH_PIXELS = 200
"""Least pixels of the cavity, over all frames, that contrasts are compared on."""


def parse(key: str) -> dict[int, int]:
    """``1:lv_cavity,2:lv_myocardium,3:rv`` -> class of each value; 0 is the background; empty: empty.

    Raises:
        InputError: not of this form, a value twice, or an unknown class.
    """
    found: dict[int, int] = {}
    for word in key.split(",") if key else ():
        value, colon, name = (part.strip() for part in word.partition(":"))
        if not colon or not value.isdecimal() or not 0 <= int(value) <= 255 or name not in SEGMENTATION_CLASSES:
            raise InputError(
                "ingest.classes: expected value:class pairs such as 1:lv_cavity,2:lv_myocardium,3:rv, classes of "
                f"{', '.join(SEGMENTATION_CLASSES)}, got {word.strip()!r}"
            )
        if int(value) in found:
            raise InputError(f"ingest.classes: value {value} is given twice")
        found[int(value)] = SEGMENTATION_CLASSES.index(name)
    return {0: 0} | found if found else {}


def surrounded(drawn: np.ndarray, inner: int, outer: int) -> float:
    """Share of the outline of one value, counted in edges of pixels, behind which another lies; 0 where nothing is.

    Args:
        drawn: ``... y x``.
    """
    edges = shared = 0
    for axis in (-2, -1):
        lower, upper = (
            np.take(drawn, range(*ends), axis) for ends in ((0, drawn.shape[axis] - 1), (1, drawn.shape[axis]))
        )
        for here, there in ((lower, upper), (upper, lower)):
            outline = there[(here == inner) & (there != inner)]
            edges += outline.size
            shared += int((outline == outer).sum())
    return shared / edges if edges else 0.0


def meaning(codes: np.ndarray, layout: Mapping[int, int], where: str) -> tuple[dict[int, int], str]:
    """Meaning of the values of contours, by a layout unless their shape says otherwise; and a note on any doubt.

    Args:
        codes: values as stored, ``slice t y x``.
        layout: value -> class, as the file's name suggests.

    Raises:
        InputError: the right ventricle alone, which is what a mask of the LV cavity alone looks like; a third value
            that is no right ventricle.
    """
    of = {value: kind for value, kind in layout.items() if kind in (LV_CAVITY, LV_MYOCARDIUM, RV)}
    if len(of) < 3:
        return dict(layout), ""
    present = [value for value in of if (codes == value).any()]
    value_of = {kind: value for value, kind in of.items()}
    if present == [value_of[RV]] and set(layout.values()) <= {0, *of.values()}:
        raise InputError(
            f"{where}: contours of one value only, {present[0]}: the right ventricle in this layout, but the LV cavity "
            f"in many masks; say which: ingest.classes={present[0]}:rv or {present[0]}:lv_cavity"
        )
    share = {pair: surrounded(codes, *pair) for pair in permutations(present, 2)}
    said = value_of[LV_CAVITY], value_of[LV_MYOCARDIUM]
    best = max(share, key=lambda pair: share[pair], default=said)
    if share.get(best, 0.0) >= SURROUNDED:
        _check_third(best, set(present) - set(best), share, where)
    elif set(present) == {value_of[LV_CAVITY], value_of[RV]}:
        return dict(layout), "no myocardium tells the ventricles: contours are read as their layout says"
    if best == said or share.get(best, 0.0) < SURROUNDED or share[best] - share.get(said, 0.0) < CLEARLY:
        return dict(layout), ""
    (rest,) = set(of) - set(best)
    told = dict(layout) | {best[0]: LV_CAVITY, best[1]: LV_MYOCARDIUM, rest: RV}
    listed = ", ".join(f"{value} {SEGMENTATION_CLASSES[kind]}" for value, kind in sorted(told.items()) if kind)
    return told, f"values of the contours told by shape, against the layout's: {listed}"


def _check_third(best: tuple[int, int], others: set[int], share: Mapping[tuple[int, int], float], where: str) -> None:
    """Refuse a third value that lies where no right ventricle does: within the wall, or at the cavity. InputError."""
    cavity, wall = best
    for other in others:
        if share[other, wall] > WITHIN or share[other, cavity] > TOUCHES:
            raise InputError(
                f"{where}: contours of {other} lie within {wall} or at {cavity}, where no right ventricle is: "
                "which is the LV cavity, which a scar? Say ingest.classes=1:lv_cavity,2:lv_myocardium,3:lv_myocardium"
            )


def check_surrounded(classes: np.ndarray, where: str) -> None:
    """Refuse an LV cavity that the myocardium of its slices doesn't surround.

    Args:
        classes: of SEGMENTATION_CLASSES, ``slice t y x`` of a short axis.

    Raises:
        InputError: one of the two is of another patient, or their values mean something else.
    """
    both = (classes == LV_CAVITY).any((-2, -1)) & (classes == LV_MYOCARDIUM).any((-2, -1))
    if both.any() and (share := surrounded(classes[both], LV_CAVITY, LV_MYOCARDIUM)) < SURROUNDED:
        raise InputError(
            f"{where}: the myocardium surrounds {share:.0%} of the LV cavity's outline, expected {SURROUNDED:.0%} or "
            "more: contours of two patients, or values that mean something else (ingest.classes=1:lv_cavity,...)?"
        )


def check_inside(inner: np.ndarray, outer: np.ndarray, where: str) -> None:
    """Refuse an inner contour that leaves the outer one. Both bool ``row column``.

    Raises:
        InputError: more than `OUTSIDE` of it lies outside.
    """
    if inner.any() and (outside := float((inner & ~outer).sum() / inner.sum())) > OUTSIDE:
        raise InputError(
            f"{where}: {outside:.0%} of an inner contour lies outside of the outer one, expected at most "
            f"{OUTSIDE:.0%}: contours of two patients?"
        )


def check_turned(magnitude: np.ndarray, classes: np.ndarray, where: str) -> None:
    """Refuse contours that fit their images only when they are turned over.

    Args:
        magnitude, classes: ``slice t y x``.

    Raises:
        InputError: turned over in a plane, along the slices, or with exchanged axes, the cavity stands out by far more.
    """
    frames = np.flatnonzero((classes == LV_CAVITY).any((0, 2, 3)))
    cavity = classes[:, frames] == LV_CAVITY
    if cavity.sum() < ENOUGH_PIXELS:
        return
    images = magnitude[:, frames]
    turns = {"in y": (-2,), "in x": (-1,), "in y and x": (-2, -1), "along the slices": (0,)}
    turned = {name: np.flip(cavity, axes) for name, axes in turns.items()}
    if cavity.shape[-1] == cavity.shape[-2]:
        turned["by exchanging y and x"] = cavity.swapaxes(-2, -1)
    as_it_is = contrast(images, cavity)
    name, best = max(((name, contrast(images, other)) for name, other in turned.items()), key=lambda found: found[1])
    if best - as_it_is > TURNED and best > 2 * TURNED:
        raise InputError(
            f"{where}: the contours fit the images only when turned over {name} (blood brighter than its wall by "
            f"{best:.1f} standard deviations, as stored by {as_it_is:.1f}): store both the same way round"
        )


def contrast(images: np.ndarray, cavity: np.ndarray) -> float:
    """Contrast of a cavity: brightness above a ring of `RING_PIXELS` around it, in standard deviations of both.

    Args:
        images: ``... y x``; cavity: bool, the same.
    """
    ring = _grown(cavity, RING_PIXELS) & ~cavity
    inside, around = images[cavity].astype(float), images[ring].astype(float)
    spread = np.sqrt((inside.var() + around.var()) / 2) if inside.size and around.size else 0.0
    return float((inside.mean() - around.mean()) / spread) if spread else 0.0


def _grown(area: np.ndarray, pixels: int) -> np.ndarray:
    """The area and whatever lies within so many steps along y and x."""
    for _ in range(pixels):
        grown = area.copy()
        grown[..., 1:, :] |= area[..., :-1, :]
        grown[..., :-1, :] |= area[..., 1:, :]
        grown[..., 1:] |= area[..., :-1]
        grown[..., :-1] |= area[..., 1:]
        area = grown
    return area
