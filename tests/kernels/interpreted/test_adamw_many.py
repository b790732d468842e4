"""AdamW on many parameters, on the Triton kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.backends import forced
from tests.kernels.test_adamw_many import (
    test_gradients_that_do_not_fit_are_refused,
    test_nothing_changes_where_the_step_is_skipped,
    test_the_sum_of_squares,
    test_the_sum_of_squares_shows_what_is_not_finite,
    test_together_is_one_by_one,
    test_what_is_not_aligned_is_stepped_all_the_same,
)

__all__ = [
    "test_gradients_that_do_not_fit_are_refused",
    "test_nothing_changes_where_the_step_is_skipped",
    "test_the_sum_of_squares",
    "test_the_sum_of_squares_shows_what_is_not_finite",
    "test_together_is_one_by_one",
    "test_what_is_not_aligned_is_stepped_all_the_same",
]


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    yield from forced("triton")
