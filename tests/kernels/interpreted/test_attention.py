"""Self-attention, on the Triton kernels: in their interpreter, or compiled where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels.dropout import Dropout
from tests.kernels.backends import forced, gradients_are_right_along
from tests.kernels.oracle import rows_of
from tests.kernels.test_attention import (
    DROPOUTS,
    attention,
    check_attention,
    check_mask,
    in_one_dtype,
    projections,
    results,
    test_a_context_dies_with_its_last_user,
    test_an_item_does_not_see_its_neighbours,
    test_gradients_are_written_in_place,
    test_the_step_may_be_on_the_device,
    test_what_does_not_fit_is_refused,
)

__all__ = [
    "test_a_context_dies_with_its_last_user",
    "test_an_item_does_not_see_its_neighbours",
    "test_gradients_are_written_in_place",
    "test_the_step_may_be_on_the_device",
    "test_what_does_not_fit_is_refused",
]


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    yield from forced("triton")


@pytest.mark.parametrize(
    ("lengths", "dropout"),
    [([1, 2, 7], DROPOUTS[1]), ([13, 16, 1], None), ([63, 31], DROPOUTS[2]), ([64], None), ([65], DROPOUTS[1])],
    ids=str,
)
def test_against_the_oracle(lengths: list[int], dropout: Dropout | None) -> None:
    rows = rows_of(lengths)
    check_attention(rows, rows, dropout, heads=2 if max(lengths) < 32 else 1, width=16)


@pytest.mark.parametrize(
    ("dtype", "queries", "keys"),
    [(torch.float32, [101, 2], [33, 1]), (torch.bfloat16, [101], [101]), (torch.bfloat16, [306], [256])],
    ids=str,
)
def test_long_items(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, queries: list[int], keys: list[int]) -> None:
    in_one_dtype(monkeypatch, dtype)
    check_attention(rows_of(queries), rows_of(keys), DROPOUTS[1], heads=1, width=8)


@pytest.mark.parametrize("dropout", DROPOUTS[:2], ids=["no dropout", "p=0.1"])
def test_fewer_queries_than_keys(dropout: Dropout | None) -> None:
    """Row 0 of every item alone."""
    rows = rows_of([70, 1, 33])
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


@pytest.mark.parametrize("dropout", DROPOUTS[:2], ids=["no dropout", "p=0.1"])
def test_gradients(dropout: Dropout | None) -> None:
    rows = rows_of([1, 3, 20])
    inputs = projections(rows, rows, 8)
    gradients_are_right_along(lambda q, k, v: attention(q, k, v, rows, rows, 2, dropout), inputs)


def test_the_same_bits_every_time() -> None:
    first, second = (results([33, 1, 70]) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
