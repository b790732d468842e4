"""The published AdamW against its formula in float64, on every backend of the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.adamw import adamw, square_sum
from tests.kernels.backends import HERE, bits_of, forced
from tests.kernels.oracle import DEVICE, normal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULE: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
GO, SKIP = torch.tensor(0.0), torch.tensor(1.0)


@pytest.fixture(params=HERE, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from forced(request.param)


def allowed(ulps: float, backend: str) -> float:
    """On a GPU torch's fused AdamW forms 1 − β in float32, where 1 − 0.999 is off by 500 of its last places."""
    return ulps * 100 if backend == "torch" and DEVICE.type != "cpu" else ulps


class State(NamedTuple):
    """A parameter in the middle of a run."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weights: Tensor | None

    @classmethod
    def of(cls, n: int, dtype: torch.dtype) -> State:
        master = normal(n, seed=1).float()
        weights = None if dtype is torch.float32 else master.to(dtype)
        return cls(master, 0.1 * normal(n, seed=2).float(), 0.01 * normal(n, seed=3).float().square(), weights)

    def tensors(self) -> list[Tensor]:
        return [x.clone() for x in self if x is not None]


def formula(gradient: Tensor, state: State, rule: dict[str, Any]) -> list[Tensor]:
    """Spec section 4.4, in float64: master, exp_avg, exp_avg_sq."""
    g, p, m, v = (x.double() for x in (gradient, *state[:3]))
    beta1, beta2 = rule["betas"]
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p = p - rule["lr"] * m / (v.sqrt() + rule["eps"])
    return [p - rule["lr"] * rule["weight_decay"] * p, m, v]


def closeness(found: Tensor, expected: Tensor) -> float:
    """Largest error in units of float32's rounding, at the size of the values."""
    return float((found.double() - expected).abs().max() / expected.abs().max() / torch.finfo(torch.float32).eps)


def farthest(state: State, expected: Sequence[Tensor]) -> float:
    """The largest closeness of master, exp_avg and exp_avg_sq."""
    return max(closeness(found, right) for found, right in zip(state[:3], expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 63, 64, 65, 1000, 70_001])
def test_a_step_is_the_formula(n: int, dtype: torch.dtype, backend: str) -> None:
    state, gradient = State.of(n, dtype), normal(n).to(dtype)
    expected = formula(gradient, state, RULE)
    adamw(gradient, *state, **RULE, skipped=GO)
    assert farthest(state, expected) < allowed(2, backend)
    assert state.weights is None or torch.equal(state.weights, state.master.to(dtype))


@pytest.mark.parametrize(
    "rule", [RULE | {"weight_decay": 0.0}, RULE | {"lr": 0.0}, RULE | {"lr": 0.5, "betas": (0.0, 0.0)}]
)
def test_other_rules(rule: dict[str, Any], backend: str) -> None:
    state, gradient = State.of(500, torch.float32), normal(500).float()
    expected = formula(gradient, state, rule)
    adamw(gradient, *state, **rule, skipped=GO)
    assert farthest(state, expected) < allowed(4, backend)


def test_a_run_stays_with_the_formula(backend: str) -> None:
    """Weights of bfloat16 do not lose updates that are smaller than their own rounding: the master has them."""
    state = State.of(300, torch.bfloat16)
    exact = State._make([*(x.double() for x in state[:3]), None])
    for step in range(50):
        gradient = normal(300, seed=10 + step).bfloat16()
        adamw(gradient, *state, **RULE, skipped=GO)
        exact = State._make([*formula(gradient, exact, RULE), None])
    assert farthest(state, exact[:3]) < allowed(20, backend)
    assert state.weights is not None and torch.equal(state.weights, state.master.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skipped", [SKIP, torch.tensor([2.5])])
def test_nothing_changes_where_the_step_is_skipped(skipped: Tensor, dtype: torch.dtype) -> None:
    state = State.of(1000, dtype)
    before = state.tensors()
    adamw(torch.full((1000,), float("nan"), dtype=dtype), *state, **RULE, skipped=skipped)
    assert all(torch.equal(one, other) for one, other in zip(before, state.tensors(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 65, 16_384, 70_001])
def test_the_sum_of_squares(n: int, dtype: torch.dtype) -> None:
    x = normal(n).to(dtype)
    found = square_sum(x)
    assert found.shape == () and found.dtype is torch.float32
    assert float(found) == pytest.approx(float(x.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_sum_of_squares_shows_what_is_not_finite(value: float) -> None:
    x = normal(1000).float()
    x[777] = value
    assert not torch.isfinite(square_sum(x))


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_the_same_bits_on_any_number_of_threads(backend: str) -> None:
    gradient = normal(200_001).bfloat16()

    def step() -> list[Tensor]:
        state = State.of(200_001, torch.bfloat16)
        adamw(gradient, *state, **RULE, skipped=GO)
        return [*state.tensors(), square_sum(gradient)]

    bits_of(step)


def test_no_values() -> None:
    adamw(torch.zeros(0), *State.of(0, torch.float32), **RULE, skipped=GO)


@pytest.mark.parametrize(
    "wrong",
    [
        {"gradient": torch.zeros(9)},
        {"gradient": torch.zeros(20)[::2]},
        {"exp_avg": torch.zeros(10).double()},
        {"weights": torch.zeros(10).bfloat16()},
        {"skipped": torch.zeros(2)},
        {"skipped": torch.tensor(1)},
    ],
    ids=["size", "strided", "moment", "weights", "two flags", "whole flag"],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Tensor]) -> None:
    given = {"gradient": torch.zeros(10), **State.of(10, torch.float32)._asdict(), "skipped": GO}
    with pytest.raises(ValueError, match="adamw: "):
        adamw(**(given | wrong), **RULE)
