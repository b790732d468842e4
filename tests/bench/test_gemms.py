"""The recorder of products, against lists counted by hand, and its replay."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gemms import Gemm, GemmRecorder, GemmTimes, Replay


def shapes(gemm: Gemm) -> tuple[tuple[int, ...], ...]:
    """(a, b, out) of a product."""
    return (*(operand.shape for operand in gemm.operands[-2:]), gemm.out.shape)


def test_a_linear_layer_by_hand() -> None:
    """Forward, the input's gradient and the weight's: three products of 2 · 12 · 7 · 5 operations."""
    x, weight, bias = torch.randn(12, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True), torch.randn(5)
    with GemmRecorder() as recorder:
        F.linear(x, weight, bias).square().sum().backward()
    assert [shapes(gemm) for gemm in recorder.gemms] == [
        ((12, 7), (7, 5), (12, 5)), ((12, 5), (5, 7), (12, 7)), ((5, 12), (12, 7), (5, 7)),
    ]  # fmt: skip
    assert [gemm.flops for gemm in recorder.gemms] == [2 * 12 * 7 * 5] * 3
    assert recorder.gemms[0].operands[-1].stride == (1, 7), "the weight as it lies, transposed"


def test_attention_and_other_work() -> None:
    q, k = torch.randn(3, 4, 8), torch.randn(3, 6, 8)
    with GemmRecorder() as recorder:
        (q @ k.transpose(1, 2)).softmax(-1).sum()
    assert [shapes(gemm) for gemm in recorder.gemms] == [((3, 4, 8), (3, 8, 6), (3, 4, 6))]
    assert recorder.gemms[0].flops == 2 * 3 * 4 * 8 * 6


class _Explicit(torch.autograd.Function):
    """A block with a backward of its own, as the engine has: products written into memory that is there."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        flat = torch.empty(weight.numel() + 3)
        dweight = flat[3:].view(weight.shape)
        torch.mm(dy.t(), x, out=dweight)
        dx = torch.zeros_like(x)
        return dx.addmm_(dy, weight), dweight


def test_products_of_an_explicit_backward() -> None:
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    with GemmRecorder() as recorder:
        _Explicit.apply(x, weight).sum().backward()
    assert [shapes(gemm) for gemm in recorder.gemms] == [
        ((4, 3), (3, 2), (4, 2)), ((2, 4), (4, 3), (2, 3)), ((4, 2), (2, 3), (4, 3)),
    ]  # fmt: skip
    assert recorder.gemms[2].out == recorder.gemms[2].operands[0], "added onto what was there"


def test_the_replay_runs_the_same_list() -> None:
    """Same shapes, strides and dtypes; equal addresses are one buffer."""
    weight = torch.randn(5, 7, dtype=torch.bfloat16)
    with GemmRecorder() as recorder:
        first = torch.randn(4, 7, dtype=torch.bfloat16) @ weight.t()
        torch.addmm(torch.zeros(5, dtype=torch.bfloat16), torch.randn(6, 7, dtype=torch.bfloat16), weight.t(), beta=0.5)
    assert first.shape == (4, 5)
    replay = Replay(recorder.gemms)
    with GemmRecorder() as again:
        assert replay.seconds() > 0
    strip = [(shapes(gemm), gemm.out.dtype, gemm.operands[-1].stride, gemm.scalars) for gemm in recorder.gemms]
    assert strip == [(shapes(gemm), gemm.out.dtype, gemm.operands[-1].stride, gemm.scalars) for gemm in again.gemms]
    assert again.gemms[0].operands[1].address == again.gemms[1].operands[2].address


def test_share_is_median_over_median() -> None:
    assert GemmTimes([3.0, 1.0, 9.0], [6.0, 4.0, 5.0], products=1, flops=1).share == 3 / 5
