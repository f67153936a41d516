"""A measured program in a process of its own: its answer, and the peak memory of it and all that it started."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from kmtr.types import KmtrError

ROOT = Path(__file__).resolve().parents[1]

SAMPLED_S = 0.25
"""Between two looks at the memory of the processes."""


def ask(command: list[str], request: dict[str, Any], limit_s: float, environment: dict[str, str]) -> tuple[Any, float]:
    """What a program answers to a request, and the peak memory of it and all that it started, in GiB.

    Raises:
        KmtrError: it failed (its last words) or took longer than `limit_s`.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        shared = shared_memory()
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
                private, mapped = tree_memory(process.pid)
                peak = max(peak, private + max(mapped, shared_memory() - shared))
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


def tree_memory(root: int) -> tuple[int, int]:
    """Memory of a process and its descendants in bytes, each shared page counted once: not shared-memory pages, those.

    Where the system does not tell (no ``/proc``), 0.
    """
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it has just ended
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    private = mapped = 0
    queue = [root]
    while queue:
        process = queue.pop()
        queue += children.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        fields = {line.split()[0]: int(line.split()[1]) << 10 for line in lines[1:]}
        private += fields["Pss:"] - fields["Pss_Shmem:"]
        mapped += fields["Pss_Shmem:"]
    return private, mapped


def shared_memory() -> int:
    """Bytes in use in ``/dev/shm``, by anybody."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return 0
    return usage.used
