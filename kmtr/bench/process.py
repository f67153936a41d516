"""A measured program in a process of its own: its answer, and the peak memory of it and all that it started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from kmtr import machine
from kmtr.types import KmtrError

ROOT = Path(__file__).resolve().parents[2]

SAMPLED_S = 0.25
"""Between two looks at the memory of the processes."""


def ask(command: list[str], request: dict[str, Any], limit_s: float, environment: dict[str, str]) -> tuple[Any, float]:
    """Answer of a program to a request, and the peak memory of it and all that it started, in GiB.

    Raises:
        KmtrError: it failed (its last words) or took longer than `limit_s`.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [*command, json.dumps(request)],
            stdout=out,
            stderr=err,
            cwd=ROOT,
            env=os.environ | environment,
            start_new_session=True,
        )
        peak, end = 0, time.monotonic() + limit_s
        try:
            while process.poll() is None:
                peak = max(peak, machine.family(process.pid))
                if time.monotonic() > end:
                    raise KmtrError(f"took longer than {limit_s:.0f} s")
                time.sleep(SAMPLED_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        err.seek(0)
        if process.returncode:
            words = [line for line in err.read().splitlines() if line.strip()] or [f"status {process.returncode}"]
            raise KmtrError(words[-1])
        return json.loads(out.read().splitlines()[-1]), peak / 2**30
