"""The feed-forward against float64, and where its activation is computed inside its products, against the ops one by one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import native_library, projection
from kernels.backends import using
from kernels.bias_gelu import bias_gelu_forward
from kernels.feed_forward import feed_forward_backward, feed_forward_forward
from kernels.projection import project
from tests.kernels.backends import HERE, bits_of, forced
from tests.kernels.oracle import DEVICE, normal

ROWS = [1, 2, 7, 31, 33, 64, 65, 101, 256, 306]
SHAPES = [(64, 96), (96, 1024), (768, 160)]
"""(width, inner width)."""

NAMES = ("y", "dx", "dup", "dbias", "ddown")
AMX = DEVICE.type == "cpu" and native_library.available() and native_library.isa() == "amx"


@pytest.fixture(params=HERE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from forced(request.param)


def operands(rows: int, width: int, inner: int) -> tuple[Tensor, ...]:
    """x, U, a, D, dy and a gradient of x that others have left."""
    x, dy, dx = (normal(rows, width, seed=seed) for seed in (1, 2, 3))
    up, down = normal(inner, width, seed=4) / width**0.5, normal(width, inner, seed=5) / inner**0.5
    return tuple(value.to(torch.bfloat16) for value in (x, up, normal(inner, seed=6), down, dy, dx))


def results(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, dy: Tensor, dx: Tensor) -> tuple[Tensor, ...]:
    """Named as in NAMES."""
    y, inner = feed_forward_forward(x, up, bias, down)
    dup, dbias, ddown = (torch.full_like(value, torch.nan) for value in (up, bias, down))
    dx = feed_forward_backward(dy, x, inner, up, bias, down, dx.clone(), dup, dbias, ddown)
    return y, dx, dup, dbias, ddown


@pytest.mark.parametrize(("width", "inner"), SHAPES)
def test_against_float64(backend: str, width: int, inner: int) -> None:
    """At most twice the error of torch in the same dtype."""
    for rows in ROWS:
        inputs = operands(rows, width, inner)
        truth = results(*(value.double() for value in inputs))
        with using("torch"):
            plain = results(*inputs)
        for name, ours, torchs, true in zip(NAMES, results(*inputs), plain, truth, strict=True):
            error, allowed = ((value.double() - true).square().mean().sqrt() for value in (ours, torchs))
            assert error <= 2 * allowed + 2**-9 * true.square().mean().sqrt() / true.numel() ** 0.5, (rows, name)


@pytest.mark.skipif(not AMX, reason="needs a CPU with AMX")
@pytest.mark.parametrize("rows", ROWS)
def test_the_activation_is_that_of_the_ops_one_by_one(rows: int) -> None:
    """To the bit: what backward makes again is what forward used."""
    x, up, bias, *_ = operands(rows, 96, 1024)
    inner, activated = torch.empty(rows, 1024, dtype=x.dtype), torch.empty(rows, 1024, dtype=x.dtype)
    projection.NATIVE["gelu_forward"](x, up, bias, activated, out=inner)
    assert torch.equal(inner, project(x, up))
    assert torch.equal(activated, bias_gelu_forward(inner, bias))
    projection.NATIVE["gelu_gradient"](x, up.t().contiguous(), bias, inner, out=torch.empty_like(inner))
    assert torch.equal(inner, activated)


@pytest.mark.skipif(not AMX, reason="torch's products promise no order of their sums")
@pytest.mark.parametrize("rows", [5, 404])
def test_the_same_bits_on_any_number_of_threads(rows: int) -> None:
    inputs = operands(rows, 192, 256)
    bits_of(lambda: results(*inputs))


@pytest.mark.skipif(not AMX, reason="needs a CPU with AMX")
def test_an_override_of_either_op_takes_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("fused")

    inputs = operands(40, 64, 96)
    for name in ("gelu_forward", "gelu_gradient"):
        monkeypatch.setitem(projection.NATIVE, name, refuse)
    for op in ("bias_gelu", "projection"):
        with using({op: "torch"}):
            results(*inputs)
    with pytest.raises(AssertionError, match="fused"):
        results(*inputs)
