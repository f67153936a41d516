"""The commands: thin mains over kmtr."""

import importlib.util
import os
import sys

NEEDED = ("numpy", "pydantic", "ray", "torch")


def ensure_packages() -> None:
    """Go on with ``.venv/bin/python`` where a command was started by a Python without the project's packages.

    Ends the process, with one line and status 2, where that does not have them either.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    script = os.path.abspath(sys.argv[0])
    started = os.path.dirname(script) in (os.path.join(root, "jobs"), os.path.join(root, "tune"))
    if not started or all(map(importlib.util.find_spec, NEEDED)):
        return
    python = os.path.join(root, ".venv", "bin", "python")
    if os.path.exists(python) and os.path.realpath(sys.prefix) != os.path.join(os.path.realpath(root), ".venv"):
        os.execv(python, [python, *sys.argv])
    command = os.path.relpath(script, root)
    sys.stderr.write(
        f"error: {sys.executable} lacks the project's packages: run make setup, then .venv/bin/python {command}\n"
    )
    sys.exit(2)


ensure_packages()

from kmtr.cli import main, recipe_config  # noqa: E402

__all__ = ["main", "recipe_config"]
