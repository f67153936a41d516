"""Pattern files: every container and order, what is refused, and that training samples what the file says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from cohort import simulated, write
from inside import prepared, shown

from kmtr.config import RunConfig, most_lines, override
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.collate import collate
from kmtr.data.loader.planning import check_shapes
from kmtr.data.sources import patterns as pattern_files
from kmtr.data.sources.patterns import read_pattern
from kmtr.encoder import KSpaceEncoder
from kmtr.physics import sampling
from kmtr.tasks import Preparer
from kmtr.tasks.masked import hidden_lines
from kmtr.types import InputError

CPU = torch.device("cpu")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("save", ["v5", "v7.3", "npy"])
@pytest.mark.parametrize("readout_last", [True, False])
def test_patterns_in_every_container_and_order(
    tmp_path: Path, rng: np.random.Generator, save: str, readout_last: bool
) -> None:
    lines = rng.random((5, 12)) < 0.4
    equal = np.argsort(rng.random((5, 12)), axis=1) < 4  # as many in every frame

    def stored(pattern: np.ndarray) -> Path:
        if save == "npy":
            np.save(tmp_path / "p.npy", pattern)
            return tmp_path / "p.npy"
        path = tmp_path / "p.mat"
        if save == "v5":
            scipy.io.savemat(path, {"mask": pattern.astype(float)})
        else:
            with h5py.File(path, "w") as file:
                file["mask"] = pattern.astype(float)
        return path

    series = np.repeat(lines[..., None], 16, -1)  # t ky kx
    series = series if readout_last else series.T
    frame = np.repeat(lines[0][:, None], 16, 1)
    frame = frame if readout_last else frame.T
    np.testing.assert_array_equal(read_pattern(stored(series)), lines)
    np.testing.assert_array_equal(read_pattern(stored(frame)), lines[0])
    np.testing.assert_array_equal(read_pattern(stored(lines[0])), lines[0])
    np.testing.assert_array_equal(read_pattern(stored(equal if readout_last else equal.T)), equal)


@pytest.mark.parametrize("separator", [",", " ", ", "])
def test_text_has_a_row_per_line_and_a_column_per_frame_or_the_other_way_round(
    tmp_path: Path, rng: np.random.Generator, separator: str
) -> None:
    lines = rng.random((5, 12)) < 0.4
    for pattern in (lines, lines.T):
        rows = [separator.join(str(int(value)) for value in row) for row in pattern]
        (tmp_path / "p.txt").write_text("\n".join(rows) + "\n\n")
        np.testing.assert_array_equal(read_pattern(tmp_path / "p.txt"), lines)
    (tmp_path / "p.txt").write_text("\n".join("1" if value else "0" for value in lines[0]))
    np.testing.assert_array_equal(read_pattern(tmp_path / "p.txt"), lines[0])


def test_patterns_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    for array, said in (
        ((rng.random((12, 16)) < 0.5), "two-dimensional pattern"),
        ((rng.random((3, 12, 16)) < 0.5), "two-dimensional pattern"),
        (np.full((12, 16), 0.5), "zeros and ones"),
        (np.full((12, 16), np.nan), "zeros and ones"),
        (np.ones((2, 3, 12, 16)), "1 to 3 dimensions"),
        (np.ones((12, 12, 12)), "fewer frames"),
        (np.eye(12), "fewer frames"),
        (np.zeros((12, 16)), "only zeros"),
    ):
        np.save(tmp_path / "p.npy", array)
        with pytest.raises(InputError, match=said) as error:
            read_pattern(tmp_path / "p.npy")
        assert "\n" not in str(error.value)
    np.save(tmp_path / "p.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(InputError, match="plain"):
        read_pattern(tmp_path / "p.npy")
    with pytest.raises(InputError, match="found none"):
        read_pattern(tmp_path / "absent.npy")


def test_text_and_headers_that_lie_are_refused(tmp_path: Path) -> None:
    for content, said in (
        ("0,1\n1\n", "as many zeros and ones each"),
        ("0 1 x\n", "as many zeros and ones each"),
        ("", "only zeros"),
        ("0 0\n0 0\n", "only zeros"),
        ("0 2 0\n", "zeros and ones"),
        ("\xff\xfe", "as many zeros and ones each"),
    ):
        (tmp_path / "p.txt").write_text(content, encoding="latin1")
        with pytest.raises(InputError, match=said) as error:
            read_pattern(tmp_path / "p.txt")
        assert "\n" not in str(error.value)
    np.save(tmp_path / "p.npy", np.ones(8))
    content = (tmp_path / "p.npy").read_bytes()
    (tmp_path / "p.npy").write_bytes(content.replace(b"(8,)", b"(1000000000000,)")[:128] + content[128:])
    with pytest.raises(InputError, match="plain"):
        read_pattern(tmp_path / "p.npy")
    with (tmp_path / "p.npy").open("wb") as file:
        file.truncate(pattern_files.MOST_BYTES + 1)
    with pytest.raises(InputError, match="at most 64 MiB"):
        read_pattern(tmp_path / "p.npy")


# In training


@pytest.fixture
def pattern(rng: np.random.Generator) -> np.ndarray:
    """Three frames of 9 lines of 32, the central two always: R = 3.56."""
    order = rng.random((3, 32))
    order[:, 15:17] = -1
    return np.argsort(np.argsort(order, axis=1), axis=1) < 9


@pytest.fixture
def of_file(small: RunConfig, pattern: np.ndarray, tmp_path: Path) -> RunConfig:
    np.save(tmp_path / "pattern.npy", pattern)
    return override(
        small,
        {
            "sampling.family": "file",
            "sampling.file": str(tmp_path / "pattern.npy"),
            "sampling.accelerations": (4,),
            "evaluate.accelerations": (4,),
        },
    )


def test_every_slice_is_sampled_as_the_file_says(of_file: RunConfig, reader: Reader, pattern: np.ndarray) -> None:
    check_shapes(of_file, reader.dataset)
    for epoch in (0, 3):
        batch = collate(reader.samples(range(4)), of_file, epoch=epoch).to(CPU)
        np.testing.assert_array_equal(batch.sampled, np.broadcast_to(pattern[[0, 1, 2, 0]], (4, 3, 4, 32)))
        assert not (hidden_lines(of_file, batch)[0] & ~batch.sampled).any()
        assert float(sampling.true_acceleration(batch.sampled, batch.existing)) == pytest.approx(32 / 9)


def test_accelerations_that_the_file_has_not_are_refused_in_one_line(
    of_file: RunConfig, reader: Reader, tmp_path: Path
) -> None:
    for changes, said in (
        ({"sampling.accelerations": (2, 4)}, "sampling.accelerations: none is drawn .* R = 3.56 and 2 ACS lines; set"),
        ({"evaluate.accelerations": (3,)}, "evaluate.accelerations: none is drawn .* evaluate.accelerations=4, got 3"),
        ({"sampling.file": ""}, "sampling.file: expected a pattern file"),
        ({"sampling.file": str(tmp_path / "absent.npy")}, "found none"),
        ({"sampling.family": "gaussian"}, "sampling.file: not used by sampling.family=gaussian"),
    ):
        with pytest.raises(InputError, match=said) as error:
            check_shapes(override(of_file, changes), reader.dataset)
        assert "\n" not in str(error.value)


def test_a_file_of_other_lines_is_refused(of_file: RunConfig, reader: Reader, tmp_path: Path) -> None:
    np.save(tmp_path / "longer.npy", np.arange(48) % 4 == 0)
    config = override(of_file, {"sampling.file": str(tmp_path / "longer.npy")})
    for use in (lambda: check_shapes(config, reader.dataset), lambda: collate(reader.samples([0]), config)):
        with pytest.raises(InputError, match="expected a pattern of the 32 lines of sax, got 48 lines"):
            use()


def test_the_encoder_takes_all_lines_or_the_file_s(
    of_file: RunConfig, small: RunConfig, tables: dict[str, torch.Tensor]
) -> None:
    study = simulated(0, small)
    encoder, drawing = (KSpaceEncoder(config, None, tables, CPU) for config in (of_file, small))
    np.testing.assert_array_equal(encoder(study), drawing(study))
    assert not np.allclose(encoder(study, acceleration=4), encoder(study), atol=1e-3)
    with pytest.raises(InputError, match=r"set sampling\.accelerations=4"):
        encoder(study, acceleration=2)


# Families in a batch


FAMILIES = ("gaussian-wide", "equispaced", "kt-gaussian-acs")


@pytest.mark.parametrize("family", FAMILIES)
def test_families_reach_the_batch(small: RunConfig, reader: Reader, family: str) -> None:
    config = override(small, {"sampling.family": family})
    check_shapes(config, reader.dataset)
    batch = collate(reader.samples(range(8)), config).to(CPU)
    r = sampling.draw_acceleration((2, 4), config.seed, torch.zeros_like(batch.key), batch.key)
    for row, acceleration in enumerate(r.tolist()):
        counts = batch.sampled[row].sum(-1)
        most = most_lines(32, acceleration, 4, family)
        assert counts.max() <= most
        assert family == "kt-gaussian-acs" or counts.min() == most
    other = collate(reader.samples(range(8)), small).to(CPU)
    assert not batch.sampled.equal(other.sampled)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_do_not_depend_on_how_subjects_are_dealt_or_padded(
    small: RunConfig, reader: Reader, family: str, tmp_path: Path
) -> None:
    config = override(small, {"sampling.family": family})
    whole = collate(reader.samples(range(8)), config, epoch=2).to(CPU)
    for world in (2, 4):
        parts: list[Batch] = [
            collate(reader.samples(range(rank, 8, world)), config, epoch=2).to(CPU) for rank in range(world)
        ]
        for rank, part in enumerate(parts):
            assert part.sampled.equal(whole.sampled[rank::world])
            assert hidden_lines(config, part)[0].equal(hidden_lines(config, whole)[0][rank::world])
    wide = override(config, {"data.matrix": (48, 48)})
    padded = collate(reader.samples(range(8)), wide, epoch=2).to(CPU)
    assert padded.sampled[..., 8:40].equal(whole.sampled)
    assert not padded.sampled[..., :8].any()
    assert not padded.sampled[..., 40:].any()


@pytest.mark.parametrize("family", ["kt-gaussian-acs", "file"])
def test_tokens_are_the_lines_whatever_their_number(
    small: RunConfig, of_file: RunConfig, reader: Reader, tables: dict[str, torch.Tensor], family: str
) -> None:
    config = of_file if family == "file" else override(small, {"sampling.family": family})
    batch = collate(reader.samples(range(8)), config).to(CPU)
    inputs = shown(prepared(Preparer(config, tables, CPU), batch, "align"))
    hidden, _ = hidden_lines(config, batch)
    assert inputs.all_lines is not None
    for tokens, lines in (
        (inputs.lines, batch.sampled & ~hidden),
        (inputs.line_targets, hidden),
        (inputs.all_lines, batch.sampled),
    ):
        assert tokens.lengths.counts.equal(lines.sum((1, 2, 3)))


def test_a_family_that_leaves_too_little_of_a_smaller_view_is_refused(small: RunConfig, tmp_path: Path) -> None:
    write(tmp_path, {"train": [simulated(0, small)]})
    large = {"data.matrix": (64, 64), "sampling.accelerations": (8,), "evaluate.accelerations": (8,)}
    for family, fits in (("equispaced", False), ("gaussian-wide", True), ("kt-gaussian-acs", True)):
        config = override(small, large | {"sampling.family": family})
        if fits:
            check_shapes(config, Dataset.of(str(tmp_path)))
            continue
        with pytest.raises(InputError, match=r"sampling\.accelerations: sax: .*R = 8 leaves 4 of 32 lines"):
            check_shapes(config, Dataset.of(str(tmp_path)))


def test_batches_need_none_of_what_reads_source_files(small: RunConfig) -> None:
    """In a fresh interpreter without those packages and without Ray."""
    code = """
import sys
sys.modules.update({name: None for name in ("h5py", "nibabel", "pydicom", "scipy.io", "ray")})
import torch
from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import pipeline, planning
config = RunConfig.model_validate_json(sys.argv[1])
dataset = Dataset.open(config.data)
plan, reader = planning.plan_of(config, dataset), dataset.reader("train", config.data)
batch = next(pipeline.batches(config, reader, plan, range(1), 0, 1)).to(torch.device("cpu"))
print(len(batch), *sorted(name for name in sys.modules if name.startswith("kmtr.data.sources.")))
"""
    done = subprocess.run([sys.executable, "-c", code, small.model_dump_json()], capture_output=True, text=True)
    of_every_source = " ".join(f"kmtr.data.sources.{name}" for name in ("anatomy", "doubles", "payload", "pseudonyms"))
    assert done.stdout == f"8 {of_every_source}\n", done.stderr
