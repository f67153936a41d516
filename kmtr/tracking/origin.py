"""Where a run comes from: who started it by which command, and the versions and commit of what decides its numbers."""

from __future__ import annotations

import getpass
import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kmtr.types import redact

COMMIT, CHANGED, USER = "KMTR_GIT_COMMIT", "KMTR_GIT_CHANGED", "KMTR_USER"
"""Environment of a job that `make submit` uploads without its git repository, and that runs as the cluster's user."""


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, and the commit of this code where it runs from a git checkout, or was
    submitted from one.
    """
    tags = {}
    for package in ("torch", "ray", "deepspeed", "kmtr"):
        try:
            tags[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue  # a source tree put on the path, or a machine that only evaluates
    commit, changed = _commit()
    return tags | ({"mlflow.source.git.commit": commit, "git.changed": changed} if commit else {})


def started_by() -> dict[str, str]:
    """Tags by which MLflow shows user, source and command of this process."""
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    script = Path(sys.argv[0])
    name = "/".join(script.parts[-2:])
    return {
        "mlflow.user": os.environ.get(USER) or _user(),
        "mlflow.source.name": name,
        "mlflow.source.type": "JOB" if submitted else "LOCAL",
        "command": command(),
    }


def command() -> str:
    """The command as it was typed, without passwords."""
    return redact(shlex.join(["python", "/".join(Path(sys.argv[0]).parts[-2:]), *sys.argv[1:]]))[:5000]


def environment() -> dict[str, str]:
    """Environment variables by which an uploaded job knows its origin."""
    commit, changed = _commit()
    return {USER: _user()} | ({COMMIT: commit, CHANGED: changed} if commit else {})


def main() -> None:
    """Print the runtime environment of a submitted job, JSON; Ray's own settings of it are words, ``NAME=VALUE``."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    sys.stdout.write(json.dumps({"env_vars": given | environment()}))


CODE = (":/*.py", ":/pyproject.toml")
"""Files that decide numbers: a study that adds rows to a file of the checkout has not changed it, nor has a page."""


def _commit() -> tuple[str, str]:
    """Commit of this code, and whether it was changed since, ``true`` or ``false``; empty: not known."""
    here = Path(__file__)
    if _git(here.parent, "ls-files", "--error-unmatch", here.name):  # else: installed inside somebody else's repository
        commit = _git(here.parent, "rev-parse", "HEAD")
        if commit:
            changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no", "--", *CODE)
            return commit, str(bool(changed)).lower()
    return os.environ.get(COMMIT, ""), os.environ.get(CHANGED, "")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        return ""


def _git(folder: Path, *words: str) -> str:
    """Output of a git command; empty: no git, no repository, or the command failed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    main()
