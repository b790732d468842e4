"""The answer heads' loss against loops over examples and classes in float64, on every backend of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels.soft_label_bce import soft_label_bce, soft_label_bce_torch
from tests.kernels.backends import HERE, REFUSED_ON_THE_CPU, forced
from tests.kernels.losses import leaves_of, results
from tests.kernels.oracle import check, gradients_are_right, normal


@pytest.fixture(params=HERE, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from forced(request.param)


SPARSE: list[tuple[int, list[list[tuple[int, float]]]]] = [
    (3, [[(0, 1.0)], [], [(2, 0.3), (1, 0.9)]]),  # an example without labels
    (1, [[(0, 0.6)]]),
    (1, [[]]),
    (101, [[(c, 0.1 * (c % 10)) for c in range(0, 101, k)] for k in (3, 63, 64, 65, 101)]),
    (3129, [[(3128, 1.0), (0, 0.3)]] * 2),
    (4099, [[(4098, 1.0), (4095, 0.3)], [(4097, 0.4)]]),  # longer than a block of the kernels
    (5, [[(2, 0.3), (2, 0.3), (1, 0.5), (2, 0.1)]] * 3),  # a label named more than once
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
            target[row, label] += next(drawn)
    right = torch.special.expit(logits)
    loss = -(target * right.log() + (1 - target) * torch.special.expit(-logits).log()).mean() * logits.shape[1]
    best = [max(range(len(row)), key=lambda c: (row[c], -c)) for row in logits.tolist()]
    return loss, torch.stack([target[row, c] for row, c in enumerate(best)])


Function = Callable[..., tuple[Tensor, Tensor]]


def in_turn(function: Function, batches: int, **target: Tensor) -> Function:
    """Losses [batches] and scores of batches with the same target. One loss alone has too few roundings to compare by."""

    def every(logits: Tensor) -> tuple[Tensor, Tensor]:
        losses, scores = zip(*(function(batch, **target) for batch in logits.chunk(batches)), strict=True)
        return torch.stack(losses), torch.cat(scores)

    return every


@pytest.mark.parametrize(("classes", "examples"), SPARSE, ids=[f"{c}x{len(e)}" for c, e in SPARSE])
def test_against_the_oracle(classes: int, examples: list[list[tuple[int, float]]]) -> None:
    target, batches = packed(examples), 20 // len(examples)
    check(
        in_turn(soft_label_bce, batches, **target),
        in_turn(soft_label_bce_torch, batches, **target),
        in_turn(lambda logits: oracle(logits, examples, target["scores"]), batches),
        {"logits": 2 * normal(batches * len(examples), classes)},
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
    gradients_are_right(lambda logits: soft_label_bce(logits.float(), **target)[0].double(), {"logits": normal(3, 3)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_every_time(dtype: torch.dtype) -> None:
    """Computed again, and through a second backward; in the dtype of the logits."""
    leaves, target = leaves_of({"logits": normal(5, 101)}, dtype), packed(SPARSE[3][1])
    loss = lambda **x: soft_label_bce(**x, **target)[0]  # noqa: E731
    first, second = results(loss, leaves), results(loss, leaves)
    assert all(map(torch.equal, first, second))
    assert first[0].dtype is torch.float32 and first[1].dtype is dtype
    kept = 3 * loss(**leaves)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(kept, list(leaves.values()), retain_graph=True)
        assert torch.equal(gradient, first[1])


def test_a_small_gradient_survives_float16() -> None:
    """The loss's scale comes before the rounding, not after it."""
    logits = torch.full((1, 4), -20.0, dtype=torch.float16, requires_grad=True)
    loss, _ = soft_label_bce(logits, **packed([[]]))
    (2.0**16 * loss).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.float(), torch.full((1, 4), 2.0**16 * 2.061e-9), rtol=1e-2, atol=0.0)


def test_without_gradient() -> None:
    logits, target = normal(5, 101).float().requires_grad_(), packed(SPARSE[3][1])
    recorded = soft_label_bce(logits, **target)
    with torch.no_grad():
        plain = soft_label_bce(logits, **target)
    assert all(map(torch.equal, recorded, plain))
    assert not plain[0].requires_grad and not plain[1].requires_grad and not recorded[1].requires_grad


@REFUSED_ON_THE_CPU
def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(IndexError):
        soft_label_bce(torch.zeros(1, 3), **packed([[(3, 1.0)]]))
    with pytest.raises((ValueError, RuntimeError)):
        soft_label_bce(torch.zeros(1, 3), **{**packed([[(2, 1.0)]]), "offsets": torch.tensor([0, 2])})
