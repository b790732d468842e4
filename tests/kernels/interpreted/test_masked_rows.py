"""What only the Triton kernels of the masked losses do: keep logits of few rows for backward, gather and scatter rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import masked_rows, masked_rows_triton
from kernels.masked_lm_loss import masked_lm_loss, masked_lm_loss_torch
from kernels.masked_region_loss import masked_region_loss, masked_region_loss_torch
from kernels.masked_rows import MaskedRows
from kernels.masked_rows_triton import Kept, RowResults
from tests.kernels.backends import forced
from tests.kernels.losses import in_turn, leaves_of, results
from tests.kernels.oracle import DEVICE, check, drawn, normal

NEVER, ALWAYS = 0.0, float("inf")
KEEPING = pytest.mark.parametrize("limit", [NEVER, ALWAYS])


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    yield from forced("triton")


def words(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
    """`masked_lm_loss` under the other one's names."""
    return masked_lm_loss(hidden, weight, bias, target, rows)


def words_torch(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return masked_lm_loss_torch(hidden, weight, bias, target)


def divergence(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """The loss from its definition, in the dtype of hidden; a label is a distribution, too."""
    z = hidden @ weight.t() + bias
    t = F.one_hot(target, z.shape[1]) if target.dtype is torch.int64 else target
    return F.kl_div(z.log_softmax(-1), t.to(z.dtype), reduction="sum") / len(hidden)


def target_of(loss: Callable[..., Tensor], rows: int, classes: int) -> Tensor:
    if loss is words:
        return drawn(torch.randint, 0, classes, (rows,), seed=rows)
    return (3 * normal(rows, classes, seed=3)).softmax(-1).float()


def inputs(rows: int, classes: int, width: int, spread: float = 1.0) -> dict[str, Tensor]:
    """Logits of this standard deviation, about."""
    weight = spread * normal(classes, width, seed=1) / width**0.5
    return {"hidden": normal(rows, width), "weight": weight, "bias": 0.5 * normal(classes, seed=2)}


LOSSES = [(masked_region_loss, masked_region_loss_torch), (words, words_torch)]
BOTH = pytest.mark.parametrize(("loss", "plain"), LOSSES)


@BOTH
@KEEPING
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0, 30.0])
def test_logits_of_any_size(
    monkeypatch: pytest.MonkeyPatch,
    loss: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    limit: float,
    spread: float,
) -> None:
    """Several tiles of classes, the last one not full; from almost equal probabilities to certainty."""
    monkeypatch.setattr(masked_rows, "KEPT_LOGITS", limit)
    target = target_of(loss, 24, 290)
    ours, theirs, truth = (in_turn(f, target, parts=4) for f in (loss, plain, divergence))
    check(ours, theirs, truth, inputs(24, 290, 40, spread))


@BOTH
@KEEPING
def test_all_logits_large(
    monkeypatch: pytest.MonkeyPatch, loss: Callable[..., Tensor], plain: Callable[..., Tensor], limit: float
) -> None:
    """A softmax does not change when all logits grow by 300; its gradients stay as exact as torch's."""
    monkeypatch.setattr(masked_rows, "KEPT_LOGITS", limit)
    given = inputs(12, 200, 16)
    given["bias"] += 300
    given = {name: value.float().double() for name, value in given.items()}
    target = target_of(loss, 12, 200)
    ours, theirs, truth = (
        results(f, leaves_of(given, dtype), target=target)
        for f, dtype in ((loss, torch.float32), (plain, torch.float32), (divergence, torch.float64))
    )
    for one, other, wanted in zip(ours[1:], theirs[1:], truth[1:], strict=True):
        rounding = torch.finfo(torch.float32).eps * wanted.norm()
        assert (one - wanted).norm() <= 2 * (other - wanted).norm() + rounding


@BOTH
def test_kept_rows_of_several_blocks(
    monkeypatch: pytest.MonkeyPatch, loss: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> None:
    """Three blocks of rows, the last one smaller, in one part however little memory dlogits may take."""
    monkeypatch.setattr(masked_rows, "KEPT_LOGITS", ALWAYS)
    monkeypatch.setattr(masked_rows, "_DLOGITS_BYTES", 1)
    target = target_of(loss, 2 * 150, 70)
    ours, theirs, truth = (in_turn(f, target, parts=2) for f in (loss, plain, divergence))
    check(ours, theirs, truth, inputs(2 * 150, 70, 16))


@pytest.mark.parametrize("loss", [masked_region_loss, words])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_rows_gathered_inside(
    monkeypatch: pytest.MonkeyPatch, loss: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    """The same bits as with rows gathered before; more columns than class tiles copy at once; again in a second backward."""
    monkeypatch.setattr(masked_rows, "KEPT_LOGITS", ALWAYS)
    leaves, target = leaves_of(inputs(400, 70, 136), dtype), target_of(loss, 150, 70)
    rows = drawn(torch.randperm, 400, seed=5)[:150]
    gathered = {**leaves, "hidden": leaves["hidden"].detach()[rows].requires_grad_()}
    value, dhidden, *others = results(loss, gathered, target=target)
    before = [value, torch.zeros_like(leaves["hidden"]).index_copy(0, rows, dhidden), *others]
    for _ in range(2):
        assert all(map(torch.equal, results(loss, leaves, target=target, rows=rows), before))
    again = 3 * loss(**leaves, target=target, rows=rows)
    for keep_graph in (True, False):
        gradients = torch.autograd.grad(again, list(leaves.values()), retain_graph=keep_graph)
        assert all(map(torch.equal, gradients, before[1:]))


@pytest.mark.parametrize("loss", [masked_region_loss, words])
@pytest.mark.parametrize(
    ("rows", "share", "recording", "kept"),
    [(19, 0.5, True, True), (20, 0.5, True, False), (19, 0.5, False, False), (1, NEVER, True, False)],
)
def test_when_logits_are_kept(
    monkeypatch: pytest.MonkeyPatch, loss: Callable[..., Tensor], rows: int, share: float, recording: bool, kept: bool
) -> None:
    """Of fewer rows than half of the width of 40, if a gradient is wanted; in the dtype of hidden."""
    monkeypatch.setattr(masked_rows, "KEPT_LOGITS", share)
    forward = masked_rows_triton.row_results
    found: list[tuple[RowResults, Kept | None]] = []

    def watched(x: MaskedRows, keep: bool) -> tuple[RowResults, Kept | None]:
        found.append(forward(x, keep))
        return found[-1]

    monkeypatch.setattr(masked_rows_triton, "row_results", watched)
    leaves, target = leaves_of(inputs(rows, 203, 40), torch.bfloat16), target_of(loss, rows, 203)
    with torch.set_grad_enabled(recording):
        loss(**leaves, target=target)
    ((_, those),) = found
    assert (those is not None) == kept
    if those is not None:
        assert (those.logits.shape, those.logits.dtype) == ((rows, 256), torch.bfloat16)


@pytest.mark.parametrize(("n", "masked", "width"), [(1, 1, 8), (5, 0, 24), (47, 20, 300), (300, 290, 16)])
def test_scattered(n: int, masked: int, width: int) -> None:
    rows = drawn(torch.randperm, n, seed=n)[:masked]
    source = normal(masked, width).float()
    wanted = torch.zeros(n, width, device=DEVICE)
    for i, row in enumerate(rows.tolist()):
        wanted[row] = source[i]
    assert torch.equal(masked_rows_triton.scattered(source, rows, n), wanted)
