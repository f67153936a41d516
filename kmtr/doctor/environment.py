"""Checks of this machine: versions, compiler, Ray."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kmtr.doctor.check import Check, first_line
from kmtr.ray_start import described, start_ray

SAME_EVERYWHERE = ("torch", "ray", "deepspeed", "pyarrow", "numpy", "mlflow")


def versions(project: Path) -> Check:
    """Python and the pinned packages against ``pyproject.toml``."""
    meta = tomllib.loads(project.read_text())["project"]
    have, wrong = [f"Python {platform.python_version()}"], []
    if not SpecifierSet(meta["requires-python"]).contains(platform.python_version(), prereleases=True):
        wrong.append(f"Python {meta['requires-python']}, got {platform.python_version()}")
    for requirement in map(Requirement, meta["dependencies"]):
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement}, not installed")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement}, got {found}")
        if requirement.name in SAME_EVERYWHERE:
            have.append(f"{requirement.name} {found}")
    if wrong:
        return Check("versions", "FAIL", f"expected {'; '.join(wrong)}: make setup")
    return Check("versions", "ok", ", ".join(have))


def compiler() -> Check:
    """Check for the C++ compiler with which `train.compile` builds its kernels; nothing else needs one."""
    cxx = os.environ.get("CXX", "c++")
    found = first_line(cxx, "--version")
    if found is None:
        return Check("compiler", "warn", f"{cxx} not found on PATH: train.compile=true needs it (g++, clang or CXX)")
    return Check("compiler", "ok", found)


def cluster() -> Check:
    """Ray, started here if no cluster is named."""
    import ray

    start_ray()
    found = described()
    if dead := sum(not node["Alive"] for node in ray.nodes()):
        return Check("ray", "warn", f"{found}; {dead} node(s) were lost since it started: see ray status")
    return Check("ray", "ok", found)
