"""What the real DeepSpeed holds and averages in every ZeRO stage, on two workers, in fp32 and bf16, with offload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import processes
import pytest
from one_engine import CASES, SIZES, work

from kmtr.config import RunConfig, override, to_json
from kmtr.doctor.memory import state_bytes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def found(small: RunConfig, folder: Path) -> list[dict[str, dict[str, Any]]]:
    """What each of two workers saw."""
    config = override(small, {"train.workers": 2, "train.accumulation": 2, "data.global_batch": 8})
    processes.run(work, 2, 2, str(folder), to_json(config))
    return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_the_average_is_its_closed_form_and_disturbs_nothing(found: list[dict[str, dict[str, Any]]], name: str) -> None:
    for worker in found:
        seen = worker[name]
        assert seen["moved"] > 1e-3, "the weights must move, else nothing is averaged"
        assert seen["off_by"] < 1e-6
        assert seen["used"] > 1e-3, "inside, the engine computes with the average"
        assert seen["undisturbed"], "training with an average must go as without, bit for bit"


def test_offload_changes_no_number(found: list[dict[str, dict[str, Any]]]) -> None:
    for name in (name for name in CASES if name.endswith("-offload")):
        here = found[0][name]["last"]
        assert here == pytest.approx(found[0][name.removesuffix("-offload")]["last"], rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_doctor_s_estimate_is_what_is_held(found: list[dict[str, dict[str, Any]]], name: str) -> None:
    """Within 5 %: weights that lie across the border of two workers' shares are held by both.

    Under stage 2 whole gradients may still lie there: they are let go when their reduction has ended, which is a
    matter of timing.
    """
    train = CASES[name]
    stage, bf16, offload = train["train.zero_stage"], train["train.bf16"], train["train.offload"]
    estimate = state_bytes(SIZES, 2, stage, bf16, offload=offload, accumulates=True)
    expected = estimate.device + estimate.host
    late = 1.25 * sum(SIZES) * (2 if bf16 else 4) if stage == 2 else 0.0
    for worker in found:
        assert 0.95 * expected <= worker[name]["bytes"] <= 1.05 * expected + late, worker[name]["bytes"] / sum(SIZES)


def test_nothing_is_compiled(found: list[dict[str, dict[str, Any]]], folder: Path) -> None:
    """A build that is killed leaves a lock for which every later run would wait."""
    assert found
    assert not (folder / "compiled").exists()
