"""Cost of tracking to a training step, with an MLflow server that comes and goes within one run."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from kmtr import machine
from kmtr.bench.blocks import over
from kmtr.bench.data import load_of_machine
from kmtr.bench.step import LINES_ON_CPU, check_folder, device_of, fitting, on_random_data, processes
from kmtr.bench.tracked import BLOCK, METRICS
from kmtr.config import RunConfig, override
from kmtr.report.html import Table, text_table


def run(config: RunConfig) -> dict[str, Any]:
    """Measure and print; what the last line on stdout says."""
    changes = {"train.device": device_of(config), "data.loader": "threads", "train.workers": 1, "stage": "masked"}
    check_folder(config)
    load = load_of_machine()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        own = override(config, changes | {"storage.root": str(folder), "train.on_nonfinite": "stop"})
        limit = config.bench.lines or (LINES_ON_CPU if own.train.device == "cpu" else 0)
        own = on_random_data(fitting(own, limit), folder)
        found = processes("tracked", own, ("masked",), place, max(1, machine.threads(1) - 1))
    blocks = {kind: np.array(seconds) for kind, seconds in found["seconds"].items()}
    steps = {kind: float(np.median(seconds)) for kind, seconds in blocks.items()}
    said = {
        "down_over_up": over(blocks["down"], blocks["up"]),
        "up_over_off": over(blocks["up"], blocks["off"]),
        "down_over_off": over(blocks["down"], blocks["off"]),
        "call_share": round(median(found["calls"]) / steps["off"], 5),
        "step_s": {kind: round(seconds, 4) for kind, seconds in steps.items()},
        "blocks": len(blocks["up"]) + len(blocks["down"]),
        "records": found["records"],
        "unsent": found["unsent"],
        "history_equal": found["history_equal"],
        "load": round(load, 2),
    }
    rows = tuple(
        (kind, f"{1000 * steps[kind]:.0f}", *_interval(said.get(f"{kind}_over_off"))) for kind in ("off", "up", "down")
    )
    title = f"Step with {METRICS} metrics a step, blocks of {BLOCK} steps in turns, {len(blocks['up'])} of each"
    print(text_table(Table(title, ("MLflow server", "ms a step", "over untracked", "95 %"), rows)))
    print(f"down over up: {json.dumps(said['down_over_up'])}; a call takes {100 * said['call_share']:.3f} % of a step")
    return said


def _interval(found: dict[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return "1", ""
    return f"{found['ratio']:.3f}", f"{found['interval'][0]:.3f} to {found['interval'][1]:.3f}"
