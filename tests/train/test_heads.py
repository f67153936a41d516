"""Heads before the first step: the regressions that a probe of the same system would be, on any number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import processes
import pytest
import torch
from scipy.special import logit
from test_finetune import DISEASES, TARGETS, config, on_labels  # noqa: F401  # config is a fixture

from kmtr.config import RunConfig, from_json, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import Wanted
from kmtr.metrics import fit_logistic, fit_ridge
from kmtr.tasks import Model, Preparer, stages_of
from kmtr.tasks.base import EMBEDDING
from kmtr.train import driver, heads
from kmtr.train.resolve import resolve

CPU = torch.device("cpu")
ROWS = 24


class Begun(NamedTuple):
    """A model on labels before the first step, and what it was made of."""

    config: RunConfig
    dataset: Dataset
    model: Model
    prepare: Preparer


def begin(config: RunConfig, dataset: Dataset, folder: Path, device: torch.device = CPU) -> Begun:  # noqa: F811
    torch.manual_seed(config.seed)
    prepare, model = Preparer(config, driver.fitted_tables(config, dataset, folder), device), Model(config)
    told: list[str] = []
    heads.begin(model, prepare, config, dataset.reader("train", config.data), None, device, told.append)
    assert [f"of {ROWS} labelled subjects" in line for line in told] == [True] * (config.task.begin == "probe")
    return Begun(config, dataset, model, prepare)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def begun(config: RunConfig, folder: Path) -> Begun:  # noqa: F811
    return begin(*resolve(on_labels(config)), folder)


@torch.no_grad()
def read(begun: Begun) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Vectors of all training subjects in the draws of the first epoch, and what the model says of them."""
    reader = begun.dataset.reader("train", begun.config.data)
    (host,) = pipeline.read_in_order(reader, range(ROWS), ROWS, begun.config, Wanted(begun.prepare.labels))
    batch = host.to(CPU)
    vectors = begun.model(begun.prepare.embedding(batch))[EMBEDDING]["vector"]
    said = begun.model(begun.prepare(batch, stages_of(begun.config)[0]), predict=True)
    return vectors.double().numpy(), {name: v.double().numpy() for task in said.values() for name, v in task.items()}


def labels(begun: Begun, names: tuple[str, ...]) -> np.ndarray:
    return subjects.labels_of(begun.dataset.reader("train", begun.config.data), range(ROWS), names)


def test_phenotypes_begin_as_a_ridge_regression_on_the_normalised_vector(begun: Begun) -> None:
    vectors, said = read(begun)
    centred = vectors - vectors.mean(1, keepdims=True)
    features = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    for target, truth in zip(TARGETS, labels(begun, TARGETS).T, strict=True):
        known = np.isfinite(truth)
        assert known.sum() == (ROWS if target == "lvedv_ml" else 18), "one target has unknown labels"
        wanted = fit_ridge(features[known], truth[known])(features)
        np.testing.assert_allclose(said[target], wanted, atol=2e-3 * np.nanstd(truth))
        assert wanted.std() > 0.05 * np.nanstd(truth), "the mean would be as good"


def test_diseases_begin_as_they_follow_from_the_predicted_phenotypes(begun: Begun) -> None:
    _, said = read(begun)
    phenotypes = labels(begun, TARGETS)
    predicted = np.stack([said[target] for target in TARGETS], axis=1)
    for disease, ill in zip(DISEASES, labels(begun, DISEASES).T, strict=True):
        wanted = fit_logistic(phenotypes, ill)(predicted)
        np.testing.assert_allclose(said[disease], wanted, atol=1e-4)
        assert wanted.std() > 1e-3, "the prevalence would be as good"


def test_heads_may_begin_at_the_mean(config: RunConfig, folder: Path) -> None:  # noqa: F811
    asked, dataset = resolve(on_labels(config, begin="mean"))
    at_mean = begin(asked, dataset, folder)
    _, said = read(at_mean)
    means = np.nanmean(labels(at_mean, (*TARGETS, *DISEASES)), axis=0)
    for name, mean in zip((*TARGETS, *DISEASES), means, strict=True):
        np.testing.assert_allclose(said[name], mean, rtol=1e-5)


def test_without_phenotypes_diseases_begin_at_their_prevalence(config: RunConfig, tmp_path: Path) -> None:  # noqa: F811
    asked, dataset = resolve(override(on_labels(config), {"task.tasks": "diseases"}))
    alone = begin(asked, dataset, tmp_path)
    _, said = read(alone)
    for name, mean in zip(DISEASES, labels(alone, DISEASES).mean(0), strict=True):
        np.testing.assert_allclose(logit(said[name]), logit(mean), atol=1e-5)


def one_of_two(rank: int, world: int, settings: str, tables: str, place: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{place}/meeting", rank=rank, world_size=world)
    try:
        asked = from_json(settings)
        found = begin(asked, Dataset.open(asked.data), Path(tables))
        torch.save(found.model.heads.state_dict(), f"{place}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_workers_begin_as_one(begun: Begun, folder: Path, tmp_path: Path) -> None:
    """Each encodes half of the subjects; all have the same weights to the last bit."""
    processes.run(one_of_two, 2, 2, begun.config.model_dump_json(), str(folder), str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, weights in begun.model.heads.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weights, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_begins_as_the_cpu(begun: Begun, folder: Path) -> None:
    found = begin(begun.config, begun.dataset, folder, torch.device("cuda"))
    for name, weights in begun.model.heads.state_dict().items():
        torch.testing.assert_close(found.model.heads.state_dict()[name].cpu(), weights, rtol=1e-2, atol=1e-4)
