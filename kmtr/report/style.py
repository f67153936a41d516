"""Colours and type of all figures."""

from __future__ import annotations

from typing import Any

COLOURS = ("#0b5cad", "#d1495b", "#2a9d72", "#e09f3e", "#7b5ea7", "#5b6470")
"""Told apart with the common forms of colour blindness, and in grey."""

INK = "#1b1f24"
SMALL, NORMAL, LARGE = 8, 9, 11
"""Type, in points."""


def clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa4b0")
    axes.tick_params(labelsize=SMALL - 1, color="#9aa4b0", labelcolor=INK, length=3)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_size(SMALL)
    axes.yaxis.label.set_size(SMALL)
