"""Element-wise dropout, on the Triton kernel in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kernels.dropout import Dropout, draw, drop, drop_torch
from tests.kernels.backends import forced
from tests.kernels.oracle import normal
from tests.kernels.test_dropout import (
    KNOWN_ANSWERS,
    keys,
    test_drop_of_no_rows,
    test_drop_refuses_rows_without_keys,
    test_drop_scales_what_it_keeps_by_the_rate_as_drawn,
    test_drop_takes_what_is_strided,
    test_the_step_may_be_a_tensor,
)

__all__ = [
    "test_drop_of_no_rows",
    "test_drop_refuses_rows_without_keys",
    "test_drop_scales_what_it_keeps_by_the_rate_as_drawn",
    "test_drop_takes_what_is_strided",
    "test_the_step_may_be_a_tensor",
]


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    yield from forced("triton")


@triton.jit
def _draw_kernel(out, seed, step, item, row, block, site):
    words = draw(seed, step, tl.load(item), tl.load(row), tl.load(block), site)
    for i in tl.static_range(4):
        tl.store(out + i, words[i])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    out = torch.zeros(4, dtype=torch.int32)
    item, row, block = (torch.tensor([part]) for part in counter[:3])
    _draw_kernel[(1,)](out, *key, item, row, block, counter[3])
    assert tuple(out.cpu().numpy().view(np.uint32).tolist()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (2, 1024), (7, 768), (65, 64), (101, 96), (256, 24), (306, 5)])
def test_drop_and_its_gradient_are_torch_s_to_the_bit(rows: int, width: int, dtype: torch.dtype) -> None:
    row_key, row_index = keys(rows, seed=width)
    dropout = Dropout(0.3, 2**32 - 1, 2**31 + 5, 2**30)
    x = normal(rows, width).to(dtype).requires_grad_()
    y = drop(x, dropout, row_key, row_index)
    dy = normal(rows, width, seed=1).to(dtype)
    y.backward(dy)
    assert x.grad is not None
    for found, source in ((y.detach(), x.detach()), (x.grad, dy)):
        torch.testing.assert_close(found, drop_torch(source, dropout, row_key, row_index), rtol=0, atol=0)
