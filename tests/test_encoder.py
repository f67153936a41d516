"""An exported encoder stands on its own: same numbers, no Ray, DeepSpeed or MLflow, no pickle, errors of one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cohort import simulated
from torch import Tensor

import kmtr
from kmtr.config import RunConfig, override
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.collate import collate
from kmtr.encoder import KSpaceEncoder, embed_all, load_encoder
from kmtr.exported import HEAD, WEIGHTS, export_encoder
from kmtr.model.encoder import line_encoder
from kmtr.physics import sampling
from kmtr.types import InputError, Study, View

Tables = dict[str, Tensor]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(small: RunConfig) -> dict[str, Tensor]:
    """Not the initial ones."""
    torch.manual_seed(5)
    return line_encoder(small.data, small.model).state_dict()


@pytest.fixture(scope="module")
def folder(
    small: RunConfig, tables: Tables, weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("run") / "encoder"
    export_encoder(path, small, weights, tables)
    return path


@pytest.fixture(scope="module")
def study(small: RunConfig) -> Study:
    return simulated(40, small)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "encoder"))


def test_a_round_trip_gives_the_same_embeddings(
    small: RunConfig, tables: Tables, weights: dict[str, Tensor], folder: Path, study: Study, batch: Batch
) -> None:
    before, after = KSpaceEncoder(small, weights, tables, CPU), load_encoder(folder)
    assert torch.equal(before.embed(batch), after.embed(batch))
    np.testing.assert_array_equal(before(study), after(study))
    np.testing.assert_array_equal(before(study, acceleration=4), after(study, acceleration=4))
    assert after(study).shape == (3 * 3 * small.model.width,)  # per slice: static, and cosine and sine
    assert after(study).dtype == np.float32
    for section in ("sampling", "model", "seed"):
        assert getattr(after.config, section) == getattr(small, section)
    assert after.config.data.view_types == small.data.view_types


@pytest.mark.parametrize("inputs", ["zerofilled", "both"])
def test_an_encoder_of_zero_filled_images_stands_alone_too(
    small: RunConfig, tables: Tables, study: Study, batch: Batch, inputs: str, tmp_path: Path
) -> None:
    config = override(small, {"model.encoder_inputs": inputs})
    torch.manual_seed(5)
    weights = line_encoder(config.data, config.model).state_dict()
    export_encoder(tmp_path, config, weights, tables)
    before, after = KSpaceEncoder(config, weights, tables, CPU), load_encoder(tmp_path)
    assert torch.equal(before.embed(batch), after.embed(batch))
    assert after(study, acceleration=4).shape == (3 * 3 * small.model.width,)


def test_a_study_and_a_batch_give_the_same_embedding(small: RunConfig, folder: Path, reader: Reader) -> None:
    encoder = load_encoder(folder)
    config = override(small, {"sampling.accelerations": (4,)})
    batch = collate(reader.samples([0]), config, purpose=sampling.VALIDATION).to(CPU)
    alone = encoder(simulated(0, small), acceleration=4)
    np.testing.assert_allclose(encoder.embed(batch)[0], alone, atol=5e-3)  # stored as float16
    embeddings, labels = embed_all(encoder, [batch, batch])
    assert embeddings.shape == (2, alone.size)
    assert labels.shape == (2, 0)


def test_acceleration_changes_what_is_seen_and_phase_and_gain_do_not(folder: Path, study: Study) -> None:
    encoder = load_encoder(folder)
    every = encoder(study)
    assert not np.allclose(encoder(study, acceleration=4), every, atol=1e-3)
    turned = {n: View((v.kspace * np.complex64(3e4 * np.exp(1j))).astype(np.complex64)) for n, v in study.views.items()}
    np.testing.assert_allclose(encoder(replace(study, views=turned)), every, atol=1e-3)
    with pytest.raises(InputError, match="R = 8 leaves 4 of 32 lines"):
        encoder(study, acceleration=8)


def test_untrained_keeps_the_initial_weights(small: RunConfig, tables: Tables, folder: Path, study: Study) -> None:
    untrained = load_encoder(folder, untrained=True)
    np.testing.assert_array_equal(untrained(study), KSpaceEncoder(small, None, tables, CPU)(study))
    assert not np.allclose(untrained(study), load_encoder(folder)(study), atol=1e-3)


def test_the_folder_holds_weights_and_text_and_no_code(folder: Path, small: RunConfig) -> None:
    assert sorted(p.name for p in folder.iterdir()) == sorted([WEIGHTS, HEAD])
    settings = json.loads((folder / HEAD).read_text())["settings"]
    assert {key.partition(".")[0] for key in settings} == {"seed", "data", "sampling", "model"}
    assert "data.root" not in settings
    content = (folder / WEIGHTS).read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert content[8:9] == b"{"  # safetensors: length, JSON, numbers
    assert 8 + header < len(content)
    assert b"torch" not in content[: 8 + header]


ALONE = """
import sys
for name in ("ray", "deepspeed", "mlflow"):
    sys.modules[name] = None  # importing it raises
import numpy as np
import kmtr
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.dataset.record import to_study
encoder = kmtr.load_encoder(sys.argv[1])
reader = Reader(Dataset.of(sys.argv[2]), "test")
np.save(sys.argv[3], encoder(to_study(reader.read([0]))))
"""


def test_it_runs_where_ray_deepspeed_and_mlflow_are_missing(
    folder: Path, dataset: str, small: RunConfig, tmp_path: Path
) -> None:
    out = tmp_path / "embedding.npy"
    words = [sys.executable, "-c", ALONE, str(folder), dataset, str(out)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    expected = load_encoder(folder)(simulated(36, small))
    np.testing.assert_allclose(np.load(out), expected, atol=5e-3)  # stored as float16


def test_the_package_offers_it_without_importing_torch() -> None:
    assert kmtr.load_encoder is load_encoder
    with pytest.raises(AttributeError, match="no attribute 'load_decoder'"):
        kmtr.load_decoder  # noqa: B018
    code = "import kmtr, sys; assert 'torch' not in sys.modules; import kmtr.types; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def one_line(match: str, call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_study_that_does_not_fit_is_refused(folder: Path, study: Study) -> None:
    encoder = load_encoder(folder)
    sax, lax = study.views["sax"], study.views["lax_4ch"]

    def spoilt(kspace: np.ndarray) -> Study:
        return replace(study, views={"sax": sax, "lax_4ch": View(np.ascontiguousarray(kspace))})

    one_line("expected the views sax,lax_4ch, got no lax_4ch", lambda: encoder(replace(study, views={"sax": sax})))
    wide = np.pad(lax.kspace, [(0, 0)] * 4 + [(16, 16)])
    one_line("expected lax_4ch with at most 1 coils and matrix", lambda: encoder(spoilt(wide)))
    one_line("expected lax_4ch with at most 1 coils and matrix", lambda: encoder(spoilt(lax.kspace.repeat(2, axis=1))))
    one_line("expected finite values", lambda: encoder(spoilt(lax.kspace * np.complex64(np.nan))))


def test_a_folder_that_holds_no_encoder_is_refused(copy: Path, tmp_path: Path) -> None:
    one_line("expected a folder with encoder.safetensors and encoder.json", lambda: load_encoder(tmp_path / "nowhere"))
    (copy / WEIGHTS).write_bytes(b"not what it says")
    one_line("does not hold one", lambda: load_encoder(copy))
    (copy / HEAD).unlink()
    one_line("expected a folder with", lambda: load_encoder(copy))


def rewrite(copy: Path, **changes: object) -> None:
    head = json.loads((copy / HEAD).read_text())
    (copy / HEAD).write_text(json.dumps(head | changes))


def test_files_that_do_not_fit_each_other_are_refused(copy: Path) -> None:
    settings = json.loads((copy / HEAD).read_text())["settings"]
    rewrite(copy, settings=settings | {"model.width": 64})
    one_line("does not hold one", lambda: load_encoder(copy))
    rewrite(copy, settings=settings | {"model.depth": 2})
    one_line("does not hold one", lambda: load_encoder(copy))


def test_another_format_and_unknown_settings_are_refused(copy: Path) -> None:
    settings = json.loads((copy / HEAD).read_text())["settings"]
    rewrite(copy, settings=settings | {"model.colour": "red"})
    one_line("unknown key 'model.colour'", lambda: load_encoder(copy))
    rewrite(copy, format=0)
    one_line("expected format 1, got 0", lambda: load_encoder(copy))
    (copy / HEAD).write_text("[]")
    one_line("expected JSON with format and settings", lambda: load_encoder(copy))


def test_a_setting_that_was_not_there_yet_has_its_default(copy: Path, study: Study) -> None:
    """An encoder of before a key existed stays readable, and computes the same."""
    settings = json.loads((copy / HEAD).read_text())["settings"]
    before = load_encoder(copy)(study)
    rewrite(copy, settings={key: value for key, value in settings.items() if key != "model.drop_path"})
    np.testing.assert_array_equal(load_encoder(copy)(study), before)


STORED = Path(__file__).parent / "stored"
"""An encoder that was exported once, of a simulated cohort, and what it made of one subject: never written anew without
a new format number."""


def test_an_encoder_of_an_earlier_day_still_says_the_same(small: RunConfig) -> None:
    encoder = load_encoder(STORED / "encoder")
    expected = json.loads((STORED / "embedding.json").read_text())
    np.testing.assert_allclose(encoder(simulated(40, small), acceleration=4), expected, rtol=1e-3, atol=1e-3)
