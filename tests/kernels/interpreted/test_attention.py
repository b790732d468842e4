"""Self-attention, on the Triton kernels: in their interpreter, or compiled where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels.attention import attention
from kernels.dropout import Dropout
from tests.kernels.backends import forced, gradients_are_right_along
from tests.kernels.oracle import rows_of
from tests.kernels.test_attention import (
    DROPOUTS,
    DROPPED,
    check_attention,
    check_mask,
    in_one_dtype,
    projections,
    results,
    test_a_context_dies_with_its_last_user,
    test_gradients_are_written_in_place,
    test_the_step_may_be_on_the_device,
    test_what_does_not_fit_is_refused,
)

__all__ = [
    "test_a_context_dies_with_its_last_user",
    "test_gradients_are_written_in_place",
    "test_the_step_may_be_on_the_device",
    "test_what_does_not_fit_is_refused",
]


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    yield from forced("triton")


@pytest.mark.parametrize("dropout", DROPOUTS[:2], ids=DROPPED[:2])
def test_against_the_oracle(dropout: Dropout | None) -> None:
    rows = rows_of([1, 2, 7])
    check_attention(rows, rows, dropout)


@pytest.mark.parametrize(
    ("dtype", "queries", "keys"),
    [
        (torch.float32, [13, 16], [16, 1]),
        (torch.float32, [5, 1], [33, 64]),
        (torch.float32, [65], [17]),
        (torch.bfloat16, [63, 31], [63, 31]),
        (torch.bfloat16, [64], [64]),
        (torch.bfloat16, [65], [65]),
        (torch.bfloat16, [101, 7], [101, 7]),
        (torch.bfloat16, [306], [23]),
        (torch.bfloat16, [12], [256]),
    ],
    ids=str,
)
def test_either_side_short_or_long(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, queries: list[int], keys: list[int]
) -> None:
    """In float32 tiles are smaller, so that 17 rows are many."""
    in_one_dtype(monkeypatch, dtype)
    check_attention(rows_of(queries), rows_of(keys), DROPOUTS[1], heads=1, width=8)


@pytest.mark.parametrize("dropout", DROPOUTS[:2], ids=DROPPED[:2])
def test_fewer_queries_than_keys(dropout: Dropout | None) -> None:
    """Row 0 of every item alone."""
    rows = rows_of([70, 1, 3])
    check_attention(rows.first, rows, dropout, heads=1, width=8)


@pytest.mark.parametrize(("head_dim", "length"), [(24, 37), (64, 64), (64, 70), (128, 31), (128, 70)])
def test_widths_of_a_head(monkeypatch: pytest.MonkeyPatch, head_dim: int, length: int) -> None:
    in_one_dtype(monkeypatch, torch.bfloat16)
    rows = rows_of([3, length])
    check_attention(rows, rows, DROPOUTS[1], heads=1, width=head_dim)


def test_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_dtype(monkeypatch, torch.float16)
    rows = rows_of([5, 63])
    check_attention(rows, rows, DROPOUTS[1], heads=1, width=8)


@pytest.mark.parametrize(
    ("lengths", "dropout", "dtype"),
    [
        ([1, 31, 8], DROPOUTS[1], torch.float32),
        ([40], DROPOUTS[2], torch.float32),
        ([64, 3], DROPOUTS[1], torch.bfloat16),
        ([101, 65], DROPOUTS[2], torch.bfloat16),
    ],
    ids=str,
)
def test_the_mask_is_that_of_the_definition(lengths: list[int], dropout: Dropout, dtype: torch.dtype) -> None:
    check_mask(lengths, dropout, dtype)


@pytest.mark.parametrize("dropout", DROPOUTS[:2], ids=DROPPED[:2])
def test_gradients(dropout: Dropout | None) -> None:
    rows = rows_of([1, 3, 20])
    inputs = projections(rows, rows, 8)
    gradients_are_right_along(lambda q, k, v: attention(q, k, v, rows, rows, 2, dropout), inputs)


def test_the_same_bits_every_time() -> None:
    first, second = (results([1, 70]) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
