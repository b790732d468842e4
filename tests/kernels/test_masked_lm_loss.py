"""Masked words against loops over the masked rows in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.masked_lm_loss import masked_lm_loss, masked_lm_loss_torch
from tests.kernels.oracle import check, gradients_are_right, normal


def oracle(hidden: Tensor, embeddings: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    total = hidden.new_zeros(())
    for row, label in zip(hidden, labels.tolist(), strict=True):
        logits = torch.stack([(row * word).sum() for word in embeddings]) + bias
        total = total + logits.logsumexp(0) - logits[label]
    return total / len(labels)


def inputs(rows: int, vocabulary: int, width: int) -> dict[str, Tensor]:
    embeddings, bias = 0.3 * normal(vocabulary, width, seed=1), normal(vocabulary, seed=2)
    return {"hidden": normal(rows, width), "embeddings": embeddings, "bias": bias}


def labels_of(rows: int, vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(1, 2, 8), (2, 101, 16), (7, 63, 24), (65, 64, 8)])
def test_against_the_oracle(rows: int, vocabulary: int, width: int) -> None:
    labels = labels_of(rows, vocabulary)
    check(
        lambda **x: masked_lm_loss(**x, labels=labels),
        lambda **x: masked_lm_loss_torch(**x, labels=labels),
        lambda **x: oracle(**x, labels=labels),
        inputs(rows, vocabulary, width),
    )


def test_nothing_masked_is_no_loss_and_no_gradient() -> None:
    leaves = {name: value.float().requires_grad_() for name, value in inputs(0, 9, 8).items()}
    loss = masked_lm_loss(**leaves, labels=torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    for name, leaf in leaves.items():
        assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros_like(leaf)), name


def test_gradients() -> None:
    labels = labels_of(3, 5)
    gradients_are_right(lambda **x: masked_lm_loss(**x, labels=labels), inputs(3, 5, 4))
