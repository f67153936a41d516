"""Losses against formulas worked out by hand and against plain numpy."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch

from kmtr.tasks.losses import info_nce, masked_reconstruction

Kind = Literal["mse", "l1", "hdr"]
PREDICTED = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 1.0]])
TARGET = torch.tensor([[3.0, 1.0], [1.0, 0.0], [1.0, -1.0]])
COUNTS = torch.tensor([2, 1])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mse", [(9 / 2 + 1 / 2) / 2, 4 / 2]),
        ("l1", [(3 / 2 + 1 / 2) / 2, 2 / 2]),
        # |error|^2 over (|prediction| + 0.5)^2 of the complex value: 9 / 5.5^2 and 1 / 0.5^2; 4 / (sqrt(2) + 0.5)^2
        ("hdr", [(9 / 5.5**2 + 1 / 0.5**2) / 2, 4 / (math.sqrt(2) + 0.5) ** 2]),
    ],
)
def test_closed_forms(kind: Kind, expected: list[float]) -> None:
    torch.testing.assert_close(masked_reconstruction(PREDICTED, TARGET, COUNTS, kind), torch.tensor(expected))


@pytest.mark.parametrize("kind", ["mse", "l1", "hdr"])
def test_a_subject_s_loss_does_not_depend_on_the_others(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 7, 6, generator=generator).unbind(0)
    loss = masked_reconstruction(predicted, target, torch.tensor([5, 0, 2]), kind)
    for row, own in ((0, slice(0, 5)), (2, slice(5, 7))):
        alone = masked_reconstruction(predicted[own], target[own], torch.tensor([len(predicted[own])]), kind)
        torch.testing.assert_close(loss[row : row + 1], alone)
    assert loss[1] == 0, "a subject without hidden tokens"


def test_the_scale_of_hdr_carries_no_gradient() -> None:
    predicted = torch.tensor([[3.0, 4.0]], requires_grad=True)
    masked_reconstruction(predicted, TARGET[:1], COUNTS[1:], "hdr").sum().backward()
    torch.testing.assert_close(predicted.grad, torch.tensor([[0.0, 2 * 3 / 5.5**2]]))


def test_losses_are_fp32_whatever_comes() -> None:
    half = PREDICTED.bfloat16()
    assert masked_reconstruction(half, TARGET.bfloat16(), COUNTS).dtype == torch.float32
    z = torch.randn(1, 2, 4).bfloat16()
    assert info_nce(z, z, torch.arange(2), torch.zeros(1, 2, 2, dtype=torch.bool), 0.1)[0].dtype == torch.float32


def numpy_info_nce(
    anchor: np.ndarray, candidate: np.ndarray, positive: np.ndarray, excluded: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    a = anchor / np.linalg.norm(anchor, axis=-1, keepdims=True)
    c = candidate / np.linalg.norm(candidate, axis=-1, keepdims=True)
    loss = np.zeros(anchor.shape[:2])
    top = np.zeros(anchor.shape[:2], bool)
    for s in range(a.shape[0]):
        for i in range(a.shape[1]):
            logits = np.array([a[s, i] @ c[s, j] / temperature for j in range(c.shape[1])])
            allowed = ~excluded[s, i]
            loss[s, i] = -np.log(np.exp(logits[positive[i]]) / np.exp(logits[allowed]).sum())
            top[s, i] = logits[positive[i]] == logits[allowed].max()
    return loss, top


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_info_nce_is_its_formula(temperature: float) -> None:
    rng = np.random.default_rng(0)
    anchor, candidate = rng.standard_normal((3, 4, 8)), rng.standard_normal((3, 6, 8))
    positive = np.array([2, 3, 4, 5])
    candidate[:, positive] += 0.5 * anchor
    excluded = rng.random((3, 4, 6)) < 0.3
    excluded[:, np.arange(4), positive] = False
    t = torch.from_numpy
    loss, top, margin = info_nce(t(anchor), t(candidate), t(positive), t(excluded), temperature)
    expected, nearest = numpy_info_nce(anchor, candidate, positive, excluded, temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(top, nearest)
    assert 0 < nearest.mean() < 1
    np.testing.assert_array_equal(margin >= 0, nearest)
    chunked = info_nce(t(anchor), t(candidate), t(positive), t(excluded), temperature, chunk=3)
    for part, whole in zip(chunked, (loss, top, margin), strict=True):
        torch.testing.assert_close(part, whole)


def test_chunks_have_the_gradients_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    anchor, candidate = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 9, 8, generator=generator)
    excluded = torch.rand(2, 5, 9, generator=generator) < 0.2
    excluded[:, torch.arange(5), torch.arange(5)] = False
    gradients = []
    for chunk in (0, 2):
        leaves = [
            anchor.clone().requires_grad_(),
            candidate.clone().requires_grad_(),
            torch.tensor(0.2).requires_grad_(),
        ]
        a, c, temperature = leaves
        loss = info_nce(a, c, torch.arange(5), excluded, temperature, chunk).loss
        gradients.append(torch.autograd.grad((loss * torch.arange(10).view(2, 5)).sum(), leaves))
    for whole, pieces in zip(*gradients, strict=True):
        assert whole.abs().max() > 0.1
        torch.testing.assert_close(pieces, whole)


def test_the_margin_is_to_the_hardest_negative() -> None:
    unit = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]])
    margin = info_nce(unit[:, :1], unit, torch.tensor([0]), torch.zeros(1, 1, 3, dtype=torch.bool), 0.1).margin
    torch.testing.assert_close(margin, torch.tensor([[1.0 - 0.6]]))
    alone = torch.tensor([[[False, True, True]]])
    torch.testing.assert_close(info_nce(unit[:, :1], unit, torch.tensor([0]), alone, 0.1).margin, torch.tensor([[2.0]]))


def test_excluded_candidates_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    anchor, candidate = torch.randn(1, 3, 8, generator=generator), torch.randn(1, 5, 8, generator=generator)
    excluded = torch.zeros(1, 3, 5, dtype=torch.bool)
    excluded[:, :, 4] = True
    positive = torch.arange(3)
    with_it = info_nce(anchor, candidate, positive, excluded, 0.1)
    without = info_nce(anchor, candidate[:, :4], positive, excluded[..., :4], 0.1)
    torch.testing.assert_close(with_it, without)
    candidate.requires_grad_()
    info_nce(anchor, candidate, positive, excluded, 0.1)[0].sum().backward()
    assert candidate.grad is not None
    assert not candidate.grad[0, 4].any()
    assert candidate.grad[0, :4].any()


def test_limits_of_info_nce() -> None:
    same = torch.ones(1, 4, 8)
    none = torch.zeros(1, 4, 4, dtype=torch.bool)
    loss, *_ = info_nce(same, same, torch.arange(4), none, 0.1)
    torch.testing.assert_close(loss, torch.full((1, 4), math.log(4)))  # nothing told apart
    apart = torch.eye(4)[None]
    loss, top, margin = info_nce(apart, apart, torch.arange(4), none, 0.01)
    assert loss.max() < 1e-6
    assert top.all()
    torch.testing.assert_close(margin, torch.ones(1, 4))
