"""Bias and erf-GELU against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.bias_gelu import bias_gelu, bias_gelu_torch
from tests.kernels.oracle import check, gradients_are_right, normal


def oracle(x: Tensor, bias: Tensor) -> Tensor:
    z = x + bias
    return 0.5 * z * (1 + torch.special.erf(z / 2**0.5))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 3072), (2, 7), (63, 64), (65, 63), (101, 1024)])
def test_against_the_oracle(rows: int, width: int) -> None:
    check(bias_gelu, bias_gelu_torch, oracle, {"x": 3 * normal(rows, width), "bias": normal(width)})


def test_far_tails_are_exact() -> None:
    """Where Φ is 0 or 1 to the last bit: -0 or x, and a slope of 0 or 1."""
    x = torch.tensor([[-40.0, -20.0, 0.0, 20.0, 40.0]], requires_grad=True)
    y = bias_gelu(x, torch.zeros(5))
    y.sum().backward()
    assert y.tolist() == [[0.0, 0.0, 0.0, 20.0, 40.0]]
    assert x.grad is not None and x.grad.tolist() == [[0.0, 0.0, 0.5, 1.0, 1.0]]


def test_gradients() -> None:
    gradients_are_right(bias_gelu, {"x": normal(3, 5), "bias": normal(5)})
