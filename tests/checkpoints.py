"""What a run wrote: content of its checkpoints, and its history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kmtr import tracking
from kmtr.train import checkpoint, state


def content(folder: Path) -> dict[str, Any]:
    """Weights and moments of a checkpoint, whole."""
    model = checkpoint.read_head(folder)["model"]
    return {
        f"{kind} {part}.{name}": value.numpy()
        for kind in (state.WEIGHT, *state.MOMENTS)
        for part in ("systems", "heads")
        for name, value in state.whole(checkpoint.states(folder), kind, model, part).items()
    }


def written(run: Path) -> list[Path]:
    """Checkpoints that a run has, the oldest first."""
    return sorted((run / "train").glob("checkpoint_*"))


def history(run: Path, name: str = "masked/loss") -> dict[int, float]:
    """Step -> value of a logged metric."""
    return dict(tracking.history(run / "spool")[name])
