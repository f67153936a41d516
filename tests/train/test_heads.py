"""Heads before the first step: the regressions that a probe of the same system would be, on any number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import processes
import pytest
import torch
from scipy.special import logit
from test_finetune import DISEASES, TARGETS, config, forked, on_labels  # noqa: F401  # config, forked: fixtures

from kmtr.config import RunConfig, from_json, override
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import Wanted
from kmtr.inference import load_model
from kmtr.metrics import fit_logistic, fit_ridge
from kmtr.tasks import Model, Preparer, stages_of
from kmtr.tasks.base import EMBEDDING
from kmtr.train import driver, heads
from kmtr.train.resolve import resolve
from kmtr.types import KmtrError

CPU = torch.device("cpu")
ROWS = 24


class Begun(NamedTuple):
    """A model on labels before the first step, and what it was made of."""

    config: RunConfig
    dataset: Dataset
    model: Model
    prepare: Preparer


def begin(
    config: RunConfig,  # noqa: F811
    dataset: Dataset,
    folder: Path,
    rows: list[int] | None = None,
    device: torch.device = CPU,
) -> Begun:
    torch.manual_seed(config.seed)
    prepare, model = Preparer(config, driver.fitted_tables(config, dataset, folder), device), Model(config)
    told: list[str] = []
    heads.begin(model, prepare, config, dataset.reader("train", config.data), rows, device, told.append)
    begins = config.task.begin == "probe" and "phenotypes" in config.task.tasks
    assert [f"on {len(rows or range(ROWS))} labelled subjects" in line for line in told] == [True] * begins
    return Begun(config, dataset, model, prepare)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def begun(config: RunConfig, folder: Path) -> Begun:  # noqa: F811
    return begin(*resolve(on_labels(config)), folder)


@torch.no_grad()
def read(begun: Begun) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Vectors of all training subjects as `heads.begin` draws them, and what the model says of them."""
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


SOME = list(range(1, ROWS))
"""A budget of rows that two workers can't halve: one of them encodes a subject twice, which must not count."""


def one_of_two(rank: int, world: int, settings: str, tables: str, place: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{place}/meeting", rank=rank, world_size=world)
    try:
        asked = from_json(settings)
        found = begin(asked, Dataset.open(asked.data), Path(tables), SOME)
        torch.save(found.model.heads.state_dict(), f"{place}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_workers_begin_as_one(begun: Begun, folder: Path, tmp_path: Path) -> None:
    """Each encodes half of the subjects; all have the same weights to the last bit."""
    alone = begin(begun.config, begun.dataset, folder, SOME)
    processes.run(one_of_two, 2, 2, begun.config.model_dump_json(), str(folder), str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    every = begun.model.heads.state_dict()
    for name, weights in alone.model.heads.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weights, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(first["phenotypes.1.weight"], every["phenotypes.1.weight"], rtol=1e-2), "rows count"


def test_a_run_trains_from_there(forked: None, begun: Begun, config: RunConfig) -> None:  # noqa: F811
    """One step of the real workers at a rate that moves nothing leaves the heads as they began."""
    outcome = driver.fit(on_labels(config, steps=1, learning_rate=1e-9, keep="last"), quiet=True)
    left = load_model(outcome.encoder).module.heads.state_dict()
    for name, weights in begun.model.heads.state_dict().items():
        torch.testing.assert_close(left[name], weights, rtol=1e-3, atol=1e-5)


def test_what_no_closed_form_has_stays_as_it_was_made(begun: Begun) -> None:
    """Fewer than 3 subjects with a label, one value of it alone, one class of a disease."""
    model, given = Model(begun.config), begun.prepare.given()
    vectors = torch.randn(6, model.heads["phenotypes"][0].normalized_shape[0])
    values = torch.full((6, len(begun.prepare.labels)), torch.nan)
    values[:2, given.labels["lvedv_ml"]] = torch.tensor([100.0, 150.0])
    values[:, given.labels["lvef_pct"]] = given.tables["label_mean"][given.labels["lvef_pct"]]
    values[:, given.labels["dcm"]] = 0.0
    with torch.no_grad():
        for name in ("phenotypes", "diseases"):
            begun.prepare.tasks[name].begin(model.heads[name], vectors, values, given)
    for weights in (model.heads["phenotypes"][1].weight, model.heads["diseases"][2].weight):
        assert torch.isfinite(weights).all()
        assert weights.abs().max() < 1e-5


def test_vectors_that_are_not_finite_are_said_on_every_worker(begun: Begun, folder: Path) -> None:
    prepare, model = begun.prepare, Model(begun.config)
    with torch.no_grad():
        next(model.systems["kspace"].parameters()).fill_(torch.nan)
    reader = begun.dataset.reader("train", begun.config.data)
    with pytest.raises(KmtrError, match=r"^task.encoder: the system's vectors are not finite"):
        heads.begin(model, prepare, begun.config, reader, None, CPU, lambda _: None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_begins_as_the_cpu(begun: Begun, folder: Path) -> None:
    found = begin(begun.config, begun.dataset, folder, device=torch.device("cuda"))
    for name, weights in begun.model.heads.state_dict().items():
        torch.testing.assert_close(found.model.heads.state_dict()[name].cpu(), weights, rtol=1e-2, atol=1e-4)
