"""Parameters stepped together are what the formula says, on every backend of the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.adamw_many import Together
from tests.kernels.backends import HERE, forced
from tests.kernels.oracle import normal
from tests.kernels.test_adamw import DTYPES, GO, RULE, SKIP, State, allowed, farthest, formula

SIZES = [1, 7, 4096, 4097, 12_288, 30_001]
"""Within a chunk, whole chunks, and over their ends."""
DECAYS = [True, False, True, True, False, False]


@pytest.fixture(params=HERE, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from forced(request.param)


def states_of(dtype: torch.dtype) -> list[State]:
    return [State.of(n, dtype) for n in SIZES]


def together(of: list[State], decays: list[bool] = DECAYS) -> Together:
    return Together(
        [x.master for x in of], [x.exp_avg for x in of], [x.exp_avg_sq for x in of], [x.weights for x in of], decays
    )


def gradients(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    return [normal(n, seed=seed).to(dtype) for n in SIZES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_together_is_one_by_one(dtype: torch.dtype, backend: str) -> None:
    states, exact = states_of(dtype), states_of(dtype)
    stepped = together(states)
    for step in range(3):  # with gradients at other places each time
        found = gradients(dtype, seed=step)
        stepped.step(found, **RULE, skipped=GO)
        rules = [RULE | {"weight_decay": RULE["weight_decay"] * decays} for decays in DECAYS]
        exact = [
            State._make([*formula(gradient, state, rule), None])
            for gradient, state, rule in zip(found, exact, rules, strict=True)
        ]
    for state, expected in zip(states, exact, strict=True):
        assert farthest(state, expected[:3]) < allowed(4, backend)
        assert state.weights is None or torch.equal(state.weights, state.master.to(dtype))


def test_nothing_changes_where_the_step_is_skipped() -> None:
    ours = states_of(torch.bfloat16)
    before = [state.tensors() for state in ours]
    together(ours).step([torch.full_like(x, torch.nan) for x in gradients(torch.bfloat16)], **RULE, skipped=SKIP)
    assert all(
        torch.equal(*pair)
        for old, new in zip(before, ours, strict=True)
        for pair in zip(old, new.tensors(), strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_of_squares(dtype: torch.dtype) -> None:
    found = gradients(dtype)
    expected = sum(float(x.double().square().sum()) for x in found)
    sums = torch.cat(together(states_of(dtype)).square_sums(found))
    assert sums.dtype is torch.float32 and sums.dim() == 1
    assert float(sums.sum()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_sum_of_squares_shows_what_is_not_finite(value: float) -> None:
    found = gradients(torch.float32)
    found[4][-1] = value
    sums = torch.cat(together(states_of(torch.float32)).square_sums(found))
    assert not torch.isfinite(sums.sum())


def test_what_is_not_aligned_is_stepped_all_the_same() -> None:
    ours, expected = states_of(torch.float32), states_of(torch.float32)
    found = [torch.cat((x.new_zeros(1), x))[1:] for x in gradients(torch.float32)]
    together(ours).step(found, **RULE, skipped=GO)
    together(expected).step([x.clone() for x in found], **RULE, skipped=GO)
    assert all(torch.equal(one.master, other.master) for one, other in zip(ours, expected, strict=True))


def test_memory_that_came_anew_is_found(backend: str) -> None:
    """As a benchmark does it that gives the moments' memory back between tasks."""
    ours = states_of(torch.float32)
    stepped, found = together(ours), gradients(torch.float32)
    stepped.step(found, **RULE, skipped=GO)
    for state in ours:
        storage, size = state.exp_avg.untyped_storage(), state.exp_avg.untyped_storage().nbytes()
        storage.resize_(0)
        storage.resize_(size)
        state.exp_avg.zero_()
    before = [state.master.clone() for state in ours]
    stepped.step([torch.zeros_like(x) for x in found], **RULE | {"weight_decay": 0.0}, skipped=GO)
    assert all(torch.equal(master, state.master) for master, state in zip(before, ours, strict=True))


@pytest.mark.parametrize("wrong", [gradients(torch.float32)[::-1], gradients(torch.float16)], ids=["sizes", "dtype"])
def test_gradients_that_do_not_fit_are_refused(wrong: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="adamw"):
        together(states_of(torch.bfloat16)).step(wrong, **RULE, skipped=GO)
