"""Cost of a search of one trial over the run that it makes: until the first step, and of a step.

A step is compared within one run: the processes that a search has beside a run's own (its command, which is Ray Tune's
loop, and the trial's process, which waits for the run) are halted and continued every `BLOCK` steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from kmtr.bench.blocks import over
from kmtr.bench.data import load_of_machine
from kmtr.bench.process import ROOT
from kmtr.config import RunConfig, flatten, override, typed
from kmtr.config.recipes import RECIPES
from kmtr.data.dataset import storage
from kmtr.report.html import Cell, Table, text_table
from kmtr.tracking import moments
from kmtr.types import InputError, KmtrError

BLOCK = 10
"""Steps between two turns; the first of a block, in which the turn happened, does not count."""
FIRST = 5
"""Steps before the first block: workers, readers and compilers are warm by then."""
WAIT_S = 300.0
ELSEWHERE = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")
"""Environment variables that name another Ray or store than those that the commands start."""
TRIAL = "ImplicitFunc"
"""In the title of a trial's process, by Ray Tune."""
ONE = (
    "search.trials=1",
    "search.confirm=0x0",
    "search.scheduler=none",
    "search.space.masked.mask_ratio=uniform(0.3,0.9)",
)


def run(config: RunConfig) -> dict[str, Any]:
    """Measure and print; what the last line on stdout says.

    Raises:
        InputError: the recipe has no masked pretraining.
        KmtrError: a command ended before it was measured.
    """
    if not config.masked_steps:
        raise InputError(f"stage: expected masked pretraining to be measured, got {config.stage}")
    load = load_of_machine()
    begins: dict[str, list[float]] = {"pretrain": [], "search": []}
    for turn in range(config.bench.repeats):
        for kind in ("pretrain", "search") if turn % 2 == 0 else ("search", "pretrain"):
            begins[kind].append(_begun(kind, config))
            print(f"bench: {kind}: first step after {begins[kind][-1]:.1f} s", flush=True)
    blocks = _blocks(config)
    ratio = over(blocks["runs"], blocks["halted"])
    step_s = {kind: round(float(np.median(seconds)), 4) for kind, seconds in blocks.items()}
    start = {kind: round(median(seconds), 1) for kind, seconds in begins.items()}
    longer = round(start["search"] - start["pretrain"], 1)
    said = {
        "first_step_s": start,
        "start_up_s": longer,
        "step_ratio": ratio,
        "step_s": step_s,
        "blocks": len(blocks["runs"]),
        "load": round(load, 2),
    }
    rows: tuple[tuple[Cell, ...], ...] = (
        ("first step after, s", start["pretrain"], start["search"], longer),
        ("step, ms", *(f"{1000 * step_s[kind]:.0f}" for kind in ("halted", "runs")), f"{ratio['ratio']:.3f}"),
    )
    title = f"A search of one trial over the run alone ({config.recipe}, {len(blocks['runs'])} blocks of each kind)"
    print(text_table(Table(title, ("", "run alone", "in a search", "difference, ratio"), rows)))
    low, high = ratio["interval"]
    print(f"a step of a trial over one without the search's processes: {ratio['ratio']:.3f} ({low:.3f} to {high:.3f})")
    return said


def _begun(kind: str, config: RunConfig) -> float:
    """Seconds from a command to the end of its first step; it is ended then."""
    with _command(kind, config, 10**5) as (process, root):
        began = time.time()
        return _steps(process, root, 1)[0] - began


def _blocks(config: RunConfig) -> dict[str, np.ndarray]:
    """Seconds of the steps of a trial, ``block step``, while the search's processes run and while they are halted."""
    pairs = config.bench.pairs
    with _command("search", config, FIRST + 2 * pairs * BLOCK + 2) as (process, root):
        turned = FIRST
        _steps(process, root, turned)
        for turn in range(2 * pairs):
            for one in _besides(process):
                one.suspend() if turn % 2 else one.resume()
            turned += BLOCK
            _steps(process, root, turned)
        for one in _besides(process):
            one.resume()
        seconds = np.diff(_steps(process, root, turned))
    whole = seconds[FIRST - 1 :][: 2 * pairs * BLOCK].reshape(2 * pairs, BLOCK)[:, 1:]
    return {"runs": whole[0::2], "halted": whole[1::2]}


def _besides(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Processes that a search has beside those of the run."""
    command = psutil.Process(process.pid)
    found = []
    for one in command.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [one] if TRIAL in " ".join(one.cmdline()) else []
    if not found:
        raise KmtrError(f"bench: expected the process of a trial, called {TRIAL} by Ray Tune, found none")
    return [*found, command]


@contextmanager
def _command(kind: str, config: RunConfig, steps: int) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A command in a folder of its own, with a cluster of its own; ended at the end."""
    with tempfile.TemporaryDirectory() as place:
        changes = {
            "stage": "masked",
            "masked.steps": steps,
            "storage.root": place,
            "data.root": storage.absolute(config.data.root),
            "tracking.uri": "",
            "train.log_every": 1,
        }
        seldom = {"train.eval_every": steps, "train.checkpoint_every": steps, "run.name": "", "train.workers": 1}
        own, recipe = flatten(override(config, changes | seldom)), flatten(RECIPES[config.recipe]())
        given = [f"{key}={typed(value)}" for key, value in own.items() if value != recipe[key]]
        script = {"pretrain": ["jobs/pretrain.py"], "search": ["tune/search.py"]}[kind]
        more = ONE if kind == "search" else ()
        own_place = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
        with (Path(place) / "said.txt").open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, *script, config.recipe, *given, *more],
                cwd=ROOT,
                stdout=said,
                stderr=said,
                env=own_place,
            )
        family: list[psutil.Process] = []
        try:
            yield process, Path(place)
        finally:
            if process.poll() is None:
                family = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                process.wait()
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(family, 30)


def _steps(process: subprocess.Popen[bytes], root: Path, count: int) -> Sequence[float]:
    """Times of the ends of the steps so far, seconds since 1970, as soon as there are so many.

    Raises:
        KmtrError: the command ended, or nothing came.
    """
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        for spool in root.glob("*/spool"):
            if len(found := moments(spool, "masked/loss")) >= count:
                return found
        if process.poll() is not None:
            raise KmtrError(f"bench: the command ended: {json.dumps((root / 'said.txt').read_text()[-300:])}")
        time.sleep(0.02)
    raise KmtrError(f"bench: no step {count} within {WAIT_S:.0f} s")
