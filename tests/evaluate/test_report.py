"""What evaluation refuses before it reads a subject."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmtr.config import RunConfig, override
from kmtr.evaluate import report
from kmtr.types import InputError


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_an_encoder_is_refused_in_one_line(small: RunConfig, tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "encoder"
    if there:
        folder.mkdir()
    config = override(small, {"evaluate.encoder": str(folder), "storage.root": str(tmp_path / "runs")})
    with pytest.raises(InputError, match=r"evaluate\.encoder: expected a folder with encoder\.safetensors") as error:
        report.run(config)
    assert str(error.value).endswith(f"got {folder}")
    assert "\n" not in str(error.value)
