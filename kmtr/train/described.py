"""Description of a run that people read in MLflow: what it is, how it was started, and where to look."""

from __future__ import annotations

from pathlib import Path

from kmtr.config import RunConfig, plain, typed
from kmtr.config.recipes import RECIPES
from kmtr.config.whole import is_identity
from kmtr.data.dataset.reader import Dataset

STAGES = {
    "both": "Masked pretraining, then alignment",
    "masked": "Masked pretraining",
    "align": "Alignment",
    "task": "Training on labels",
}
WHERE = {
    "task": "`val/score` chooses the weights; `val/...` are the held-out metrics of each task. Artifacts: `model/`, "
    "and of `jobs/finetune.py` the report with tables and figures.",
    "": "`val/probe_r2` is what a linear probe reads off the frozen encoder on held-out subjects; `masked/...` and "
    "`align/...` are losses, which do not compare between mask ratios or temperatures. Artifacts: `encoder/`, "
    "`figures/`.",
}


def note(config: RunConfig, dataset: Dataset, name: str, command: str) -> str:
    """Markdown: stage, data, what differs from the recipe, command, and which charts and files say most."""
    what = STAGES[config.stage] + (f" ({', '.join(config.task.tasks)})" if config.stage == "task" else "")
    rows = [f"| `{key}` | {value or '(empty)'} |" for key, value in _different(config).items()]
    return "\n\n".join(
        [
            f"**{what}**, recipe `{config.recipe}`, seed {config.seed}, {config.total_steps} steps of "
            f"{config.data.global_batch} subjects; run `{name}`.",
            f"Data: `{Path(config.data.root).name}`, {dataset.rows('train'):,} training, {dataset.rows('val'):,} "
            f"validation and {dataset.rows('test'):,} test subjects, manifest `{dataset.digest[:12]}`.",
            *(["\n".join(["| differs from the recipe | |", "|---|---|", *rows])] if rows else []),
            f"Command: `{command}`; the same command goes on where it was interrupted.",
            f"Where to look: {WHERE.get(config.stage, WHERE[''])}",
        ]
    )


def _different(config: RunConfig) -> dict[str, str]:
    """Settings that change numbers and are not the recipe's."""
    if config.recipe not in RECIPES:
        return {}
    recipe = plain(RECIPES[config.recipe]())
    return {key: typed(value) for key, value in plain(config).items() if is_identity(key) and value != recipe[key]}
