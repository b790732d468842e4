"""Losses and scores of the five kinds of target against loops over examples, written from spec section 2."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.losses import loss_and_score
from pipelines.batch import (
    Batch,
    BatchTarget,
    ChoiceTarget,
    ClassTarget,
    OptionTarget,
    RegionTarget,
    SoftLabelTarget,
)

SEEDS = st.integers(0, 2**31)


def batch_of(target: BatchTarget, images: list[int], pair_image: list[int]) -> Batch:
    """A batch of which losses read the target, and how many region rows each pair's image has."""
    cu_images = torch.tensor([0, *images]).cumsum(0).int()
    pairs = len(pair_image)
    return Batch(
        task="made up", examples=pairs, task_token=None, token_ids=torch.zeros(pairs, dtype=torch.int64),
        cu_texts=torch.arange(pairs + 1, dtype=torch.int32), features=torch.zeros(sum(images), 1),
        boxes=torch.zeros(sum(images), 5), cu_images=cu_images, pair_text=torch.arange(pairs),
        pair_image=torch.tensor(pair_image), text_key=torch.zeros(pairs, dtype=torch.int64),
        image_key=torch.zeros(len(images), dtype=torch.int64), target=target, max_text=1, max_image=max(images),
    )  # fmt: skip


def bce(logit: float, target: float) -> float:
    """Binary cross-entropy with logits of one number."""
    return max(logit, 0.0) - logit * target + math.log1p(math.exp(-abs(logit)))


def first_largest(values: list[float]) -> int:
    return values.index(max(values))


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def normals(generator: torch.Generator, *shape: int) -> Tensor:
    """Coarse on purpose: halves, so that equal logits occur."""
    return (2 * torch.randn(shape, generator=generator)).round() / 2


def expect(logits: Tensor, batch: Batch, loss: float, scores: list[float]) -> None:
    found, score = loss_and_score(logits, batch)
    assert found.dtype == score.dtype == torch.float32
    assert found.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert score.tolist() == pytest.approx(scores)


@given(SEEDS)
def test_soft_labels(seed: int) -> None:
    """Sum over answers, mean over examples; the score is the soft score of the first largest logit."""
    g = torch.Generator().manual_seed(seed)
    examples, classes = 4, 7
    lengths = [0, *torch.randint(0, 4, (examples - 1,), generator=g).tolist()]  # the first has no label at all
    labels = [torch.randperm(classes, generator=g)[:n].tolist() for n in lengths]
    scores = [torch.rand(n, generator=g).tolist() for n in lengths]
    entries = [pair for own, soft in zip(labels, scores, strict=True) for pair in zip(own, soft, strict=True)]
    packed = torch.tensor(entries, dtype=torch.float32).view(-1, 2)
    flat = SoftLabelTarget(offsets_of(lengths), packed[:, 0].long(), packed[:, 1].contiguous())
    logits = normals(g, examples, classes)
    loss, right = 0.0, []
    for row, own, soft in zip(logits.tolist(), labels, scores, strict=True):
        target = [dict(zip(own, soft, strict=True)).get(c, 0.0) for c in range(classes)]
        loss += sum(map(bce, row, target)) / examples
        right.append(target[first_largest(row)])
    expect(logits, batch_of(flat, [1] * examples, list(range(examples))), loss, right)


@given(SEEDS, st.integers(2, 5))
def test_options(seed: int, options: int) -> None:
    """Softmax cross-entropy; right only if the logit is larger than every other: a tie is wrong."""
    g = torch.Generator().manual_seed(seed)
    examples = 6
    index = torch.randint(0, options, (examples,), generator=g)
    logits = normals(g, examples * options, 1)  # as the head gives them: one per pair
    loss, right = 0.0, []
    for row, answer in zip(logits.view(examples, options).tolist(), index.tolist(), strict=True):
        loss += (math.log(sum(map(math.exp, row))) - row[answer]) / examples
        right.append(float(all(row[answer] > other for i, other in enumerate(row) if i != answer)))
    expect(logits, batch_of(OptionTarget(index), [1], [0] * examples * options), loss, right)


@pytest.mark.parametrize("value", [0.0, 3.5, float("nan")])
def test_a_constant_model_scores_nothing_in_retrieval(value: float) -> None:
    batch = batch_of(OptionTarget(torch.zeros(3, dtype=torch.int64)), [1], [0] * 12)
    assert loss_and_score(torch.full((12, 1), value), batch)[1].tolist() == [0.0, 0.0, 0.0]


@given(SEEDS)
def test_regions(seed: int) -> None:
    """Sum over the pair's region rows, mean over pairs; right if the first largest row overlaps by more than half."""
    g = torch.Generator().manual_seed(seed)
    images, pair_image = [1, 5, 2, 9], [1, 3, 1, 0, 2]
    lengths = [images[i] for i in pair_image]
    scores = [torch.rand(n, generator=g) * (torch.rand(n, generator=g) > 0.5) for n in lengths]
    target = RegionTarget(offsets_of(lengths).int(), torch.cat(scores))
    logits = [normals(g, n) for n in lengths]
    loss, right = 0.0, []
    for row, wanted in zip(logits, scores, strict=True):
        loss += sum(map(bce, row.tolist(), wanted.tolist())) / len(lengths)
        right.append(float(wanted[first_largest(row.tolist())] > 0.5))
    expect(torch.cat(logits), batch_of(target, images, pair_image), loss, right)


def test_a_region_of_exactly_half_overlap_is_not_found() -> None:
    target = RegionTarget(torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([0.5, 1.0, 0.501, 0.0]))
    assert loss_and_score(torch.tensor([1.0, 0.0, 1.0, 0.0]), batch_of(target, [2, 2], [0, 1]))[1].tolist() == [
        0.0,
        1.0,
    ]


@given(SEEDS)
def test_choices(seed: int) -> None:
    """Sum over the options, mean over examples; right if the first largest logit stands at the first largest target."""
    g = torch.Generator().manual_seed(seed)
    images, pair_image = [6, 3, 9], [2, 0, 1, 0]
    lengths = [images[i] for i in pair_image]
    options = [int(torch.randint(1, n + 1, (1,), generator=g)) for n in lengths]
    rows = [torch.randperm(n, generator=g)[:k] for n, k in zip(lengths, options, strict=True)]
    scores = [torch.rand(k, generator=g).round(decimals=1) for k in options]
    target = ChoiceTarget(offsets_of(options), torch.cat(rows), torch.cat(scores))
    logits = [normals(g, n) for n in lengths]
    loss, right = 0.0, []
    for of_pair, own, wanted in zip(logits, rows, scores, strict=True):
        chosen = of_pair[own].tolist()
        loss += sum(map(bce, chosen, wanted.tolist())) / len(lengths)
        right.append(float(first_largest(chosen) == first_largest(wanted.tolist())))
    expect(torch.cat(logits), batch_of(target, images, pair_image), loss, right)


@given(SEEDS, st.sampled_from([2, 3]))
def test_classes(seed: int, classes: int) -> None:
    """Mean over examples and classes, without a multiplier; class -1 is an all-zero target and never right."""
    g = torch.Generator().manual_seed(seed)
    examples = 5
    index = torch.randint(-1, classes, (examples,), generator=g)
    logits = normals(g, examples, classes)
    loss, right = 0.0, []
    for row, label in zip(logits.tolist(), index.tolist(), strict=True):
        loss += sum(bce(logit, float(c == label)) for c, logit in enumerate(row)) / (examples * classes)
        right.append(float(label >= 0 and first_largest(row) == label))
    expect(logits, batch_of(ClassTarget(index), [1] * examples, list(range(examples))), loss, right)


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        (SoftLabelTarget(torch.tensor([0, 1, 1]), torch.tensor([2]), torch.tensor([0.6])), (2, 4)),
        (OptionTarget(torch.tensor([0, 1])), (8, 1)),
        (RegionTarget(torch.tensor([0, 4, 8], dtype=torch.int32), torch.rand(8)), (8,)),
        (ChoiceTarget(torch.tensor([0, 1, 3]), torch.tensor([3, 0, 2]), torch.tensor([1.0, 0.0, 1.0])), (8,)),
        (ClassTarget(torch.tensor([-1, 1])), (2, 3)),
    ],
    ids=lambda value: type(value).__name__.removesuffix("Target") if not isinstance(value, tuple) else "",
)
def test_bfloat16_logits_lose_nothing_more(target: BatchTarget, shape: tuple[int, ...]) -> None:
    """Losses are taken in float32 whatever the head computes in, and gradients come back in the head's dtype."""
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    batch = batch_of(target, [4, 4], [0, 1])
    loss, score = loss_and_score(logits, batch)
    loss.backward()
    wide = logits.detach().float().requires_grad_()
    expected, wide_score = loss_and_score(wide, batch)
    expected.backward()
    assert loss.item() == expected.item()
    assert torch.equal(score, wide_score)
    assert logits.grad is not None and wide.grad is not None
    assert torch.equal(logits.grad, wide.grad.bfloat16())
