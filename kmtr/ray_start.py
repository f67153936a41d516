"""Ray as every command uses it: the cluster that RAY_ADDRESS names or that a job runs in, else a local one."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kmtr.types import KmtrError, first_line

NAMESPACE = "kmtr"

MAX_BLOCKS = 500
"""Ray Data tasks per graph: enough to overlap, few enough to start in seconds."""

SAY_AFTER_S, GIVE_UP_AFTER_S = 5.0, 60.0
"""Seconds without an answer of RAY_ADDRESS until it is said what is awaited, and until the command ends."""


def start_ray() -> None:
    """Connect to the cluster that RAY_ADDRESS names or that a job runs in, else start a local Ray; both quietly.

    An empty RAY_ADDRESS is none.

    Raises:
        KmtrError: nothing listens at RAY_ADDRESS, or Ray does not start.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if not address:
        os.environ.pop("RAY_ADDRESS", None)  # Ray's own libraries look at it too
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[1]))
    print(f"ray: connecting to {address}" if address else "ray: starting on this machine", flush=True)
    wait_for(address)
    import ray

    began = time.perf_counter()
    try:
        ray.init(
            address=address or None,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
            include_dashboard=None if address else False,
        )
    except Exception as error:  # Ray raises bare ones, as when a node is slow to start
        raise KmtrError(f"ray: {first_line(error)}") from None
    stop_on_sigterm()
    # Of every process that dies Ray prints a paragraph here too, whatever `log_to_driver` says; its logs have it.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    print(f"ray: {described()}, ready in {time.perf_counter() - began:.0f} s", flush=True)


def stop_on_sigterm() -> None:
    """From now on SIGTERM, as `ray job stop` and schedulers send it, ends a command as Ctrl-C does: with one line
    and its run KILLED. Ray's own handler, which it installs when it starts, prints a trace and aborts.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def described() -> str:
    """Size of the cluster as text. Ray must be up."""
    import ray

    have, alive = ray.cluster_resources(), [node for node in ray.nodes() if node["Alive"]]
    return f"{len(alive)} node(s), {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"


def listens(host: str, port: int) -> bool:
    """True if something accepts connections there."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def wait_for(
    address: str,
    *,
    listens: Callable[[str, int], bool] = listens,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return when something listens at ``[ray://]HOST:PORT``; at once for any other address (auto, local, none).

    Ray itself would wait for minutes without a word.

    Raises:
        KmtrError: nothing does after `GIVE_UP_AFTER_S`.
    """
    found = re.fullmatch(r"(?:ray://)?\[?([^/\]]+)\]?:(\d+)", address)
    if found is None:
        return
    host, port, began, said = found[1], int(found[2]), now(), False
    while not listens(host, port):
        waited = now() - began
        if waited >= GIVE_UP_AFTER_S:
            raise KmtrError(
                f"ray: nothing answered at RAY_ADDRESS={address} for {GIVE_UP_AFTER_S:.0f} s; start that cluster, "
                "correct the address, or unset it for a Ray on this machine"
            )
        if waited >= SAY_AFTER_S and not said:
            said = True
            print(f"ray: waiting for {address} (RAY_ADDRESS), up to {GIVE_UP_AFTER_S:.0f} s", flush=True)
        sleep(1.0)


def ray_logs() -> str:
    """Folder of Ray's, DeepSpeed's and torch's chatter; empty: no Ray was used."""
    if "ray" not in sys.modules:
        return ""
    import ray

    if not ray.is_initialized():
        return ""
    node = ray._private.worker._global_node
    return os.path.join(node.get_session_dir_path(), "logs") if node is not None else ""
