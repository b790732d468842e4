"""The published AdamW, on the Triton kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.backends import forced
from tests.kernels.test_adamw import (
    test_a_step_is_the_formula,
    test_no_values,
    test_nothing_changes_where_the_step_is_skipped,
    test_other_rules,
    test_the_sum_of_squares,
    test_the_sum_of_squares_shows_what_is_not_finite,
    test_what_does_not_fit_is_refused,
)

__all__ = [
    "test_a_step_is_the_formula",
    "test_no_values",
    "test_nothing_changes_where_the_step_is_skipped",
    "test_other_rules",
    "test_the_sum_of_squares",
    "test_the_sum_of_squares_shows_what_is_not_finite",
    "test_what_does_not_fit_is_refused",
]


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    yield from forced("triton")
