"""Masked regions against loops over the masked rows in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.masked_region_loss import masked_region_loss, masked_region_loss_torch
from tests.kernels.oracle import check, gradients_are_right, normal


def oracle(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """KL divergence class by class; a class of probability 0 costs nothing."""
    total = hidden.new_zeros(())
    for row, wanted in zip(hidden, target.double(), strict=True):
        logits = torch.stack([(row * w).sum() for w in weight]) + bias
        log_probabilities = logits - logits.logsumexp(0)
        for t, log_p in zip(wanted.tolist(), log_probabilities, strict=True):
            if t > 0:
                total = total + t * (torch.tensor(t, dtype=torch.float64).log() - log_p)
    return total / hidden.shape[0]


def inputs(rows: int, classes: int, width: int) -> dict[str, Tensor]:
    weight, bias = 0.3 * normal(classes, width, seed=1), normal(classes, seed=2)
    return {"hidden": normal(rows, width), "weight": weight, "bias": bias}


def distribution(rows: int, classes: int) -> Tensor:
    """Detector-like: half of the classes at exactly 0, and one row that is sure."""
    target = normal(rows, classes, seed=3).clamp(min=0).float()
    target[:, 0] += 0.1
    target[0] = 0
    target[0, -1] = 1
    return target / target.sum(1, keepdim=True)


@pytest.mark.parametrize(("rows", "classes", "width"), [(1, 2, 8), (2, 101, 16), (7, 63, 24), (37, 65, 8)])
def test_against_the_oracle(rows: int, classes: int, width: int) -> None:
    target = distribution(rows, classes)
    check(
        lambda **x: masked_region_loss(**x, target=target),
        lambda **x: masked_region_loss_torch(**x, target=target),
        lambda **x: oracle(**x, target=target),
        inputs(rows, classes, width),
    )


def test_nothing_masked_is_no_loss_and_no_gradient() -> None:
    leaves = {name: value.float().requires_grad_() for name, value in inputs(0, 9, 8).items()}
    loss = masked_region_loss(**leaves, target=torch.zeros(0, 9))
    loss.backward()
    assert loss.item() == 0.0
    for name, leaf in leaves.items():
        assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros_like(leaf)), name


def test_a_perfect_prediction_costs_nothing() -> None:
    logits = normal(5).float()
    loss = masked_region_loss(torch.zeros(1, 2), torch.zeros(5, 2), logits, logits.softmax(0)[None])
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


def test_gradients() -> None:
    target = distribution(3, 5)
    gradients_are_right(lambda **x: masked_region_loss(**x, target=target), inputs(3, 5, 4))
