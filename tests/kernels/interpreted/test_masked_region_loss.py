"""The tests of masked regions again, on the Triton kernels in its interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.backends import forced
from tests.kernels.test_masked_region_loss import (
    test_a_perfect_prediction_costs_nothing,
    test_a_second_backward_is_the_first,
    test_against_the_oracle,
    test_gradients,
    test_huge_logits,
    test_in_chunks,
    test_nothing_masked_is_no_loss_and_no_gradient,
    test_only_what_needs_a_gradient_gets_one,
    test_rows_gathered_inside,
    test_targets_of_half_the_size,
    test_targets_that_do_not_sum_to_one,
    test_the_classes_of_the_detector,
    test_the_published_way_gives_the_same_numbers,
    test_the_same_bits_every_time,
)

__all__ = [
    "test_a_perfect_prediction_costs_nothing",
    "test_a_second_backward_is_the_first",
    "test_against_the_oracle",
    "test_gradients",
    "test_huge_logits",
    "test_in_chunks",
    "test_nothing_masked_is_no_loss_and_no_gradient",
    "test_only_what_needs_a_gradient_gets_one",
    "test_rows_gathered_inside",
    "test_targets_of_half_the_size",
    "test_targets_that_do_not_sum_to_one",
    "test_the_classes_of_the_detector",
    "test_the_published_way_gives_the_same_numbers",
    "test_the_same_bits_every_time",
]


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    yield from forced("triton")
