"""Every bad source is refused in one clear line: no traceback, no hang, no crash, little memory.

All are read in one other process whose address space may grow by `ROOM_BYTES` only; many claim or inflate to more.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hostile_images  # noqa: F401  (adds its cases)
import pytest
from hostile_files import CORPUS, Case

from kmtr.data.sources import FORMATS

ROOM_BYTES = 128 << 20
MOST_BYTES = 16 << 20
"""As `Options.most_bytes`."""
MOST_MIB = 32
"""Memory that any may take; measured: 10."""
SECONDS = 20
"""Longer than any takes by a factor of ten, on a busy machine."""

READ_ALL = f"""
import json, pathlib, resource, signal, sys, time
import h5py, ismrmrd, nibabel, pydicom, pydicom.pixels
from kmtr.data.sources import Options, cmrxrecon, dicom, ismrmrd, nifti, read
from kmtr.types import InputError

def late(*_):
    raise SystemExit("hangs")

def kib(what):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(what)).split()[1])

signal.signal(signal.SIGALRM, late)
size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + {ROOM_BYTES},) * 2)
options = Options(most_bytes={MOST_BYTES})
for line in sys.stdin:
    name, format, source = json.loads(line)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
    before, start = kib("VmRSS"), time.monotonic()
    signal.alarm({SECONDS})
    try:
        read(source, options, format=format)
        kind, said = "read", ""
    except Exception as error:
        kind, said = type(error).__name__, str(error)
    signal.alarm(0)
    print(json.dumps([name, kind, said, time.monotonic() - start, (kib("VmHWM") - before) >> 10]), flush=True)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """What the reader answers to each case, by name."""
    asked = []
    for case in CORPUS:
        folder = tmp_path_factory.mktemp(case.name)
        asked.append(json.dumps([case.name, case.format, str(case.build(folder))]))
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL],
        input="\n".join(asked),
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(CORPUS), f"{CORPUS[len(lines)].name} ended the process: {done.stderr[-2000:]}"
    return {name: rest for name, *rest in lines}


def test_the_corpus_is_large_and_its_names_differ() -> None:
    assert len({case.name for case in CORPUS}) == len(CORPUS) >= 40
    assert {case.format for case in CORPUS} == set(FORMATS)


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_refused_in_one_line(case: Case, answers: dict[str, list]) -> None:
    kind, said, seconds, grown_mib = answers[case.name]
    assert kind == "InputError", f"{kind}: {said}"
    assert re.search(case.said, said), said
    assert "\n" not in said
    assert len(said) < 500
    assert seconds < SECONDS / 2
    assert grown_mib < MOST_MIB
