"""A command started by a Python without the project's packages goes on with the project's, or says what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The commands alone, in a folder of their own."""
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def bare(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command by a Python that sees the standard library only."""
    command = [sys.executable, "-S", "-E", *words]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


def test_without_the_project_s_python_one_line_says_what_to_do(project: Path) -> None:
    done = bare(project, "jobs/pretrain.py", "tiny")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.endswith("lacks the project's packages: run make setup, then .venv/bin/python jobs/pretrain.py")


def test_the_project_s_python_goes_on_with_the_same_words(project: Path) -> None:
    python = project / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho went on with "$@"\n')
    python.chmod(0o755)
    done = bare(project, "jobs/pretrain.py", "tiny", "seed=1")
    assert done.stdout == "went on with jobs/pretrain.py tiny seed=1\n"
    assert done.returncode == 0, done.stderr
