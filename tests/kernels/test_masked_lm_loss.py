"""Masked words against loops over the masked rows in float64, on every backend of the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import masked_rows
from kernels.masked_lm_loss import masked_lm_loss, masked_lm_loss_torch
from tests.kernels.backends import HERE, REFUSED_ON_THE_CPU, forced
from tests.kernels.losses import in_turn, largest_made, leaves_of, results
from tests.kernels.oracle import check, drawn, gradients_are_right, normal


@pytest.fixture(params=HERE, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from forced(request.param)


def oracle(hidden: Tensor, embeddings: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    total = hidden.new_zeros(())
    for row, label in zip(hidden, labels.tolist(), strict=True):
        logits = (embeddings * row).sum(1) + bias
        total = total + logits.logsumexp(0) - logits[label]
    return total / len(labels)


def inputs(rows: int, vocabulary: int, width: int) -> dict[str, Tensor]:
    embeddings, bias = 0.3 * normal(vocabulary, width, seed=1), normal(vocabulary, seed=2)
    return {"hidden": normal(rows, width), "embeddings": embeddings, "bias": bias}


def labels_of(rows: int, vocabulary: int) -> Tensor:
    return drawn(torch.randint, 0, vocabulary, (rows,), seed=rows)


def checked(rows: int, vocabulary: int, width: int, parts: int = 8, **replaced: Tensor) -> None:
    """Losses of so many rows each."""
    labels = labels_of(parts * rows, vocabulary)
    ours, plain, truth = (
        in_turn(lambda target, f=loss, **x: f(**x, labels=target), labels, parts)
        for loss in (masked_lm_loss, masked_lm_loss_torch, oracle)
    )
    check(ours, plain, truth, {**inputs(parts * rows, vocabulary, width), **replaced})


@pytest.mark.parametrize(
    ("rows", "vocabulary", "width"), [(1, 9, 8), (2, 101, 16), (7, 63, 24), (37, 64, 8), (2, 201, 72)]
)
def test_against_the_oracle(rows: int, vocabulary: int, width: int) -> None:
    checked(rows, vocabulary, width)


def test_the_whole_vocabulary() -> None:
    checked(3, 30522, 32)


def test_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and words in several parts, the last ones smaller."""
    monkeypatch.setattr(masked_rows, "_ROW_BYTES", 64)
    monkeypatch.setattr(masked_rows, "_DLOGITS_BYTES", 1)
    monkeypatch.setattr(masked_rows, "_ADDED_CLASSES", 24)
    checked(150, 33, 8, parts=2)


def test_huge_logits() -> None:
    """Logits of 60 and -60: finite, and right, for likely labels and for hopeless ones."""
    checked(6, 70, 8, bias=60 * normal(70, seed=2).sign())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [0, 1, 5, 9])
def test_rows_gathered_inside(dtype: torch.dtype, masked: int) -> None:
    """The same numbers as with rows gathered before, no gradient elsewhere; masked: none, one, some, all."""
    leaves, labels = leaves_of(inputs(9, 101, 16), dtype), labels_of(masked, 101)
    rows = torch.tensor([7, 2, 0, 8, 5, 1, 3, 6, 4])[:masked]
    inside = results(masked_lm_loss, leaves, labels=labels, rows=rows)
    gathered = {**leaves, "hidden": leaves["hidden"].detach()[rows].requires_grad_()}
    loss, dhidden, *others = results(masked_lm_loss, gathered, labels=labels)
    before = [loss, torch.zeros_like(inside[1]).index_copy(0, rows, dhidden), *others]
    assert all(map(torch.equal, inside, before))
    assert masked == 0 or inside[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_masked_is_no_loss_and_no_gradient(dtype: torch.dtype) -> None:
    leaves = leaves_of(inputs(0, 9, 8), dtype)
    loss = masked_lm_loss(**leaves, labels=torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0 and loss.dtype is torch.float32
    for name, leaf in leaves.items():
        assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros_like(leaf)), name


def test_gradients() -> None:
    labels = labels_of(3, 5)
    loss = lambda **x: masked_lm_loss(**{k: v.float() for k, v in x.items()}, labels=labels).double()  # noqa: E731
    gradients_are_right(loss, inputs(3, 5, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time(dtype: torch.dtype) -> None:
    """Computed again, and through a second backward."""
    leaves, labels = leaves_of(inputs(131, 203, 24), dtype), labels_of(131, 203)
    first, second = (results(masked_lm_loss, leaves, labels=labels) for _ in range(2))
    assert all(map(torch.equal, first, second))
    loss = 3 * masked_lm_loss(**leaves, labels=labels)
    kept = [gradient.clone() for gradient in torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)]
    assert all(map(torch.equal, kept, first[1:]))
    assert all(map(torch.equal, torch.autograd.grad(loss, list(leaves.values())), first[1:]))


@REFUSED_ON_THE_CPU
def test_labels_outside_of_the_vocabulary_are_refused() -> None:
    values = {name: value.float() for name, value in inputs(3, 9, 8).items()}
    for wrong in (9, -1):
        with pytest.raises(IndexError):
            masked_lm_loss(**values, labels=torch.tensor([0, wrong, 8]))
    with pytest.raises(ValueError, match="do not fit"):
        masked_lm_loss(**values, labels=torch.tensor([0, 1]))


def test_logits_of_all_masked_rows_never_exist(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the check sees them where they do: in plain torch."""
    monkeypatch.setattr(masked_rows, "_DLOGITS_BYTES", 2**16)
    m, vocabulary = 600, 203
    leaves, labels = leaves_of(inputs(m, vocabulary, 16)), labels_of(m, vocabulary)
    largest = largest_made(lambda: results(masked_lm_loss, leaves, labels=labels))
    assert (largest >= m * vocabulary * 4) == (backend == "torch")
