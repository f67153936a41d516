"""What every command shares: arguments, one-line errors, exit status, Ray, and the last line on stdout (JSON)."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from kmtr.config import RunConfig, keys, parse
from kmtr.config.recipes import RECIPES
from kmtr.types import InputError, KmtrError

NAMESPACE = "kmtr"


def main(
    usage: str, run: Callable[[list[str]], dict[str, Any]], failed: Callable[[dict[str, Any]], bool] | None = None
) -> None:
    """Run a command: `run(words)` returns what the last line on stdout says.

    Args:
        failed: whether a result, told in full, is nevertheless a failure (exit status 1).

    Exit status 0; 1 (failed) and 2 (bad input) with one line on stderr and no traceback.
    """
    words = sys.argv[1:]
    if "-h" in words or "--help" in words:
        print(help_text(usage))
        return
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("kmtr").setLevel(logging.WARNING)  # our own warnings are one line each, on stderr
    try:
        result = run(words)
    except InputError as error:
        _fail(str(error), 2)
    except KmtrError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from what is done", 1)
    logs = ray_logs()
    if logs:
        print(f"logs of all workers: {logs}")
    print(json.dumps(result), flush=True)
    if failed is not None and failed(result):
        sys.exit(1)


def _fail(line: str, status: int) -> None:
    print(f"error: {' '.join(line.split())}", file=sys.stderr, flush=True)
    logs = ray_logs()
    if status == 1 and logs:
        print(f"logs of all workers: {logs}", file=sys.stderr, flush=True)
    sys.exit(status)


def help_text(usage: str) -> str:
    """Usage, recipes, and every key with its default and meaning."""
    lines = [usage.strip(), "", "recipes:"]
    lines += [f"  {name:<8}{(recipe.__doc__ or '').strip()}" for name, recipe in RECIPES.items()]
    lines += ["", "keys (defaults of the dataclass; a recipe may set others, shown when a command starts):"]
    for key, info in keys(RunConfig):
        default = info.get_default(call_default_factory=True)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        lines.append(f"  {key:<30}{shown or '-':<28}{info.description or ''}")
    return "\n".join(lines)


def recipe_config(words: Sequence[str], usage: str) -> RunConfig:
    """The configuration of ``RECIPE key=value ...``."""
    if not words or "=" in words[0]:
        raise InputError(f"expected RECIPE first, one of {', '.join(RECIPES)}; usage: {usage}")
    config = parse(words[1:], words[0], RECIPES)
    refuse_relative_under_submit(config)
    return config


def refuse_relative_under_submit(config: RunConfig) -> None:
    """Under ``ray job submit`` the working directory is a throwaway upload: relative paths would be lost with it."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return
    tracking = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    paths = [("data.root", config.data.root), ("storage.root", config.storage.root)]
    optional = {
        "sampling.file": config.sampling.file,
        "shards.split_from": config.shards.split_from,
        "ingest.labels": config.ingest.labels,
    }
    paths += [(key, path) for key, path in optional.items() if path]
    if tracking.startswith("sqlite:///") and not tracking.startswith("sqlite:////"):
        paths.append(("tracking.uri", tracking.removeprefix("sqlite:///")))
    for key, path in paths:
        if "://" not in path and not os.path.isabs(path):
            raise InputError(
                f"{key}: expected an absolute path under ray job submit, since the working directory is a throwaway "
                f"upload, got {path!r}; use make submit, or pass {key}=/absolute/path"
            )


def start_ray() -> None:
    """Connect to the cluster that RAY_ADDRESS names or that a job runs in, else start a local Ray; both quietly."""
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("PYTHONPATH", _root())
    import ray

    if ray.is_initialized():
        return
    began = time.perf_counter()
    try:
        ray.init(
            address=os.environ.get("RAY_ADDRESS"),
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
            include_dashboard=None if "RAY_ADDRESS" in os.environ else False,
        )
    except Exception as error:  # Ray raises bare ones, as when a node is slow to start
        raise KmtrError(f"ray: {str(error).splitlines()[0]}") from None
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    resources = ray.cluster_resources()
    print(
        f"ray: {len(ray.nodes())} node(s), {resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs, "
        f"ready in {time.perf_counter() - began:.0f} s",
        flush=True,
    )


def ray_logs() -> str:
    """Folder of Ray's, DeepSpeed's and torch's chatter; empty: no Ray was used."""
    if "ray" not in sys.modules:
        return ""
    import ray

    if not ray.is_initialized():
        return ""
    node = ray._private.worker._global_node
    return os.path.join(node.get_session_dir_path(), "logs") if node is not None else ""


def _root() -> str:
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Bar:
    """Progress of counted work: a bar on a terminal, a line every tenth elsewhere."""

    def __init__(self, what: str):
        self.what, self.began, self.tenth = what, time.perf_counter(), -1

    def __call__(self, done: int, total: int) -> None:
        seconds = time.perf_counter() - self.began
        text = f"{self.what} {done}/{total}  {done / max(seconds, 1e-9):.1f}/s"
        if sys.stdout.isatty():
            filled = int(30 * done / total)
            end = "\n" if done == total else ""
            print(f"\r\033[K[{'#' * filled}{'.' * (30 - filled)}] {text}", end=end, flush=True)
        elif (tenth := 10 * done // total) > self.tenth:
            self.tenth = tenth
            print(f"  {text}", flush=True)
