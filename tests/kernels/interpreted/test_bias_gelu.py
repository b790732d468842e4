"""Bias and erf-GELU, on the Triton kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels.bias_gelu import bias_gelu, bias_gelu_torch
from tests.kernels.backends import forced
from tests.kernels.oracle import check, normal
from tests.kernels.test_bias_gelu import (
    gradients,
    oracle,
    test_backward_may_overwrite_what_it_came_from,
    test_far_tails_are_exact,
    test_gradients,
    test_no_rows,
    test_one_implementation_serves_blocks_and_autograd,
    test_what_does_not_fit_is_refused,
)

__all__ = [
    "test_backward_may_overwrite_what_it_came_from",
    "test_far_tails_are_exact",
    "test_gradients",
    "test_no_rows",
    "test_one_implementation_serves_blocks_and_autograd",
    "test_what_does_not_fit_is_refused",
]


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    yield from forced("triton")


@pytest.mark.parametrize(
    ("rows", "width"), [(1, 1), (1, 768), (65, 5), (7, 96), (65, 64), (101, 1024), (256, 24), (306, 5)]
)
def test_against_the_oracle(rows: int, width: int) -> None:
    check(bias_gelu, bias_gelu_torch, oracle, {"x": 3 * normal(rows, width), "bias": normal(width)})


def test_the_same_bits_every_time() -> None:
    first, second = (gradients(150, 40, torch.float32) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
