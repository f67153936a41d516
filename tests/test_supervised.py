"""Training on labels: it learns, its head begins at the mean, unknown labels count nothing, and it is reproducible."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader.batch import Batch
from kmtr.encoder import KSpaceEncoder
from kmtr.train import supervised
from kmtr.train.supervised import Labelled, Regressor, Training, epochs_of

CPU = torch.device("cpu")
TARGETS = ("lvedv_ml", "lvef_pct")
SUBJECTS = 12


@pytest.fixture
def encoder(small: RunConfig, tables: dict[str, torch.Tensor]) -> KSpaceEncoder:
    return KSpaceEncoder(small, None, tables, CPU)


@pytest.fixture
def labelled(small: RunConfig, reader: Reader) -> Labelled:
    return Labelled.read(reader, list(range(SUBJECTS)), small, TARGETS)


def with_labels(labelled: Labelled, labels: np.ndarray) -> Labelled:
    meta = labelled.host.meta | {"labels": torch.from_numpy(labels.astype(np.float32))}
    return Labelled(replace(labelled.host, meta=meta))


def whole(labelled: Labelled) -> Batch:
    return labelled.batch(np.arange(len(labelled)), np.zeros(len(labelled), np.int64), CPU)


def test_a_linear_target_of_the_embedding_is_learnt(
    small: RunConfig, encoder: KSpaceEncoder, labelled: Labelled
) -> None:
    embedding = encoder.embed(whole(labelled)).numpy()
    target = (embedding - embedding.mean(0)) @ np.random.default_rng(0).normal(size=embedding.shape[1])
    labelled = with_labels(labelled, np.stack([target, -2 * target], axis=1))
    regressor = Regressor(encoder, labelled.labels)
    losses = supervised.train(regressor, labelled, Training(40, 3e-3, batch=SUBJECTS, warmup_steps=5), small)
    assert losses[0] == pytest.approx(1.0, rel=1e-4)  # a head of zeros says the mean: the loss is the variance
    assert np.mean(losses[-5:]) < 0.3 * losses[0]


def test_standardised_on_the_subjects_of_training(encoder: KSpaceEncoder, labelled: Labelled) -> None:
    regressor = Regressor(encoder, labelled.labels)
    regressor.standardise(labelled)
    with torch.no_grad():
        found = (regressor.embed(whole(labelled)) - regressor.centre) / regressor.scale
    spread = found.std(0, correction=0)
    assert spread.max() > 0
    torch.testing.assert_close(found.mean(0), torch.zeros_like(spread), atol=1e-4, rtol=0)
    torch.testing.assert_close(spread[spread > 0], torch.ones_like(spread[spread > 0]), atol=1e-3, rtol=0)
    truth = np.broadcast_to(regressor.mean, (SUBJECTS, len(TARGETS)))
    np.testing.assert_allclose(regressor.predict(whole(labelled)), truth, rtol=1e-6)  # a head of zeros says the mean


def test_augmentation_moves_subjects_between_visits(small: RunConfig, reader: Reader) -> None:
    still = Labelled.read(reader, [0, 1], small, TARGETS)
    augmented = override(small, {"augment.shift": 0.05, "augment.rotation_deg": 10})
    moving = Labelled.read(reader, [0, 1], augmented, TARGETS)
    index = np.arange(2)
    first, second = (moving.batch(index, np.full(2, epoch), CPU).kspace for epoch in (0, 1))
    assert not torch.allclose(first.abs(), second.abs())
    torch.testing.assert_close(still.batch(index, index, CPU).kspace, still.batch(index, 5 + index, CPU).kspace)


def test_unknown_labels_are_never_counted(encoder: KSpaceEncoder, labelled: Labelled) -> None:
    labels = labelled.labels.copy()
    labels[::2, 0] = np.nan
    half = with_labels(labelled, labels)
    regressor = Regressor(encoder, half.labels)
    torch.nn.init.normal_(regressor.head.weight, std=0.1)
    batch = whole(half)
    with torch.no_grad():
        answer = regressor(batch).numpy()
    truth = (half.labels - regressor.mean) / regressor.sd
    known = np.isfinite(truth)
    loss = regressor.loss(batch)
    assert float(loss.detach()) == pytest.approx(float(np.mean((answer - truth)[known] ** 2)), rel=1e-4)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in regressor.parameters() if p.grad is not None)
    assert regressor.mean[0] == pytest.approx(np.nanmean(half.labels[:, 0]))


def test_a_target_without_labels_is_unknown_and_harms_no_other(
    small: RunConfig, encoder: KSpaceEncoder, labelled: Labelled
) -> None:
    labels = labelled.labels.copy()
    labels[2:, 1] = np.nan  # two are too few
    labelled = with_labels(labelled, labels)
    regressor = Regressor(encoder, labelled.labels)
    regressor.standardise(labelled)
    losses = supervised.train(regressor, labelled, Training(2, 1e-3, batch=4), small)
    assert np.isfinite(losses).all()
    predicted = regressor.predict(whole(labelled))
    assert np.isfinite(predicted[:, 0]).all()
    assert np.isnan(predicted[:, 1]).all()


def test_the_same_training_gives_the_same_numbers(
    small: RunConfig, tables: dict[str, torch.Tensor], labelled: Labelled
) -> None:
    def once(seed: int) -> tuple[list[float], np.ndarray]:
        regressor = Regressor(KSpaceEncoder(small, None, tables, CPU), labelled.labels)
        losses = supervised.train(regressor, labelled, Training(3, 1e-3, batch=5), override(small, {"seed": seed}))
        return losses, regressor.predict(whole(labelled))

    first, again, other = once(0), once(0), once(1)
    assert first[0] == again[0]
    np.testing.assert_array_equal(first[1], again[1])
    assert first[0] != other[0]


def test_every_pass_visits_everybody_once_and_draws_another_pattern(labelled: Labelled) -> None:
    index, epoch = map(np.concatenate, zip(*(epochs_of(3, step, 5, SUBJECTS) for step in range(12)), strict=True))
    for number in range(5):
        assert sorted(index[epoch == number]) == list(range(SUBJECTS))
    assert index[:SUBJECTS].tolist() != index[SUBJECTS : 2 * SUBJECTS].tolist()
    same = np.zeros(2, np.int64)
    two = labelled.batch(same, np.array([0, 1]), CPU)
    assert not torch.equal(two.sampled[0], two.sampled[1])
    torch.testing.assert_close(two.kspace[0], two.kspace[1])
