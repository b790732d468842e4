"""Bias and erf-GELU against the formula in float64, on every backend of the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.bias_gelu import bias_gelu, bias_gelu_backward, bias_gelu_forward, bias_gelu_torch
from tests.kernels.backends import HERE, bits_of, forced, in_float32
from tests.kernels.oracle import check, gradients_are_right, normal


@pytest.fixture(params=HERE, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from forced(request.param)


def oracle(x: Tensor, bias: Tensor) -> Tensor:
    z = x + bias
    return 0.5 * z * (1 + torch.special.erf(z / 2**0.5))


def gradients(rows: int, width: int, dtype: torch.dtype, in_place: bool = False) -> list[Tensor]:
    """y by forward; dx, dbias and y again by backward; in_place: dx in dy's memory, y in x's."""
    x, bias, dy = (part.to(dtype) for part in (3 * normal(rows, width), normal(width), normal(rows, width, seed=1)))
    y = bias_gelu_forward(x, bias)
    dx, again = (dy, x) if in_place else (torch.empty_like(dy), torch.empty_like(x))
    dbias = torch.full((width,), 9.0, dtype=dtype)
    bias_gelu_backward(dy, x, bias, dx, dbias, again)
    return [y, dx, dbias, again]


@pytest.mark.parametrize(
    ("rows", "width"), [(1, 1), (1, 3072), (2, 7), (63, 64), (65, 63), (101, 1024), (256, 24), (306, 64)]
)
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
    gradients_are_right(in_float32(bias_gelu), {"x": normal(3, 5), "bias": normal(5)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backward_may_overwrite_what_it_came_from(dtype: torch.dtype) -> None:
    """And computes the forward's output again, bit for bit."""
    apart, together = gradients(67, 72, dtype), gradients(67, 72, dtype, in_place=True)
    assert all(torch.equal(one, other) for one, other in zip(apart, together, strict=True))
    assert torch.equal(apart[0], apart[3])


def test_one_implementation_serves_blocks_and_autograd() -> None:
    x, bias = (3 * normal(67, 72)).float().requires_grad_(), normal(72).float().requires_grad_()
    y = bias_gelu(x, bias)
    y.backward(normal(67, 72, seed=1).float())
    explicit = gradients(67, 72, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip([y, x.grad, bias.grad], explicit[:3], strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_the_same_bits_on_any_number_of_threads(backend: str) -> None:
    bits_of(lambda: gradients(301, 100, torch.float32))


def test_no_rows() -> None:
    y, dx, dbias, again = gradients(0, 24, torch.float32)
    assert y.shape == dx.shape == again.shape == (0, 24) and not dbias.any()


def test_what_does_not_fit_is_refused() -> None:
    x, bias = normal(4, 6).float(), normal(6).float()
    for wrong in (normal(5).float(), normal(6).bfloat16(), normal(1, 6).float()):
        with pytest.raises(ValueError, match="bias_gelu: bias"):
            bias_gelu_forward(x, wrong)
    with pytest.raises(ValueError, match="bias_gelu: dx"):
        bias_gelu_backward(x, x, bias, torch.empty(6, 4).t(), torch.empty(6))
