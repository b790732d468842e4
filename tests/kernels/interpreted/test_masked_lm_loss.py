"""The tests of masked words again, on the Triton kernels in its interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.backends import forced
from tests.kernels.test_masked_lm_loss import (
    test_against_the_oracle,
    test_gradients,
    test_huge_logits,
    test_in_chunks,
    test_logits_of_all_masked_rows_never_exist,
    test_nothing_masked_is_no_loss_and_no_gradient,
    test_rows_gathered_inside,
    test_the_same_bits_every_time,
)

__all__ = [
    "test_against_the_oracle",
    "test_gradients",
    "test_huge_logits",
    "test_in_chunks",
    "test_logits_of_all_masked_rows_never_exist",
    "test_nothing_masked_is_no_loss_and_no_gradient",
    "test_rows_gathered_inside",
    "test_the_same_bits_every_time",
]


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    yield from forced("triton")
