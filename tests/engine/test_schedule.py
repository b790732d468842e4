"""Learning-rate multipliers: where they start, peak and end, and that they equal the published decay."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.schedule import longest_task_iterations, multiplier, warmup_iterations

Decay = Literal["linear", "constant"]
DECAYS: list[Decay] = ["linear", "constant"]


def test_warmup_is_a_tenth_of_the_shorter_of_run_and_longest_task() -> None:
    longest = longest_task_iterations([4236, 10112, 256])
    assert longest == 202240
    assert warmup_iterations(40000, longest) == 4000
    assert warmup_iterations(300000, longest) == 20224
    assert warmup_iterations(300, longest, fraction=0.0) == 0


def test_the_first_update_is_not_at_rate_zero_and_warmup_reaches_one() -> None:
    rates = [multiplier(i, 4, 10) for i in range(1, 11)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[-1] == pytest.approx(1 / 6)


@given(st.integers(2, 5000), st.data())
def test_linear_decay_is_the_published_one(total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    iteration = data.draw(st.integers(warmup + 1, total))
    published_step = iteration - 1  # the published loop counts from 0
    assert multiplier(iteration, warmup, total) == pytest.approx((total - published_step) / (total - warmup))


@given(st.integers(1, 500), st.data(), st.sampled_from(DECAYS))
def test_rates_lie_in_0_1_and_rise_then_fall(total: int, data: st.DataObject, decay: Decay) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    rates = [multiplier(i, warmup, total, decay) for i in range(1, total + 1)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_steps_multiply_at_each_boundary() -> None:
    rates = [multiplier(i, 1, 6, "steps", (3, 5), 0.2) for i in range(1, 7)]
    assert rates == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])


def test_iterations_outside_the_run_are_refused() -> None:
    for iteration in (0, 11):
        with pytest.raises(ValueError, match="outside"):
            multiplier(iteration, 2, 10)
