"""Pages tell the truth: commands that they quote parse; keys, make targets, files and links that they name exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from kmtr.config import RunConfig, keys, override, parse
from kmtr.config.recipes import RECIPES
from kmtr.data.sources import FORMATS
from kmtr.types import InputError

ROOT = Path(__file__).parents[1]
FOLDERS = ("kmtr", "jobs", "tune", "cluster", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

KEYS = {key for key, _ in keys(RunConfig)}
SECTIONS = sorted({key.partition(".")[0] for key in KEYS if "." in key})
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
FILE_ENDINGS = ("py", "md", "json", "html", "txt", "yaml")

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(python (jobs|tune)/|make |ray job submit )")


def quoted(page: Path) -> list[str]:
    """Everything in code: each line of a block (continued ones joined), each span in the prose."""
    text = page.read_text()
    lines = [line for language, block in BLOCK.findall(text) if language != "python" for line in joined(block)]
    return lines + [" ".join(span.split()) for span in SPAN.findall(BLOCK.sub("", text))]


def joined(block: str) -> list[str]:
    return re.sub(r"\\\n\s*", "", block).splitlines()


def check(words: list[str]) -> None:
    """A command as it is typed, held against what it would run.

    Raises:
        InputError: a key or value that the command would refuse.
        AssertionError: no such file, target, format or kind.
    """
    if words[0] == "make":
        check_make(words[1:])
    elif words[0] == "ray":
        check(words[words.index("--") + 1 :])
    else:
        check_script(words[1], words[2:])


def check_make(words: list[str]) -> None:
    given = dict(word.split("=", 1) for word in words if "=" in word)
    targets = [word for word in words if "=" not in word]
    assert targets, "make: expected a target"
    assert set(targets) <= TARGETS, f"make: expected targets of {sorted(TARGETS)}, got {targets}"
    parse(shlex.split(given.get("ARGS", "")), "tiny", RECIPES)
    if job := shlex.split(given.get("JOB", "")):
        folder = next(f for f in ("jobs", "tune") if (ROOT / f / f"{job[0]}.py").is_file())
        check_script(f"{folder}/{job[0]}.py", job[1:])


def check_script(script: str, words: list[str]) -> None:
    path = ROOT / script
    assert path.is_file(), f"no {script}"
    if words[-1:] == ["--help"]:
        words = words[:-1]
        if not words:
            return
    if path.stem == "ingest":
        kind, source, *words = words
        assert kind in FORMATS, f"{script}: expected a format of {', '.join(FORMATS)}, got {kind}"
        assert "=" not in source, f"{script}: expected SOURCE, got {source}"
        override(RunConfig(), dict(word.split("=", 1) for word in words))
        return
    if path.stem == "predict":
        model, *words = words
        assert "=" not in model, f"{script}: expected MODEL, got {model}"
        override(RunConfig(), dict(word.split("=", 1) for word in words))
        return
    if path.stem in ("study", "bench", "export"):
        kind, *words = words
        assert f"python {script} {kind} " in path.read_text(), f"{script}: its help has no {kind}"
        words = words if words and "=" not in words[0] else ["tiny", *words]
    if words or path.stem != "doctor":
        parse(words[1:], words[0], RECIPES)


@each_page
def test_commands_parse(page: Path) -> None:
    for line in quoted(page):
        if COMMAND.match(line):
            check(shlex.split(line, comments=True))


@pytest.mark.parametrize(
    "script", [*(ROOT / "jobs").glob("[!_]*.py"), ROOT / "tune/search.py"], ids=lambda path: path.stem
)
def test_examples_of_help_parse(script: Path) -> None:
    _, _, examples = (ast.get_docstring(ast.parse(script.read_text())) or "").partition("examples:\n")
    assert examples
    for line in examples.splitlines():
        words = shlex.split(line)
        assert words[:2] == ["python", str(script.relative_to(ROOT))]
        check(words)


@pytest.mark.parametrize(
    "line",
    [
        "python jobs/pretrain.py huge",
        "python jobs/pretrain.py tiny masked.steps=many",
        "python jobs/pretrain.py tiny stage=b",
        "python jobs/ingest.py nifti FOLDER data.rot=runs/sb",
        "python tune/search.py tiny search.trial=16",
        'make demo ARGS="reconstruct.steps=400"',
        'make submit JOB="pretrain tiny simulate.difficulty=odd"',
        "ray job submit --working-dir . -- python jobs/pretrain.py base train.workers=none",
    ],
)
def test_what_a_command_would_refuse_is_found(line: str) -> None:
    assert COMMAND.match(line)
    with pytest.raises(InputError):
        check(shlex.split(line))


@pytest.mark.parametrize(
    "line",
    ["python jobs/train.py tiny", "python jobs/study.py few tiny", "python jobs/ingest.py png FOLDER", "make install"],
)
def test_what_does_not_exist_is_found(line: str) -> None:
    assert COMMAND.match(line)
    with pytest.raises(AssertionError):
        check(shlex.split(line))


@each_page
def test_named_keys_exist(page: Path) -> None:
    named = re.compile(rf"(?<![\w./-])((?:{'|'.join(SECTIONS)})\.(\w+))")
    found = {key for text in quoted(page) for key, ending in named.findall(text) if ending not in FILE_ENDINGS}
    assert not found - KEYS


@each_page
def test_named_files_exist(page: Path) -> None:
    path = re.compile(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)")
    found = {name for text in quoted(page) for name in path.findall(text)}
    assert not [name for name in found if not (ROOT / name).exists()]


@each_page
def test_relative_links_lead_to_a_file_and_its_heading(page: Path) -> None:
    for link in LINK.findall(BLOCK.sub("", page.read_text())):
        target, _, heading = link.partition("#")
        if "://" in target:
            continue
        file = page if not target else page.parent / target
        assert file.exists(), f"{link}: no such file"
        assert not heading or heading in anchors(file), f"{link}: no such heading"


def anchors(page: Path) -> set[str]:
    """Headings as links name them: lower case, punctuation gone, blanks as hyphens."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
