"""Huge pages are advice: values, shapes and dtypes do not change, and what cannot be had is no error."""

from __future__ import annotations

import pytest
import torch

from kernels import huge_pages

LARGE = 3 << 20
"""float32 values: 12 MiB, whole pages of 2 MiB among them."""


@pytest.mark.parametrize("n", [0, 5, LARGE])
def test_memory_is_like_torchs(n: int) -> None:
    x = torch.arange(n, dtype=torch.float32)
    fresh = huge_pages.empty_like(x, torch.bfloat16)
    assert fresh.shape == x.shape and fresh.dtype is torch.bfloat16 and not fresh.requires_grad
    assert huge_pages.empty_like(x).copy_(x).equal(x)


def test_moving_keeps_values() -> None:
    x = torch.arange(LARGE, dtype=torch.float32)
    before, address = x.clone(), x.data_ptr()
    huge_pages.move(x)
    assert x.equal(before) and x.data_ptr() == address


def test_only_whole_pages_within_the_tensor_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[tuple[int, int]] = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda first, size, advice: named.append((first, size)))
    x = torch.empty(LARGE, device="cpu")
    huge_pages.move(x)
    huge_pages.move(x[: LARGE // 8])  # too small to be worth it
    huge_pages.move(x[::2])
    assert len(named) == 2, "advice, and the move"
    page = 2 << 20
    for first, size in named:
        assert first % page == 0 and size % page == 0 and size > 0
        assert x.data_ptr() <= first and first + size <= x.data_ptr() + 4 * LARGE
