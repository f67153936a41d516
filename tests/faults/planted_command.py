"""A training command with a fault planted in its workers: python tests/faults/planted_command.py FAULT CONFIG

Both are JSON files. It connects to the Ray that RAY_ADDRESS names, and ends as every command does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from inject import Fault, plant

from kmtr.cli import main
from kmtr.config import from_json
from kmtr.ray_start import start_ray


def run(words: list[str]) -> dict[str, Any]:
    from kmtr.train import driver

    fault, config = (Path(word).read_text() for word in words)
    start_ray()
    plant(pytest.MonkeyPatch(), Fault(**json.loads(fault)))
    return {"run_id": driver.fit(from_json(config)).run_id}


if __name__ == "__main__":
    main("usage", run)
