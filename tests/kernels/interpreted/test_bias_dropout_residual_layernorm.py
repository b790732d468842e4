"""What follows a projection, on the Triton kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels.bias_dropout_residual_layernorm import bias_dropout_residual_layernorm
from kernels.dropout import Dropout
from tests.kernels.backends import forced, gradients_are_right_along
from tests.kernels.oracle import rows_of
from tests.kernels.test_bias_dropout_residual_layernorm import (
    DROPOUTS,
    checked,
    gradients,
    inputs,
    test_a_large_mean_does_not_hurt_the_variance,
    test_no_rows,
    test_one_implementation_serves_blocks_and_autograd,
    test_the_mask_is_that_of_the_definition,
    test_what_does_not_fit_is_refused,
)
from tests.kernels.test_bias_dropout_residual_layernorm import (
    test_gradients_may_overwrite_what_they_came_from as overwritten,
)

__all__ = [
    "test_a_large_mean_does_not_hurt_the_variance",
    "test_no_rows",
    "test_one_implementation_serves_blocks_and_autograd",
    "test_the_mask_is_that_of_the_definition",
    "test_what_does_not_fit_is_refused",
]
SHAPES = [
    ([30, 35], 5, 1),
    ([2], 1024, 1),
    ([7], 768, 1),
    ([1, 64], 64, 0),
    ([101], 96, 1),
    ([256], 24, 1),
    ([306, 1], 5, 0),
]
"""Lengths, width, which of DROPOUTS."""


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    yield from forced("triton")


@pytest.mark.parametrize(("lengths", "width", "dropout"), SHAPES, ids=str)
def test_against_the_oracle(lengths: list[int], width: int, dropout: int) -> None:
    checked(lengths, width, DROPOUTS[dropout])


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["no dropout", "p=0.1"])
def test_gradients(dropout: Dropout | None) -> None:
    rows = rows_of([1, 2])
    gradients_are_right_along(
        lambda **x: bias_dropout_residual_layernorm(**x, rows=rows, dropout=dropout), inputs(3, 9)
    )


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["no dropout", "p=0.1"])
def test_gradients_may_overwrite_what_they_came_from(dropout: Dropout | None) -> None:
    overwritten(dropout, torch.bfloat16)


def test_the_same_bits_every_time() -> None:
    first, second = (gradients([30, 7], 40, DROPOUTS[1], torch.float32) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
