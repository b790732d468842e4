"""Masked regions against loops over the masked rows in float64, on every backend of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import masked_rows
from kernels.masked_region_loss import masked_region_loss, masked_region_loss_torch
from tests.kernels.backends import HERE, forced
from tests.kernels.losses import in_turn, largest_made, leaves_of, results
from tests.kernels.oracle import check, drawn, gradients_are_right, normal


@pytest.fixture(params=HERE, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from forced(request.param)


def oracle(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """KL divergence row by row; a class of probability 0 costs nothing."""
    total = hidden.new_zeros(())
    for row, wanted in zip(hidden, target.double(), strict=True):
        logits = (weight * row).sum(1) + bias
        log_probabilities = logits - logits.logsumexp(0)
        present = wanted > 0
        total = total + (wanted[present] * (wanted[present].log() - log_probabilities[present])).sum()
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


def checked(target: Tensor, width: int = 8, parts: int = 8, **replaced: Tensor) -> None:
    """Losses of equal parts of the target."""
    losses = (masked_region_loss, masked_region_loss_torch, oracle)
    ours, plain, truth = (in_turn(loss, target, parts) for loss in losses)
    check(ours, plain, truth, {**inputs(target.shape[0], target.shape[1], width), **replaced})


@pytest.mark.parametrize(("rows", "classes", "width"), [(1, 9, 8), (2, 101, 16), (7, 63, 24), (37, 65, 8)])
def test_against_the_oracle(rows: int, classes: int, width: int) -> None:
    checked(distribution(8 * rows, classes), width)


def test_the_classes_of_the_detector() -> None:
    """1,601 of them, which leave one for the last tile of 64, and 65 for the last of 128."""
    checked(distribution(4, 1601), width=72, parts=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_targets_of_half_the_size(dtype: torch.dtype) -> None:
    checked(distribution(16, 129).to(dtype))


def test_targets_that_do_not_sum_to_one() -> None:
    """Twice the mass, half of it, none."""
    checked(distribution(32, 65) * torch.tensor([1.0, 2.0, 0.5, 0.0]).repeat(8)[:, None])


def test_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and classes in several parts, the last ones smaller."""
    monkeypatch.setattr(masked_rows, "_ROW_BYTES", 64)
    monkeypatch.setattr(masked_rows, "_DLOGITS_BYTES", 1)
    monkeypatch.setattr(masked_rows, "_ADDED_CLASSES", 24)
    checked(distribution(2 * 150, 33), parts=2)


def test_huge_logits() -> None:
    """Logits of 60 and -60: finite, and right."""
    checked(distribution(40, 70), bias=60 * normal(70, seed=2).sign())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [0, 1, 5, 9])
def test_rows_gathered_inside(dtype: torch.dtype, masked: int) -> None:
    """The same numbers as with rows gathered before, no gradient elsewhere; masked: none, one, some, all."""
    leaves, target = leaves_of(inputs(9, 101, 16), dtype), distribution(10, 101)[:masked]
    rows = torch.tensor([7, 2, 0, 8, 5, 1, 3, 6, 4])[:masked]
    inside = results(masked_region_loss, leaves, target=target, rows=rows)
    gathered = {**leaves, "hidden": leaves["hidden"].detach()[rows].requires_grad_()}
    loss, dhidden, *others = results(masked_region_loss, gathered, target=target)
    for ours, other in zip(
        inside, [loss, torch.zeros_like(inside[1]).index_copy(0, rows, dhidden), *others], strict=True
    ):
        assert torch.equal(ours, other)
    assert masked == 0 or inside[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_masked_is_no_loss_and_no_gradient(dtype: torch.dtype) -> None:
    leaves = leaves_of(inputs(0, 9, 8), dtype)
    loss = masked_region_loss(**leaves, target=torch.zeros(0, 9))
    loss.backward()
    assert loss.item() == 0.0 and loss.dtype is torch.float32
    for name, leaf in leaves.items():
        assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros_like(leaf)), name


def test_a_perfect_prediction_costs_nothing() -> None:
    logits = normal(5).float()
    loss = masked_region_loss(torch.zeros(1, 2), torch.zeros(5, 2), logits, logits.softmax(0)[None])
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


def test_gradients() -> None:
    target = distribution(3, 5)
    loss = lambda **x: masked_region_loss(**{k: v.float() for k, v in x.items()}, target=target).double()  # noqa: E731
    gradients_are_right(loss, inputs(3, 5, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_is_the_first(dtype: torch.dtype) -> None:
    """Through a graph that was kept: the same bits. Through one that was not: refused."""
    leaves, target = leaves_of(inputs(7, 65, 8), dtype), distribution(7, 65)
    loss = masked_region_loss(**leaves, target=target)
    first = [gradient.clone() for gradient in torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)]
    second = torch.autograd.grad(loss, list(leaves.values()))
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, list(leaves.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time(dtype: torch.dtype) -> None:
    leaves, target = leaves_of(inputs(131, 203, 24), dtype), distribution(131, 203)
    first, second = (results(masked_region_loss, leaves, target=target) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_only_what_needs_a_gradient_gets_one() -> None:
    leaves, target = leaves_of(inputs(7, 65, 8)), distribution(7, 65)
    everything = results(masked_region_loss, leaves, target=target)
    frozen = {name: leaf.detach() for name, leaf in leaves.items()} | {"hidden": leaves["hidden"]}
    loss = masked_region_loss(**frozen, target=target)
    loss.backward(torch.tensor(3.0))
    assert torch.equal(loss.detach(), everything[0])
    assert leaves["hidden"].grad is not None and torch.equal(leaves["hidden"].grad, everything[1])
    assert leaves["weight"].grad is None
    with torch.no_grad():
        loss = masked_region_loss(**leaves, target=target)
    assert torch.equal(loss, everything[0]) and not loss.requires_grad


def test_what_does_not_fit_is_refused() -> None:
    good = {name: value.float() for name, value in inputs(3, 9, 8).items()} | {"target": distribution(3, 9)}
    for name, wrong in (
        ("hidden", good["hidden"][:, :7]),
        ("bias", good["bias"][:5]),
        ("bias", good["bias"].bfloat16()),
        ("target", good["target"][:2]),
        ("target", good["target"][:, :8]),
        ("target", good["target"].double()),
        ("rows", torch.arange(3, dtype=torch.int32)),
    ):
        with pytest.raises(ValueError, match="hidden, weight and bias|do not fit|float64|int64"):
            masked_region_loss(**{**good, name: wrong})


def all_regions(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    """The published way: logits of every region, masked at the end. hidden [n, V]; target [n, C]; masked bool [n]."""
    logits = F.linear(hidden, weight, bias)
    divergence = F.kl_div(F.log_softmax(logits.float(), dim=-1), target, reduction="none")
    return (divergence * masked[:, None].float()).sum() / masked.sum()


def test_the_published_way_gives_the_same_numbers() -> None:
    leaves, target = leaves_of(inputs(60, 101, 16)), distribution(60, 101)
    rows = torch.arange(3, 60, 7)
    ours = results(masked_region_loss, leaves, target=target[rows], rows=rows)
    masked = torch.zeros(60, dtype=torch.bool).index_fill(0, rows, True)
    for value, theirs in zip(ours, results(all_regions, leaves, target=target, masked=masked), strict=True):
        torch.testing.assert_close(value, theirs, rtol=1e-5, atol=1e-7)


def test_logits_of_all_masked_rows_never_exist(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the check sees them where they do: in plain torch."""
    monkeypatch.setattr(masked_rows, "_DLOGITS_BYTES", 2**16)
    m, classes = 600, 203
    leaves, target = leaves_of(inputs(m, classes, 16)), distribution(m, classes)
    largest = largest_made(lambda: results(masked_region_loss, leaves, target=target))
    assert (largest >= m * classes * 4) == (backend == "torch")


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes that torch held at most, beyond what it held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return max(held)


def seconds(function: Callable[[], object]) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_time_and_memory_against_the_published_way(backend: str, dtype: torch.dtype) -> None:
    """256 images of 37 rows, 15 % masked: a twentieth of the memory, a quarter of the time at most."""
    if backend == "torch":
        pytest.skip("about the kernels")
    rows, classes, width = 256 * 37, 1601, 1024
    masked = drawn(torch.rand, rows, seed=0) < 0.15
    leaves, target = leaves_of(inputs(rows, classes, width), dtype), distribution(rows, classes)
    ours = {**leaves, "hidden": leaves["hidden"].detach()[masked].requires_grad_()}, target[masked]
    published = lambda: results(all_regions, leaves, target=target, masked=masked)  # noqa: E731
    fused = lambda: results(masked_region_loss, ours[0], target=ours[1])  # noqa: E731
    fused()
    assert 20 * peak_memory(fused) <= peak_memory(published)
    assert 4 * min(seconds(fused) for _ in range(3)) <= min(seconds(published) for _ in range(3))
