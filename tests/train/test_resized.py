"""A run that goes on with other workers, in another ZeRO stage, or after a gradient that was not finite.

Every restart is a new engine with other initial weights, so what a checkpoint lacks shows. Masked reconstruction and
alignment, EMA on; three legs, the second of which crosses from the one stage into the other. By default each ZeRO
stage (1 in the chain of four legs), precision, offload and accumulation comes at least once; `full` adds the others.

    KMTR_TABLE=table.json python -m pytest tests/train/test_resized.py      writes the table of the results page
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from legs import Leg, Steps, keep, run, spread
from safetensors.torch import load_file

from kmtr.config import RunConfig, override, to_json
from kmtr.train import checkpoint, state
from kmtr.types import InputError

pytestmark = pytest.mark.slow

STEPS = {
    "masked.steps": 8,
    "masked.warmup_steps": 2,
    "align.steps": 4,
    "align.warmup_steps": 1,
    "align.train_image_encoder": True,
    "optimizer.ema": 0.9,
}
ENDS = (6, 9, 12)
CASES: dict[str, dict[str, Any]] = {
    f"zero{stage}-{'bf16' if bf16 else 'fp32'}": {"train.zero_stage": stage, "train.bf16": bf16}
    for bf16 in (False, True)
    for stage in range(4)
}
CASES |= {
    f"zero{stage}-fp32-offload": {"train.zero_stage": stage, "train.bf16": False, "train.offload": True}
    for stage in (1, 2, 3)
}
CASES |= {f"zero{stage}-fp32-accumulation": {"train.zero_stage": stage, "train.accumulation": 2} for stage in (0, 2)}
CASES |= {"zero2-bf16-accumulation": {"train.zero_stage": 2, "train.bf16": True, "train.accumulation": 2}}
FEW = ("zero0-fp32", "zero2-bf16-accumulation", "zero3-fp32-offload")
"""Cases that run by default: both precisions, offload and accumulation."""
POISONED = ("zero0-fp32", "zero1-fp32-offload", "zero3-fp32-offload", "zero1-fp32", "zero2-fp32", "zero3-fp32")
"""Cases of a gradient that is not finite."""
CHAIN = ((0, 2), (3, 1), (1, 2), (2, 4))
"""(ZeRO stage, workers) of four legs of three steps."""


def params(names: Iterable[str]) -> list[Any]:
    """Cases for a test, those beyond `FEW` marked."""
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.full) for name in names]


@dataclass(frozen=True)
class Found:
    """Logged values of all legs, by name, the folder with their checkpoints, and the names of the cases."""

    steps: dict[str, Steps]
    folder: Path
    cases: list[str]

    def resumed(self, name: str, legs: str) -> Steps:
        """Steps of the three legs of a case."""
        return [step for leg in legs for step in self.steps[f"{name}-{leg}"]]


def legs_of(config: RunConfig, folder: Path, cases: Sequence[str]) -> dict[str, list[Leg]]:
    """Legs by the round that they run in: 2a, 1, 2b and 4, one after the other."""
    rounds: dict[str, list[Leg]] = {"2a": [], "1": [], "2b": [], "4": []}

    def place(name: str) -> str:
        return str(folder / "checkpoints" / name)

    for name in cases:
        text = to_json(override(config, CASES[name]))
        first, second, last = ENDS
        rounds["2a"] += [
            Leg(f"{name}-two", text, 0, last),
            Leg(f"{name}-a", text, 0, first, target=place(f"{name}-a")),
            Leg(f"{name}-b", text, first, second, place(f"{name}-a"), place(f"{name}-b"), seed=1),
            Leg(f"{name}-c", text, second, last, place(f"{name}-b"), seed=2),
        ]
        rounds["1"] += [
            Leg(f"{name}-one", text, 0, last),
            Leg(f"{name}-B", text, first, second, place(f"{name}-a"), place(f"{name}-B"), seed=3),
        ]
        rounds["2b"].append(Leg(f"{name}-C", text, second, last, place(f"{name}-B"), seed=4))
    for number, (stage, workers) in enumerate(CHAIN):
        where = {0: "2a", 1: "1", 2: "2b", 3: "4"}[number]
        text = to_json(override(config, {"train.zero_stage": stage, "train.workers": workers}))
        source = place(f"chain-{number - 1}") if number else ""
        rounds[where].append(
            Leg(f"chain-{number}", text, 3 * number, 3 * number + 3, source, place(f"chain-{number}"), seed=number)
        )
    for name in (name for name in POISONED if name in cases):
        base = override(config, CASES[name])
        skipping = to_json(override(base, {"train.on_nonfinite": "skip"}))
        source = place(f"{name}-a")
        rounds["2b"] += [
            Leg(f"stopped-{name}", to_json(base), 6, 9, source, seed=5, poisoned=7),
            Leg(f"again-{name}", to_json(base), 6, 9, source, seed=6),
            Leg(f"before-{name}", skipping, 6, 7, source, place(f"before-{name}"), seed=7),
            Leg(f"skipped-{name}", skipping, 6, 8, source, place(f"skipped-{name}"), seed=8, poisoned=7),
            Leg(f"onward-{name}", skipping, 8, 9, place(f"skipped-{name}"), seed=9),
        ]
    return rounds


@pytest.fixture(scope="module")
def config(small: RunConfig) -> RunConfig:
    return override(small, STEPS | {"train.workers": 2, "data.global_batch": 8})


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest,
    config: RunConfig,
    tables: dict[str, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Found:
    folder = tmp_path_factory.mktemp("resized")
    asked = [item for item in request.session.items if item.path == request.path]
    cases = [*CASES] if any(item.get_closest_marker("full") for item in asked) else [*FEW]
    keep(tables, folder)
    steps: dict[str, Steps] = {}
    for place, legs in legs_of(config, folder, cases).items():
        steps |= run(folder, int(place[0]), legs)
    found = Found(steps, folder, cases)
    if path := os.environ.get("KMTR_TABLE"):
        Path(path).write_text(json.dumps(table(found), indent=1))
    return found


def table(found: Found) -> dict[str, dict[str, float]]:
    """What the results page shows of each case: largest relative difference of all logged values, and of the loss."""
    rows = {}
    for name in found.cases:
        two, one = found.steps[f"{name}-two"], found.steps[f"{name}-one"]
        same, resized = found.resumed(name, "abc"), found.resumed(name, "aBC")
        rows[name] = {"2->2->2": spread(same, two), "2->1->2": spread(resized, two), "1 against 2": spread(one, two)}
        rows[name] |= {
            f"loss, {k}": spread(v, two, ["loss", "kspace_loss"])
            for k, v in (("2->1->2", resized), ("1 against 2", one))
        }
    chain = [step for number in range(4) for step in found.steps[f"chain-{number}"]]
    rows["chain"] = {"against 2 workers": spread(chain, found.steps["zero0-fp32-two"])}
    return rows


@pytest.mark.parametrize("name", params(CASES))
def test_the_same_workers_go_on_bit_for_bit(found: Found, name: str) -> None:
    whole = found.steps[f"{name}-two"]
    assert len({step.get("loss", step["kspace_loss"]) for step in whole}) == len(whole), "the losses must move"
    assert found.resumed(name, "abc") == whole


@pytest.mark.parametrize("name", params(CASES))
def test_another_number_of_workers_goes_on_as_if_it_had_never_changed(found: Found, name: str) -> None:
    """Within what one worker and two differ by when nothing is resized: sums in another order."""
    two, one = found.steps[f"{name}-two"], found.steps[f"{name}-one"]
    resized = found.resumed(name, "aBC")
    losses = ["kspace_loss", "image_loss", "infonce_static", "infonce_dynamic"]
    if "fp32" in name:
        assert spread(resized, two) <= max(2 * spread(one, two), 1e-5)
        assert spread(resized, two) < 1e-4
    else:
        assert spread(resized, two, losses) <= max(2 * spread(one, two, losses), 1e-3)


def test_stages_and_workers_in_a_chain(found: Found) -> None:
    chain = [step for number in range(len(CHAIN)) for step in found.steps[f"chain-{number}"]]
    assert spread(chain, found.steps["zero0-fp32-two"]) < 1e-4


@pytest.mark.parametrize("name", params(name for name in CASES if "bf16" in name))
def test_bf16_is_within_a_hundredth_of_fp32(found: Found, name: str) -> None:
    for workers in ("one", "two"):
        losses = ["kspace_loss", "image_loss"]
        assert spread(found.steps[f"{name}-{workers}"], found.steps[f"zero0-fp32-{workers}"], losses) < 0.01


@pytest.mark.parametrize("name", params(POISONED))
def test_a_gradient_that_is_not_finite_stops_before_it_changes_anything(found: Found, name: str) -> None:
    two = found.steps[f"{name}-two"]
    *sound, last = found.steps[f"stopped-{name}"]
    assert last == {"refused": 1.0}
    assert sound == two[6:7]
    assert found.steps[f"again-{name}"] == two[6:9], "the checkpoint before it must resume"


@pytest.mark.parametrize("name", params(POISONED))
def test_a_step_that_is_skipped_leaves_everything_as_it_was(found: Found, name: str) -> None:
    two, places = found.steps[f"{name}-two"], found.folder / "checkpoints"
    before, after = places / f"before-{name}", places / f"skipped-{name}"
    assert [step["applied"] for step in found.steps[f"skipped-{name}"]] == [1.0, 0.0]
    assert found.steps[f"skipped-{name}"][1]["kspace_loss"] == two[7]["kspace_loss"], "its loss is finite"
    for path in checkpoint.states(before):
        ours, theirs = load_file(path), load_file(after / path.name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with state.Pieces(checkpoint.states(before)) as a, state.Pieces(checkpoint.states(after)) as b:
        assert a.updates == b.updates == 7
    head = checkpoint.read_head(after)["progress"]
    assert (head["step"], head["skipped"]) == (8, 1)
    (onward,) = found.steps[f"onward-{name}"]
    assert onward["applied"] == 1.0
    assert onward["kspace_loss"] != two[8]["kspace_loss"]


def test_pieces_cover_every_weight_once(found: Found) -> None:
    for name in found.cases:
        folder = found.folder / "checkpoints" / f"{name}-a"
        model = checkpoint.read_head(folder)["model"]
        held: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for path in checkpoint.states(folder):
            for key, piece in load_file(path).items():
                kind, start, weight = key.split(":", 2)
                assert piece.dtype is torch.float32
                held.setdefault((kind, weight), []).append((int(start), len(piece)))
        assert held.keys() == {(kind, w) for kind in (*state.MOMENTS, state.WEIGHT, state.AVERAGE) for w in model}
        for (_, weight), parts in held.items():
            end = 0
            for start, size in sorted(parts):
                assert start == end
                end = start + size
            assert end == int(torch.tensor(model[weight]).prod())


def test_the_encoder_is_made_of_the_pieces(
    found: Found, config: RunConfig, tables: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """All stages export the same weights, and the average where there is one."""
    from kmtr.encoder import load_encoder

    folder = found.folder / "checkpoints" / "zero3-fp32-offload-a"
    averages = {}
    for ema in (0.9, 0.0):
        checkpoint.export_encoder_from(folder, tmp_path / str(ema), override(config, {"optimizer.ema": ema}), tables)
        averages[ema] = load_encoder(tmp_path / str(ema)).module.state_dict()
    model = checkpoint.read_head(folder)["model"]
    plain = state.whole(
        checkpoint.states(found.folder / "checkpoints" / "zero0-fp32-a"), "weight", model, "systems.kspace"
    )
    assert set(plain) <= set(averages[0.0])
    for name, weight in plain.items():
        torch.testing.assert_close(averages[0.0][name], weight, rtol=1e-4, atol=1e-6)
        assert averages[0.9][name].shape == weight.shape
    assert any(not torch.equal(averages[0.9][name], averages[0.0][name]) for name in plain)


@pytest.fixture
def copy(found: Found, tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    target = tmp_path / "checkpoint"
    target.mkdir()
    for file in (found.folder / "checkpoints" / "zero3-fp32-offload-a").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def refused(folder: Path, config: RunConfig, shapes: dict[str, list[int]]) -> str:
    """The one line that a worker of two, whichever it is, is refused with."""
    lines = []
    for rank in range(2):
        try:
            checkpoint.verify(folder, shapes, config, rank, 2)
        except checkpoint.CheckpointError as error:
            lines.append(str(error))
    assert lines, "nothing was refused"
    assert all("\n" not in line for line in lines)
    return lines[0]


def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(copy: Path, config: RunConfig) -> None:
    head = json.loads((copy / checkpoint.HEAD).read_text())
    model = head["model"]
    name = next(iter(model))
    other = model | {name: [3, *model[name][1:]]}
    assert f"expected {name} of shape [3" in refused(copy, config, other)
    assert "expected new.weight of shape [2]" in refused(copy, config, model | {"new.weight": [2]})
    (copy / "state-rank01.safetensors").write_bytes((copy / "state-rank01.safetensors").read_bytes()[:-1] + b"!")
    assert "state-rank01.safetensors is missing or changed" in refused(copy, config, model)
    (copy / "sha256-rank01.json").unlink()
    assert "expected the files of 2 workers, got those of 1" in refused(copy, config, model)
    (copy / checkpoint.HEAD).write_text(json.dumps(head | {"ema": False}))
    with pytest.raises(checkpoint.CheckpointError, match=r"^optimizer\.ema: expected 0"):
        checkpoint.fitting(copy, model, config)
    (copy / checkpoint.HEAD).write_text(json.dumps(head | {"format": 0}))
    assert refused(copy, config, model).startswith("checkpoint: expected format 1, got 0; start anew")
    (copy / checkpoint.HEAD).write_text(json.dumps({name: head[name] for name in head if name != "format"}))
    assert "got that of an earlier version; start anew with run.fresh=true" in refused(copy, config, model)
    (copy / checkpoint.HEAD).unlink()
    assert refused(copy, config, model) == "checkpoint: checkpoint.json is missing or damaged; refused"


def test_a_missing_piece_is_named(copy: Path) -> None:
    model = checkpoint.read_head(copy)["model"]
    with pytest.raises(
        checkpoint.CheckpointError, match=r"^checkpoint: weight of .*expected \d+ numbers from 0 on, found"
    ):
        state.whole([copy / "state-rank00.safetensors"], "weight", model, "systems.kspace")


def test_offload_needs_a_sharded_optimizer(small: RunConfig) -> None:
    with pytest.raises(InputError, match=r"^train\.offload: expected train\.zero_stage of 1, 2 or 3, got 0") as error:
        override(small, {"train.offload": True, "train.zero_stage": 0})
    assert "\n" not in str(error.value)
