"""The same tests on every backend: forced, and in float32 where a test works in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import native_library
from kernels.backends import using
from tests.kernels.oracle import DEVICE, normal

HERE = ["torch", "native"] if DEVICE.type == "cpu" else ["torch", "triton"]
"""Those that the device has; on a CPU `tests/kernels/interpreted` runs the third."""

REFUSED_ON_THE_CPU = pytest.mark.skipif(
    DEVICE.type != "cpu",
    reason="a GPU's host would have to wait for the labels to look at them; torch's own check ends the process",
)


def forced(backend: str) -> Iterator[str]:
    """For a fixture: all ops use this backend while the test runs; skipped where it cannot be had."""
    if backend == "native" and DEVICE.type != "cpu":
        pytest.skip("the native kernels are for the CPU")
    if backend == "native" and not native_library.available():
        pytest.skip(f"no native kernels here: {native_library.reason()}")
    with using(backend):
        yield backend


def in_float32(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`op` on float64 tensors given by name, computed in float32: float64 has the plain torch path only."""

    def computed(**inputs: Any) -> Tensor:
        return op(**{name: value.float() for name, value in inputs.items()}).double()

    return computed


def gradients_are_right_along(op: Callable[..., Tensor], inputs: dict[str, Tensor]) -> None:
    """Gradients against finite differences in one direction through all inputs: two calls of `op` where
    `gradients_are_right` makes hundreds. In float32."""
    leaves = {name: value.float().requires_grad_() for name, value in inputs.items()}
    directions = {name: normal(*value.shape, seed=20 + i).float() for i, (name, value) in enumerate(inputs.items())}
    y = op(**leaves)
    weights = normal(*y.shape, seed=30).float()
    y.backward(weights)
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    slope = sum(float((gradients[name] * directions[name]).sum()) for name in leaves)
    moved = [{name: leaf.detach() + step * directions[name] for name, leaf in leaves.items()} for step in (1e-2, -1e-2)]
    high, low = (float((op(**x) * weights).sum()) for x in moved)
    assert slope == pytest.approx((high - low) / 2e-2, rel=1e-2, abs=1e-2)


def bits_of(function: Callable[[], Any]) -> list[Tensor]:
    """What `function` gives on one thread, which must be what it gives on two, bit for bit."""
    threads = torch.get_num_threads()
    found: list[list[Tensor]] = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(list(function()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))
    return found[0]
