"""The answer heads' loss against loops over examples and classes in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.soft_label_bce import soft_label_bce, soft_label_bce_torch
from tests.kernels.oracle import check, gradients_are_right, normal

SPARSE: list[tuple[int, list[list[tuple[int, float]]]]] = [
    (3, [[(0, 1.0)], [], [(2, 0.3), (1, 0.9)]]),  # an example without labels
    (1, [[(0, 0.6)]]),
    (1, [[]]),
    (101, [[(c, 0.1 * (c % 10)) for c in range(0, 101, k)] for k in (1, 2, 63, 64, 65, 101)]),
    (3129, [[(3128, 1.0), (0, 0.3)]] * 2),
]


def packed(examples: list[list[tuple[int, float]]]) -> dict[str, Tensor]:
    offsets = [0]
    for entries in examples:
        offsets.append(offsets[-1] + len(entries))
    flat = [entry for entries in examples for entry in entries]
    return {
        "offsets": torch.tensor(offsets),
        "labels": torch.tensor([label for label, _ in flat], dtype=torch.int64),
        "scores": torch.tensor([score for _, score in flat], dtype=torch.float32),
    }


def oracle(logits: Tensor, examples: list[list[tuple[int, float]]], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Element mean of the binary cross-entropy times the number of classes; score of the first largest logit."""
    drawn = iter(scores.double().tolist())
    target = torch.zeros_like(logits)
    for row, entries in enumerate(examples):
        for label, _ in entries:
            target[row, label] = next(drawn)
    right = torch.special.expit(logits)
    loss = -(target * right.log() + (1 - target) * torch.special.expit(-logits).log()).mean() * logits.shape[1]
    best = [max(range(len(row)), key=lambda c: (row[c], -c)) for row in logits.tolist()]
    return loss, torch.stack([target[row, c] for row, c in enumerate(best)])


@pytest.mark.parametrize(("classes", "examples"), SPARSE, ids=[f"{c}x{len(e)}" for c, e in SPARSE])
def test_against_the_oracle(classes: int, examples: list[list[tuple[int, float]]]) -> None:
    target = packed(examples)
    check(
        lambda logits: soft_label_bce(logits, **target),
        lambda logits: soft_label_bce_torch(logits, **target),
        lambda logits: oracle(logits, examples, target["scores"]),
        {"logits": 2 * normal(len(examples), classes)},
    )


def test_huge_logits_stay_finite() -> None:
    target = packed([[(0, 1.0)], [(1, 1.0)]])
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4]], requires_grad=True)
    loss, score = soft_label_bce(logits, **target)
    loss.backward()
    assert loss.item() == 1e4  # the second example pays 1e4 for its missed label and 1e4 for the wrong one, over 2
    assert score.tolist() == [1.0, 0.0]
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_of_equal_logits_the_first_counts() -> None:
    target = packed([[(1, 1.0)], [(0, 0.7)]])
    assert soft_label_bce(torch.zeros(2, 3), **target)[1].tolist() == [0.0, pytest.approx(0.7)]


def test_gradients() -> None:
    target = packed(SPARSE[0][1])
    gradients_are_right(lambda logits: soft_label_bce(logits, **target)[0], {"logits": normal(3, 3)})
