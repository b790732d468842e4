"""The image stream's input, on the Triton kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.dropout import Dropout
from kernels.region_embedding import region_embedding
from tests.kernels.backends import forced, gradients_are_right_along
from tests.kernels.oracle import rows_of
from tests.kernels.test_region_embedding import (
    DROPOUTS,
    boxes_of,
    checked,
    inputs,
    results,
    test_no_rows,
)
from tests.kernels.test_region_embedding import test_the_mask_is_that_of_the_definition as masks_of_width

__all__ = ["test_no_rows"]
SHAPES = [([30, 35], 5, 1), ([2], 1024, 1), ([1, 6], 768, 0), ([101], 64, 1), ([256], 24, 1), ([306, 1], 24, 0)]
"""Lengths, width, which of DROPOUTS."""


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    yield from forced("triton")


@pytest.mark.parametrize(("lengths", "width", "dropout"), SHAPES, ids=str)
def test_against_the_oracle(lengths: list[int], width: int, dropout: int) -> None:
    checked(lengths, width, DROPOUTS[dropout])


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["no dropout", "p=0.1"])
def test_gradients(dropout: Dropout | None) -> None:
    def op(x: Tensor, **others: Tensor) -> Tensor:
        return region_embedding(x, **others, boxes=boxes_of(3), rows=rows_of([1, 2]), dropout=dropout)

    gradients_are_right_along(op, inputs(3, 9))


@pytest.mark.parametrize("width", [5, 96, 1024])
def test_the_mask_is_that_of_the_definition(width: int) -> None:
    masks_of_width(width)


def test_the_same_bits_every_time() -> None:
    first, second = (results([125, 7], 24, DROPOUTS[1]) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
