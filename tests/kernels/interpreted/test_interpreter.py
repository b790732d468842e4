"""The mended interpreter computes with bfloat16 as torch does, and the shipped one still does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.interpreter import as_shipped

N = 64


@triton.jit
def _cast_kernel(x, y):
    at = tl.arange(0, 64)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@triton.jit
def _arithmetic_kernel(a, b, out):
    at = tl.arange(0, 64)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, x + y)
    tl.store(out + 64 + at, x * y)
    tl.store(out + 128 + at, tl.maximum(x, y))
    tl.store(out + 192 + at, tl.where(x < y, x, y))
    tl.store(out + 256 + at, x * 0.5)
    tl.store(out + 320 + at, -x)
    tl.store(out + 384 + at, tl.abs(x))


@triton.jit
def _dot_kernel(a, b, out):
    row = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + row, tl.dot(tl.load(a + row), tl.load(b + row)))


def values(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(256, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(N, dtype=dtype)
    _cast_kernel[(1,)](x, y)
    return y


def arithmetic(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(7, N, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](a, b, out)
    return out


def arithmetic_of_torch(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a + b, a * b, a.maximum(b), a.minimum(b), a * 0.5, -a, a.abs()])


def product(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out)
    return out


def ties() -> Tensor:
    """float32 values halfway between two of bfloat16, just beside the middle, and where rounding overflows."""
    middle = torch.arange(56, dtype=torch.int32) * 0x10000 + 0x3F808000
    bits = torch.cat([middle[:28], middle[28:42] + 1, middle[42:] - 1])
    return torch.cat([bits.view(torch.float32), torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4e38])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_casts_from_bfloat16(dtype: torch.dtype) -> None:
    assert torch.equal(cast(values(0), dtype), values(0)[:N].to(dtype))


def test_casts_to_bfloat16_round_to_nearest_even() -> None:
    x = torch.nn.functional.pad(ties(), (0, N - len(ties())))
    torch.testing.assert_close(cast(x, torch.bfloat16), x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(cast(values(0, torch.float16), torch.bfloat16), values(0, torch.float16)[:N].bfloat16())
    whole = torch.arange(N, dtype=torch.int32) * 1001
    assert torch.equal(cast(whole, torch.bfloat16), whole.bfloat16())


def test_arithmetic() -> None:
    a, b = values(1)[:N], values(2)[:N]
    assert torch.equal(arithmetic(a, b), arithmetic_of_torch(a, b))


def test_products() -> None:
    a, b = values(3), values(4)
    torch.testing.assert_close(product(a, b), a.view(16, 16).float() @ b.view(16, 16).float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: (
            not torch.equal(cast(values(0, torch.float32), torch.bfloat16), values(0, torch.float32)[:N].bfloat16())
        ),
        lambda: not torch.equal(product(values(3), values(4)).bfloat16(), _product_of_torch()),
    ],
    ids=["casts", "products"],
)
def test_the_shipped_interpreter_is_still_wrong(wrong: Callable[[], bool]) -> None:
    """Where this fails, Triton has mended its interpreter: see whether tests/kernels/interpreter.py can go."""
    with as_shipped():
        assert wrong()


def _product_of_torch() -> Tensor:
    return (values(3).view(16, 16).float() @ values(4).view(16, 16).float()).bfloat16()
