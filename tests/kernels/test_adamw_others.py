"""Ops of other projects by name: refused with a reason where they are not, the published rule where they are.

apex runs on GPUs only and is rarely installed: a stand-in with its interface and its rule takes its place.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import adamw_others, backends
from kernels.adamw import adamw, decay_first, square_sum
from kernels.backends import UnusableBackend, choose, using
from kernels.bias_dropout_residual_layernorm import OP, bias_dropout_residual_layernorm
from kernels.names import parse
from tests.kernels.oracle import DEVICE, normal, rows_of
from tests.kernels.test_adamw import GO, RULE, SKIP, State, closeness, formula


class StandIn(torch.optim.Optimizer):
    """The rule of apex's FusedAdam and of both of DeepSpeed's: decay beside the step."""

    def __init__(self, parameters: list[nn.Parameter], bias_correction: bool, adam_w_mode: bool) -> None:
        assert adam_w_mode and not bias_correction
        super().__init__(parameters, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for p in group["params"]:
                assert p.grad.dtype is torch.float32
                state = self.state[p]
                state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.sub_(lr * (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"]) + decay * p))


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, normalized_shape: torch.Size, eps: float) -> Tensor:
    return nn.functional.layer_norm(x, normalized_shape, weight, bias, eps)


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were installed, with a GPU."""
    for name, attributes in (
        ("apex.optimizers", {"FusedAdam": StandIn}),
        ("apex.normalization.fused_layer_norm", {"fused_layer_norm_affine": _layer_norm}),
    ):
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(backends, "_refuse_unusable", lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_apex_steps_by_the_published_rule(apex: None, dtype: torch.dtype) -> None:
    """Twice: the second step finds the moments of the first."""
    state, exact = State.of(500, dtype), State.of(500, dtype)
    for turn in range(2):
        gradient = normal(500, seed=turn).to(dtype)
        exact = State._make([*formula(gradient, exact, RULE), None])
        with using({"adamw": "apex"}):
            adamw(gradient, *state, **RULE, skipped=GO)
    assert all(closeness(found, right) < 4 for found, right in zip(state[:3], exact[:3], strict=True))
    assert state.weights is None or torch.equal(state.weights, state.master.to(dtype))


def test_a_skipped_step_changes_nothing(apex: None) -> None:
    state = State.of(100, torch.bfloat16)
    before = state.tensors()
    with using({"adamw": "apex"}):
        adamw(torch.full((100,), float("nan")).bfloat16(), *state, **RULE, skipped=SKIP)
        assert float(square_sum(torch.ones(5))) == 5.0, "by the rule's own backend"
    assert all(torch.equal(one, other) for one, other in zip(before, state.tensors(), strict=True))


def test_apex_normalises(apex: None) -> None:
    x, residual = normal(10, 24, seed=1).float().requires_grad_(), normal(10, 24, seed=2).float()
    inputs = (x, normal(24, seed=3).float(), residual, normal(24, seed=4).float(), normal(24, seed=5).float())
    found = {}
    for backend in ("torch", "apex"):
        with using({OP: backend}):
            y = bias_dropout_residual_layernorm(*inputs, rows_of([4, 6]))
        found[backend] = y, *torch.autograd.grad(y.sin().sum(), x)
    assert all(torch.equal(one, other) for one, other in zip(found["torch"], found["apex"], strict=True))


@pytest.mark.slow  # DeepSpeed compiles it first, which takes half a minute
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed (make setup)")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deepspeed_steps_by_the_published_rule(dtype: torch.dtype) -> None:
    """Its fused CPU optimizer, which it compiles when it is first asked for. It takes 1 − β₂ from float32 values, which puts
    second moments off by 12 roundings."""
    state, exact = State.of(1000, dtype), State.of(1000, dtype)
    for turn in range(3):
        gradient = normal(1000, seed=turn).to(dtype)
        exact = State._make([*formula(gradient, exact, RULE), None])
        with using({"adamw": "deepspeed"}):
            adamw(gradient, *state, **RULE, skipped=GO)
    limits = (8, 8, 20)
    assert all(closeness(x, right) < most for x, right, most in zip(state[:3], exact[:3], limits, strict=True))
    assert state.weights is None or torch.equal(state.weights, state.master.to(dtype))


def test_decay_before_the_step_is_decay_after_it() -> None:
    lr, decay = decay_first(0.5, 0.1)
    p, step = 3.0, 0.7
    assert p * (1 - lr * decay) - lr * step == pytest.approx((p - 0.5 * step) * (1 - 0.5 * 0.1))
    assert decay_first(0.0, 0.1) == (0.0, 0.0)


@pytest.mark.skipif(find_spec("apex") is not None, reason="apex is installed")
def test_what_is_not_installed_is_refused_with_the_mend() -> None:
    with using({"adamw": "apex"}), pytest.raises(UnusableBackend, match="adamw: apex is not installed .*from source"):
        choose("adamw", torch.zeros(1, device=DEVICE))


def test_names_are_known_where_there_is_something_behind_them() -> None:
    assert parse("adamw=deepspeed") == {"adamw": "deepspeed"}
    with pytest.raises(ValueError, match="attention: no backend is called 'apex'"):
        parse("attention=apex")
    with pytest.raises(ValueError, match="no backend is called 'apex'"):
        parse("apex")
    assert adamw_others.OTHERS.keys() == {"deepspeed", "apex"}
