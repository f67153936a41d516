"""Sizes that keep the code readable: ``python .ci/shape.py`` prints the largest of each kind and fails on one over.

Code lines are those that hold a token other than a comment or a docstring. Chains of imports are those at the top of
modules. A module counts, its package does not: who imports from a package knows a room by its door, and the chain ends
there. How long the longest is that goes on behind the doors is printed too, without a limit. Standard library only.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kmtr", "jobs", "tune")

FILE, FUNCTION, JOB, CHAIN = 430, 60, 30, 10
"""At most: code lines of a file, of a function, of a file in jobs/; modules in a chain of imports."""

LARGE_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
"""Exceptions, each to be removed: what was over when the limits came. There are to be none."""

SKIPPED = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SKIPPED:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def functions(text: str) -> dict[str, int]:
    """Function -> its code lines, those of functions within it included."""
    lines, found = code_lines(text), {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = len(lines.intersection(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
    return found


def imports(name: str, text: str, modules: set[str], package: bool) -> set[str]:
    """Modules of ours that a module imports when it is imported itself."""
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = name.split(".")[: len(name.split(".")) - node.level + package]
                base = ".".join([*parent, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names}
    return (found & modules) - {name}


def behind_doors(graph: dict[str, set[str]], packages: set[str]) -> dict[str, set[str]]:
    """The graph of the modules where an import from a package is one of all that the package imports.

    Modules of the package itself excepted: they don't depend on its other modules for being in one room.
    """

    def followed(name: str) -> set[str]:
        doors = {other for other in graph[name] & packages if not name.startswith(f"{other}.")}
        return (graph[name] | {module for door in doors for module in graph[door]}) - packages

    return {name: followed(name) for name in graph.keys() - packages}


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest path through modules that import each other; a cycle is followed once."""
    walking: set[str] = set()

    @cache
    def behind(name: str) -> tuple[str, ...]:
        walking.add(name)
        longest = max((behind(other) for other in sorted(graph[name] - walking)), key=len, default=())
        walking.discard(name)
        return (name, *longest)

    return list(max(map(behind, sorted(graph)), key=len))


def main() -> int:
    texts = {p.relative_to(ROOT): p.read_text() for name in PACKAGES for p in sorted((ROOT / name).rglob("*.py"))}
    packages = {path for path in texts if path.name == "__init__.py"}
    names = {path: ".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in texts}
    doors = {names[path] for path in packages}
    whole = {names[p]: imports(names[p], text, set(names.values()), p in packages) for p, text in texts.items()}
    graph = {name: whole[name] - doors for name in whole.keys() - doors}
    files = {str(path): len(code_lines(text)) for path, text in texts.items()}
    lengths = {f"{path}:{name}": n for path, text in texts.items() for name, n in functions(text).items()}
    jobs = {str(path): files[str(path)] for path in texts if path.parts[0] == "jobs"}
    chain = longest_chain(graph)
    wrong = []
    for what, sizes, most, exceptions in (
        ("code lines of a file", files, FILE, LARGE_FILES),
        ("code lines of a function", lengths, FUNCTION, LONG_FUNCTIONS),
        ("code lines of a job", jobs, JOB, set()),
    ):
        largest = max(sizes, key=lambda name: sizes[name])
        print(f"shape: {what}: at most {sizes[largest]} ({largest}), limit {most}, {len(exceptions)} exception(s)")
        wrong += [
            f"{name}: {n} {what}, expected at most {most}"
            for name, n in sizes.items()
            if n > most and name not in exceptions
        ]
        for name in sorted(exceptions):
            if sizes.get(name, 0) <= most:
                print(f"shape: {name} is within the limit now: remove it from the exceptions")
    print(f"shape: chain of imports: {len(chain)} ({' > '.join(chain)}), limit {CHAIN}")
    followed = longest_chain(behind_doors(whole, doors))
    print(f"shape: chain of imports, packages followed: {len(followed)} ({' > '.join(followed)})")
    if len(chain) > CHAIN:
        wrong.append(f"imports: a chain of {len(chain)} modules, expected at most {CHAIN}")
    for line in wrong:
        sys.stderr.write(f"shape: {line}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
