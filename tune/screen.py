"""A search on the screen: on a terminal one table that is kept up to date, elsewhere a line for all that happens."""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from tune.ledger import FINISHED, STOPPED, WAITING, Trial
from tune.space import shown

LATEST = 12
"""Runs in the table at most: those that go on, and the best."""
EVERY_S = 0.5


class Screen:
    """Shows the runs of a phase of a search.

    Args:
        runs: all that are known beforehand.
        wanted: how many there will be.
        steps: of a whole run.
        at_once: runs side by side.
    """

    def __init__(self, runs: Sequence[Trial], wanted: int, steps: int, at_once: int, out: TextIO | None = None):
        self.runs = {run.name: run for run in runs}
        self.wanted, self.steps, self.at_once = wanted, steps, at_once
        self._out = out  # not sys.stdout itself, since Tune pickles what it is given
        self.live = self.out.isatty()
        self.began = time.monotonic()
        self.before = sum(run.step - run.begun for run in runs)
        self.going: set[str] = set()
        self.height, self.drawn = 0, -math.inf

    @property
    def out(self) -> TextIO:
        return self._out or sys.stdout

    def begins(self, run: Trial) -> None:
        self._knows(run)
        if run.name not in self.going:
            self.going.add(run.name)
            self._says(f"{label(run)}  begins   {shown(run.values)}")

    def reports(self, run: Trial) -> None:
        self._knows(run)
        step, score = run.reports[-1]
        self._says(f"{label(run)}  step {step:>6}   score {score:.4f}")

    def ends(self, run: Trial) -> None:
        self._knows(run)
        self.going.discard(run.name)
        how = {FINISHED: "finished", STOPPED: "stopped by ASHA", WAITING: f"pauses at step {run.step}"}.get(
            run.status, f"failed: {run.reason}"
        )
        score = f"   score {run.score:.4f}" if run.scored else ""
        self._says(f"{label(run)}  {how}{score}")
        if not self.live:
            print(f"  {self.status()}", file=self.out, flush=True)

    def lost(self, run: Trial) -> None:
        """Its process was lost, and comes again."""
        print(
            f"  {label(run)}  lost     its process, with its node; it goes on from its last checkpoint",
            file=self.out,
            flush=True,
        )
        self.height = 0  # the line stays above what is drawn next

    def close(self) -> None:
        """The last picture stays."""
        if self.live:
            self._draw()
            self.height = 0

    def status(self) -> str:
        """All in one line: what ended how, what goes on, the best, and the time left."""
        counts = {status: sum(run.status == status for run in self.runs.values()) for status in (FINISHED, STOPPED)}
        failed = sum(run.status not in (FINISHED, STOPPED, WAITING) for run in self.runs.values())
        parts = [f"{sum(counts.values())} of {self.wanted} ended ({counts[STOPPED]} stopped, {failed} failed)"]
        parts.append(f"{len(self.going)} running")
        best = max((run for run in self.runs.values() if run.scored), key=lambda run: run.score, default=None)
        parts += [f"best {label(best).strip()} {best.score:.4f}"] if best else []
        left = self.left_s()
        parts += [f"about {duration(left)} left"] if math.isfinite(left) else []
        return ", ".join(parts)

    def left_s(self) -> float:
        """Seconds that the rest takes, by the speed so far; a run that is yet to come takes as many steps as those that
        ended. NaN: nothing is known.
        """
        done = sum(run.step - run.begun for run in self.runs.values()) - self.before
        if done <= 0:
            return math.nan
        ended = [run.step for run in self.runs.values() if run.status in (FINISHED, STOPPED)]
        usual = statistics.mean(ended) if ended else self.steps
        open_runs = [run for run in self.runs.values() if run.status == WAITING]
        steps = sum(max(usual - run.step, 0) for run in open_runs) + usual * max(0, self.wanted - len(self.runs))
        return (time.monotonic() - self.began) / done * steps

    def _knows(self, run: Trial) -> None:
        self.runs[run.name] = run

    def _says(self, line: str) -> None:
        if not self.live:
            print(f"  {line}", file=self.out, flush=True)
        elif time.monotonic() - self.drawn > EVERY_S or not self.going:
            self._draw()

    def _draw(self) -> None:
        order = sorted(self.runs.values(), key=lambda run: (run.name not in self.going, -_known(run.score), run.number))
        lines = [self._row(run) for run in order if run.name in self.going or run.step][:LATEST]
        width = shutil.get_terminal_size().columns - 1  # a line that wraps would be two
        text = "\n".join(line[:width] for line in [*lines, self.status()])
        back = f"\x1b[{self.height}A\x1b[J" if self.height else ""
        print(back + text, file=self.out, flush=True)
        self.height, self.drawn = len(lines) + 1, time.monotonic()

    def _row(self, run: Trial) -> str:
        state = "running" if run.name in self.going else run.status
        score = f"{run.reports[-1][1]:.4f}" if run.reports else "      "
        return f"  {label(run)}  {state:<8}  step {run.step:>6} of {self.steps}  {score}  {shown(run.values)}"


def label(run: Trial) -> str:
    """A run in a few letters."""
    of = "recipe   " if run.number < 0 else f"trial {run.number:>3}"
    return of if run.seed is None else f"{of} seed {run.seed}"


def _known(score: float) -> float:
    return score if math.isfinite(score) else -math.inf


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
