"""The update rule θs ∪ θt: the published AdamW (spec section 4.4), who is stepped, masters, and the guard."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.assembly import Parts, assemble
from kernels.backends import report, using
from tests.engine.small_run import configure

BETAS, EPS, DECAY = (0.9, 0.999), 1e-6, 0.01


def published(parameter: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """The published rule in float64."""
    parameter, m, v = parameter.double(), torch.zeros_like(parameter).double(), torch.zeros_like(parameter).double()
    for gradient in gradients:
        m = BETAS[0] * m + (1 - BETAS[0]) * gradient.double()
        v = BETAS[1] * v + (1 - BETAS[1]) * gradient.double() ** 2
        parameter = parameter - lr * m / (v.sqrt() + EPS)
        parameter = parameter - lr * decay * parameter
    return parameter


def give_gradients(parts: Parts, head: str, seed: int) -> dict[str, Tensor]:
    """Gradients of normals for trunk and head; returned by parameter name."""
    generator, given = torch.Generator().manual_seed(seed), {}
    for name, parameter in parts.model.named_parameters():
        if name.startswith(("trunk.", f"heads.{head}.")):
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            given[name] = parameter.grad.clone()
    return given


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_three_steps_are_those_of_the_published_rule(tmp_path: Path, precision: str, backend: str) -> None:
    parts = assemble(configure(tmp_path, f"precision={precision}"))
    masters = {name.replace("/", "."): master for name, master in parts.optimizer.masters().items()}
    masters = {name: masters[name.removeprefix("heads.")] for name, _ in parts.model.named_parameters()}
    started = {name: master.clone() for name, master in masters.items()}
    gradients: dict[str, list[Tensor]] = {name: [] for name in started}
    with using(backend):
        for seed in range(3):
            for name, gradient in give_gradients(parts, "answer_head", seed).items():
                gradients[name].append(gradient)
            parts.optimizer.step("answer_head", 0.5, torch.tensor(1.0))
    lr = 0.5 * parts.optimizer.units["trunk"].lr
    for name, parameter in parts.model.named_parameters():
        expected = published(started[name], gradients[name], lr, DECAY if name.endswith("matrices") else 0.0)
        ours = masters[name].double()
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-4 * lr)
        assert torch.equal(parameter.detach(), masters[name].to(parameter.dtype)), name
        if not gradients[name]:
            assert torch.equal(ours, started[name].double()), f"{name} did not run and moved"


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_a_bad_gradient_changes_nothing(tmp_path: Path, backend: str, bad: float) -> None:
    parts = assemble(configure(tmp_path, "precision=bfloat16"))
    with using(backend):
        give_gradients(parts, "answer_head", 1)
        parts.optimizer.step("answer_head", 1.0, torch.tensor(1.0))
        before = {key: value.clone() for key, value in parts.optimizer.state_dict().items()}
        weights = [parameter.detach().clone() for parameter in parts.model.parameters()]
        give_gradients(parts, "answer_head", 2)
        gradient = parts.model.trunk.poolers.vectors.grad
        assert gradient is not None
        gradient[3] = bad
        _, skipped = parts.optimizer.step("answer_head", 1.0, torch.tensor(1.0))
    assert float(skipped) == 1
    after = parts.optimizer.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items() if not key.endswith("/steps"))
    assert all(torch.equal(a, b) for a, b in zip(weights, parts.model.parameters(), strict=True))


def test_the_gradient_norm_is_over_trunk_and_head(tmp_path: Path) -> None:
    parts = assemble(configure(tmp_path))
    given = give_gradients(parts, "pair_head", 7)
    norm, _ = parts.optimizer.step("pair_head", 1.0, torch.tensor(1.0))
    expected = torch.stack([g.double().square().sum() for g in given.values()]).sum().sqrt()
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0.0)


def test_missing_gradients_count_as_zeros_in_the_trunk(tmp_path: Path) -> None:
    parts = assemble(configure(tmp_path))
    give_gradients(parts, "answer_head", 1)
    parts.optimizer.step("answer_head", 1.0, torch.tensor(1.0))
    weights = parts.model.trunk.poolers.matrices.detach().clone()
    give_gradients(parts, "region_head", 2)
    parts.model.trunk.poolers.drop_gradients()
    parts.optimizer.step("region_head", 1.0, torch.tensor(1.0))
    assert not torch.equal(weights, parts.model.trunk.poolers.matrices), "momentum goes on where no gradient arrives"


def test_a_run_does_not_leave_its_kernels_to_the_next(tmp_path: Path) -> None:
    device = torch.device("cpu")
    before = report(device)
    assemble(configure(tmp_path, "kernels=torch"))
    assert {choice.backend for choice in report(device)} == {"torch"}
    assemble(configure(tmp_path))
    assert report(device) == before
