"""All checks in order, a line for each: what the command doctor does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kmtr.config import RunConfig, override
from kmtr.data.dataset import storage
from kmtr.doctor import cluster, environment, recipe
from kmtr.doctor.check import Check, guarded, summary


def absolute(config: RunConfig) -> RunConfig:
    roots = {"data.root": config.data.root, "storage.root": config.storage.root}
    return override(config, {key: storage.absolute(root) for key, root in roots.items()})


def run(config: RunConfig | None) -> dict[str, Any]:
    """Check the environment and, where there is one, a recipe; a line for each, as soon as it is known.

    Returns:
        What the last line on stdout says: see `check.summary`.
    """
    config = absolute(config) if config is not None else None
    done: list[Check] = []

    def tell(name: str, check: Callable[[], Check]) -> Check:
        found = guarded(name, check)
        done.append(found)
        print(f"  {found.state:<5} {found.name:<9} {' '.join(found.found.split())}", flush=True)
        return found

    tell("versions", lambda: environment.versions(Path(__file__).parents[2] / "pyproject.toml"))
    tell("compiler", environment.compiler)
    reached = tell("ray", environment.cluster).state != "FAIL"
    if config is not None:
        said = cluster.look_everywhere(config) if reached else cluster.look_here(config)
        if reached:
            tell("room", lambda: cluster.room(config))
        tell("storage", lambda: cluster.storage_shared(config, said))
        tell("nodes", lambda: cluster.nodes_alike(config, said))
        tell("tracking", lambda: recipe.tracking_store(config))
        if (
            tell("dataset", lambda: recipe.dataset(config)).state != "FAIL"
            and tell("shapes", lambda: recipe.shapes(config)).state != "FAIL"
        ):
            tell("plan", lambda: recipe.plan(config))
        tell("memory", lambda: recipe.memory(config, said))
        tell("disk", lambda: recipe.disk(config))
    return summary(done)
