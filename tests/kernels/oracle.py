"""How every op is held to a float64 oracle: its outputs and gradients, in float32 and bfloat16, contiguous and strided.

The rule: the error of the op is at most twice that of its plain torch reference in the same dtype, and the reference
itself stays within a few units of the dtype's rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.backends import interpreting
from kernels.rows import Rows

DEVICE = torch.device("cpu" if interpreting() else os.environ.get("STOPGO_TEST_DEVICE", "cpu"))
"""Where the tests' tensors are; `make gpu` says cuda. What is random is drawn on the CPU: the same numbers everywhere."""

LENGTHS = [1, 2, 7, 63, 64, 65, 101]
"""Ragged on purpose: single rows, primes, and both sides of a tile's end."""

ALONE = [[1], [2], [64], [101]]
"""Batches of one item."""

WITHIN = {torch.float32: 1e-6, torch.bfloat16: 4e-2}
"""Largest error of a plain torch reference, root mean square, relative to the oracle."""

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Inputs = dict[str, Tensor]


def rows_of(lengths: Sequence[int], seed: int = 0) -> Rows:
    """A row space of these lengths, its items with keys of their own."""
    key = drawn(torch.randint, 0, 2**32, (len(lengths),), seed=seed)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Rows(cu_seqlens, sum(lengths), max(lengths), key)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """float64 normals."""
    return drawn(torch.randn, shape, dtype=torch.float64, seed=seed + sum(shape))


def drawn(function: Callable[..., Tensor], *arguments: object, seed: int, **options: object) -> Tensor:
    """torch.randn and the like, from a seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return function(*arguments, **options, generator=generator, device="cpu").to(DEVICE)


def check(op: Function, reference: Function, oracle: Function, inputs: Inputs) -> None:
    """All dtypes and layouts. Only two-dimensional inputs are given strided: those are rows out of a projection."""
    for dtype in WITHIN:
        rounded = {name: value.to(dtype).double() for name, value in inputs.items()}
        truth = _results(oracle, rounded, torch.float64, strided=False)
        for strided in (False, True):
            plain = _results(reference, rounded, dtype, strided)
            ours = _results(op, rounded, dtype, strided)
            assert truth.keys() == plain.keys() == ours.keys()
            # Where the truth is 0 (one row attends to itself, whatever q is), rounding is that of the other results.
            rounding = torch.finfo(dtype).eps * max(map(_rms, truth.values()))
            for name, value in truth.items():
                plain_error, error = (_rms(results[name] - value) for results in (plain, ours))
                what = f"{name} in {dtype}, strided={strided}, size {_rms(value):.2e}: "
                allowed = WITHIN[dtype] * _rms(value) + rounding
                assert plain_error <= allowed, f"{what} the reference is off by {plain_error:.2e}"
                # Over few values a root mean square is one draw of rounding's dice, torch's as well as ours.
                luck = 2 * torch.finfo(dtype).eps * _rms(value) / value.numel() ** 0.5
                assert error <= 2 * plain_error + rounding / 8 + luck, (
                    f"{what} off by {error:.2e}, torch by {plain_error:.2e}"
                )


def gradients_are_right(op: Function, inputs: Inputs) -> None:
    """Gradients against finite differences. The step is wide because the ops work in float32 inside."""
    leaves = [value.clone().requires_grad_() for value in inputs.values()]
    function = lambda *values: op(**dict(zip(inputs, values, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, eps=1e-2, atol=2e-3, rtol=1e-2, nondet_tol=0.0)


def _results(function: Function, inputs: Inputs, dtype: torch.dtype, strided: bool) -> dict[str, Tensor]:
    """Outputs, and the gradient of every input under fixed upstream gradients, in float64."""
    leaves = {name: value.to(dtype, copy=True).requires_grad_() for name, value in inputs.items()}
    given = {name: _slice(leaf) if strided and leaf.dim() == 2 else leaf for name, leaf in leaves.items()}
    results = function(**given)
    outputs = results if isinstance(results, tuple) else (results,)
    differentiable = [output for output in outputs if output.requires_grad]
    # Rounded to bfloat16, so that every dtype gets the same upstream gradients.
    upstream = [normal(*output.shape, seed=9).bfloat16().to(output.dtype) for output in differentiable]
    torch.autograd.backward(differentiable, upstream)
    found = {f"output {i}": output.detach().double() for i, output in enumerate(outputs)}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"no gradient of {name}"
        found[f"gradient of {name}"] = leaf.grad.double()
    return found


def _slice(x: Tensor) -> Tensor:
    """The same values as columns of a wider matrix."""
    return torch.cat([torch.full_like(x, 7.0), x, torch.full_like(x, -7.0)], dim=1)[:, x.shape[1] : 2 * x.shape[1]]


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
