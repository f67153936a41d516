"""The card of an exported model: ``README.md`` in its folder, made of what its files and its scores say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kmtr.config import RunConfig
from kmtr.exported import AREAS, MODEL_HEAD, MODEL_WEIGHTS, Trained, model_files, rebuilt
from kmtr.files import write_atomic
from kmtr.report.html import Table, markdown_table
from kmtr.systems import input_of, system

FILE = "README.md"
DENSE = {"segmentation": "`masks` (a class for every pixel)", "reconstruction": "`image` (magnitude of every pixel)"}
FILES = {
    MODEL_WEIGHTS: "weights",
    MODEL_HEAD: "what rebuilds it",
    AREAS: "linear maps from the areas of its masks to what it answers with these",
}
UNSCORED = "Not scored: no test split was at hand, or it had too few subjects."


def write_card(folder: Path, scored: Sequence[Table] = ()) -> Path:
    """Write the card of the model in a folder.

    Args:
        scored: tables of the test split, of the model beside its baselines.
    """
    path = folder / FILE
    write_atomic(path, card(json.loads((folder / MODEL_HEAD).read_text()), scored))
    return path


def card(head: dict[str, Any], scored: Sequence[Table] = ()) -> str:
    """Markdown text of a card; it names no subject and no path.

    Args:
        head: content of ``model.json``.
    """
    config = rebuilt(head["settings"])
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts(config, head))
    metrics = "\n\n".join(map(markdown_table, scored)) or UNSCORED
    files = ", ".join(f"`{name}` ({FILES[name]})" for name in model_files(head))
    return f"""\
# A k-MTR model: {", ".join(config.task.tasks)}

**A research model, not a medical device.** It reads cardiac MRI k-space and was made by kmtr
(`jobs/finetune.py`). Its files hold no code: {files}.

| | |
|---|---|
{rows}

## On held-out subjects

{metrics}

## Use

```python
import kmtr
from kmtr.data.sources import read

kmtr.load_model("FOLDER OF THIS FILE").predict(read("STUDY"))
```

A whole dataset: `python jobs/predict.py FOLDER data.root=... predict.out=...`.

## Limits

- A study without these views, or with other coils or another matrix, is refused; at another R the model warns.
- How it does on other scanners, sequences or patients than those it was trained on is not known.
"""


def facts(config: RunConfig, head: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the card's table."""
    data, how, trained = config.data, config.sampling, Trained(**head.get("trained") or {})
    outputs = [f"`{name}` ({unit})" for name, unit in head.get("units", {}).items()]
    outputs += [DENSE[task] for task in config.task.tasks if task in DENSE]
    labels = ", ".join(f"`{name}` of {count}" for name, count in trained.labels.items())
    slices = f" ({data.sax_slices} short-axis slices)" if "sax" in data.views else ""
    size = f", width {config.model.width}, depth {config.model.depth}" if system(config.task.system).tokens else ""
    areas = ", ".join(f"`{name}`" for name in (head.get("areas") or {}).get("answers", ()))
    begun = "initial weights" if trained.from_scratch else "a pretrained encoder"
    return [
        ("predicts", ", ".join(outputs) or "see its task"),
        ("system", f"`{config.task.system}`{size} on input `{input_of(config)}`"),
        ("views", f"{', '.join(data.views)}{slices}"),
        ("frames, matrix, coils", f"{data.frames}, {data.matrix[0]} x {data.matrix[1]}, up to {data.coils}"),
        ("R in training", f"{', '.join(map(str, how.accelerations))}, family {how.family}, {how.acs_lines} ACS lines"),
        ("trained on", f"{trained.subjects} subjects, {trained.steps} steps from {begun}"),
        ("labels", labels or "none"),
        *([("answers with areas of its masks", f"{areas}; its heads all else")] if areas else []),
        ("dataset", f"digest {trained.dataset[:16] or 'not known'}"),
    ]
