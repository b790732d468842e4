"""The tests of the answer heads' loss again, on the Triton kernels in its interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.backends import forced
from tests.kernels.test_soft_label_bce import (
    test_a_small_gradient_survives_float16,
    test_against_the_oracle,
    test_gradients,
    test_huge_logits_stay_finite,
    test_of_equal_logits_the_first_counts,
    test_the_same_bits_every_time,
    test_without_gradient,
)

__all__ = [
    "test_a_small_gradient_survives_float16",
    "test_against_the_oracle",
    "test_gradients",
    "test_huge_logits_stay_finite",
    "test_of_equal_logits_the_first_counts",
    "test_the_same_bits_every_time",
    "test_without_gradient",
]


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    yield from forced("triton")
