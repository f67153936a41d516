"""`COMMAND [RECIPE] --help`: the settings that this command reads, with the recipe's values, on lines that fit."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kmtr.config import RunConfig, flatten, keys, override, typed
from kmtr.config.core import Section
from kmtr.config.help import WIDTH, help_text, kind
from kmtr.config.recipes import RECIPES, named
from kmtr.config.used import USED, settings_of
from kmtr.data.dataset import ingest, simulate

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem: path for path in [*(ROOT / "jobs").glob("*.py"), ROOT / "tune/search.py"] if path.stem[0] != "_"}
KEYS = dict(keys(RunConfig))
each_command = pytest.mark.parametrize("command", sorted(SCRIPTS))


def usage(command: str) -> str:
    return ast.get_docstring(ast.parse(SCRIPTS[command].read_text())) or ""


def shown(text: str) -> dict[str, str]:
    """Key -> value of every setting in a help text; KEY stands for those that a setting has of its own."""
    _, _, settings = text.partition("\nsettings of ")
    return dict(re.findall(r"^  ([\w.]+?)(?:\.KEY)?=(\S*)", settings, re.MULTILINE))


def test_every_command_has_a_row_in_the_table_and_every_row_a_command() -> None:
    assert set(USED) == set(SCRIPTS)


def test_every_setting_is_shown_by_a_command_and_every_row_names_settings() -> None:
    read = {key for command in USED for key, _ in settings_of(command)}
    assert read == set(KEYS)
    names = set(KEYS) | {key.partition(".")[0] for key in KEYS}
    assert not set().union(*USED.values()) - names


@each_command
@pytest.mark.parametrize("recipe", ["", *RECIPES])
def test_help_shows_what_the_command_reads_with_the_recipe_s_values(command: str, recipe: str) -> None:
    text = help_text(usage(command), command, [recipe, "--help"])
    name = named(command, [recipe])
    values = flatten(RECIPES[name]() if name else RunConfig())
    assert shown(text) == {key: typed(values[key]) for key, _ in settings_of(command)}
    assert (f"the values of recipe {name}\n" if name else "with their defaults") in text
    for _, info in settings_of(command):
        assert " ".join(info.description.split()) in " ".join(text.split())
    assert [line for line in text.splitlines() if len(line) > WIDTH] == []
    assert "exit status:" in text
    assert "examples:" in text


def test_recipes_show_different_values_and_commands_different_settings() -> None:
    assert shown(help_text("", "pretrain", ["tiny"]))["model.width"] == "96"
    assert shown(help_text("", "pretrain", []))["model.width"] == "512"
    assert shown(help_text("", "study", ["labels"]))["model.width"] == "96"
    assert not [key for key in shown(help_text("", "pretrain", [])) if key.startswith(("bench.", "study.", "search."))]
    assert "model.width" not in shown(help_text("", "simulate", ["tiny"]))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("data.frames", "integer from 1 to 10000"),
        ("simulate.coils", "integer from 1 to 32"),
        ("masked.steps", "integer from 0"),
        ("masked.mask_ratio", "number above 0 below 1"),
        ("augment.shift", "number from 0 to 0.5"),
        ("augment.rotation_deg", "number from 0 to 180, degrees"),
        ("data.cache_gib", "number above 0, GiB"),
        ("ingest.matrix", "2 integers, or empty"),
        ("data.views", "list of sax | lax_2ch | lax_3ch | lax_4ch"),
        ("train.zero_stage", "0 | 1 | 2 | 3"),
        ("train.workers", "integer or range, as 2..8"),
        ("train.bf16", "true | false"),
    ],
)
def test_a_setting_s_kind_says_choices_bounds_and_unit(key: str, text: str) -> None:
    assert kind(key, KEYS[key]) == text


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_shown_value_is_what_a_command_line_takes(recipe: str) -> None:
    config = RECIPES[recipe]()
    assert override(RunConfig(), {key: typed(value) for key, value in flatten(config).items()}) == config


@each_command
def test_help_imports_nothing_that_takes_seconds(command: str) -> None:
    program = """
import runpy, sys
sys.argv = [sys.argv[1], "tiny", "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
slow = {"torch", "ray", "mlflow", "deepspeed", "pyarrow", "scipy"}
print(*slow.intersection(sys.modules), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(SCRIPTS[command])], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stderr.split() == []
    assert set(shown(done.stdout)) == {key for key, _ in settings_of(command)}


def read_by(monkeypatch: pytest.MonkeyPatch, call: Any) -> set[str]:
    """Dotted keys of the settings that a call reads from a configuration."""
    sections = {type(getattr(RunConfig(), name)): name for name in RunConfig.model_fields}
    found = set()
    plain = Section.__getattribute__

    def noted(self: Section, name: str) -> Any:
        if name in type(self).model_fields:
            found.add(name if type(self) is RunConfig else f"{sections[type(self)]}.{name}")
        return plain(self, name)

    monkeypatch.setattr(Section, "__getattribute__", noted)
    call()
    monkeypatch.undo()
    return found & set(KEYS)


def test_what_simulating_and_ingesting_read_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    small = override(RECIPES["tiny"](), {"simulate.subjects": 2, "data.frames": 4, "data.sax_slices": 1})

    def simulated() -> None:
        simulate.made_by(small)
        simulate.strata(small)
        assert np.isfinite(simulate.simulated(0, small).views["sax"].kspace).all()

    def ingested() -> None:
        ingest.options_of(small)
        ingest.made_by(small, "nifti", [], [])

    for command, call in (("simulate", simulated), ("ingest", ingested)):
        read = read_by(monkeypatch, call)
        assert read
        assert not read - {key for key, _ in settings_of(command)}
