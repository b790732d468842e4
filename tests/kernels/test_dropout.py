"""Counter-based dropout: known answers, one rule on every backend, and the statistics that dropout needs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.backends import using
from kernels.dropout import ATTENTION_TILE, Dropout, drop, drop_torch, keep_mask, keep_mask_torch, philox, row_tile
from tests.kernels.backends import HERE, bits_of, forced
from tests.kernels.oracle import drawn, normal, rows_of
from tests.kernels.philox import keep_row, words

KNOWN_ANSWERS = [  # Random123's philox4x32-10: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WIDTHS = [(8, 8), (7, 8), (1, 8), (9, 16), (63, 64), (65, 64), (101, 64), (200, 64), (768, 768), (3129, 3136)]
"""(width, tile)"""
word = st.integers(0, 2**32 - 1)


@pytest.fixture(params=HERE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from forced(request.param)


def keys(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    both = drawn(torch.randint, 0, 2**32, (2, rows), seed=seed)
    return both[0], both[1]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert words(counter, key) == expected
    found = philox(key, tuple(torch.tensor([part], device="cpu") for part in counter))  # type: ignore[arg-type]
    assert tuple(int(part) for part in found) == expected


@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_philox_in_64_bit_integers_never_overflows(counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    found = philox(key, tuple(torch.tensor([part], device="cpu") for part in counter))  # type: ignore[arg-type]
    assert tuple(int(part) for part in found) == words(counter, key)


@pytest.mark.parametrize(("width", "tile"), WIDTHS)
def test_the_mask_follows_the_rule(width: int, tile: int) -> None:
    dropout = Dropout(0.1, seed=0xFEDCBA98, step=0xFFFFFFFF, site=77)
    row_key, row_index = keys(5)
    found = keep_mask_torch(dropout, row_key, row_index, width, tile).cpu().numpy()
    for row, (key, index) in enumerate(zip(row_key.tolist(), row_index.tolist(), strict=True)):
        expected = keep_row(0xFEDCBA98, 0xFFFFFFFF, 77, 0.1, key, index, width, tile)
        np.testing.assert_array_equal(found[row], expected)


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize(("width", "tile"), WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_native_and_torch_masks_are_the_same_bits(rows: int, width: int, tile: int, backend: str) -> None:
    row_key, row_index = keys(rows, seed=width)
    for p, seed, step, site in ((0.1, 0, 0, 0), (0.5, 2**32 - 1, 2**31, 5), (0.0, 1, 2, 3), (0.999, 3, 2, 1)):
        dropout = Dropout(p, seed, step, site)
        native = keep_mask(dropout, row_key, row_index, width, tile)
        assert torch.equal(native, keep_mask_torch(dropout, row_key, row_index, width, tile))


def test_masks_take_strided_keys(backend: str) -> None:
    row_key, row_index = keys(24)
    dropout = Dropout(0.1, 1, 2, 3)
    strided = (dropout, row_key[::2], row_index[1::2], 33, 40)
    assert torch.equal(keep_mask(*strided), keep_mask_torch(*strided))


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("tile", [None, ATTENTION_TILE])
def test_the_keep_rate_is_right_in_every_row_and_column(p: float, tile: int | None) -> None:
    rows, width = 4096, 512
    row_index = torch.arange(rows)
    keep = keep_mask(Dropout(p, 11, 22, 33), torch.full((rows,), 44), row_index, width, tile).double()
    expected = 1 - round(p * 65536) / 65536
    spread = (expected * (1 - expected)) ** 0.5
    assert abs(keep.mean() - expected) < 5 * spread / keep.numel() ** 0.5
    assert (keep.mean(0) - expected).abs().max() < 6 * spread / rows**0.5
    assert (keep.mean(1) - expected).abs().max() < 6 * spread / width**0.5


def test_neighbouring_coordinates_are_independent() -> None:
    """Masks of the next seed, step, site, item and row agree with a mask as often as chance does."""
    rows, width = 256, 1024
    index, item = torch.arange(rows), torch.full((rows,), 5)
    base = keep_mask(Dropout(0.5, 1, 2, 3), item, index, width)
    others = [
        keep_mask(Dropout(0.5, 2, 2, 3), item, index, width),
        keep_mask(Dropout(0.5, 1, 3, 3), item, index, width),
        keep_mask(Dropout(0.5, 1, 2, 4), item, index, width),
        keep_mask(Dropout(0.5, 1, 2, 3), item + 1, index, width),
        keep_mask(Dropout(0.5, 1, 2, 3), item, index + rows, width),
        base.flip(1),
    ]
    for other in others:
        assert abs((base == other).double().mean() - 0.5) < 5 * 0.5 / (rows * width) ** 0.5


def test_an_item_has_the_same_mask_wherever_it_is_packed() -> None:
    dropout = Dropout(0.3, 1, 2, 3)
    together = rows_of([5, 17, 3])
    masks = keep_mask(dropout, together.row_key, together.row_index, 40).split([5, 17, 3])
    for item, length in enumerate((5, 17, 3)):
        alone = keep_mask(dropout, together.item_key[item].expand(length), torch.arange(length), 40)
        assert torch.equal(masks[item], alone)


def test_drop_scales_what_it_keeps_by_the_rate_as_drawn(backend: str) -> None:
    rows, dropout = rows_of([4, 9]), Dropout(0.1, 1, 2, 3)
    x = normal(13, 24)
    keep = keep_mask(dropout, rows.row_key, rows.row_index, 24, row_tile(24)).bool()
    dropped = drop(x, dropout, rows.row_key, rows.row_index)
    assert torch.equal(dropped[~keep], torch.zeros(int((~keep).sum()), dtype=torch.float64))
    torch.testing.assert_close(dropped[keep], x[keep] * 65536 / (65536 - 6554), rtol=1e-6, atol=0)
    assert drop(x, None, rows.row_key, rows.row_index) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 5, 64, 96, 768, 1024])
@pytest.mark.parametrize("rows", [1, 2, 7, 65, 101, 256, 306])
def test_drop_and_its_gradient_are_torch_s_to_the_bit(rows: int, width: int, dtype: torch.dtype, backend: str) -> None:
    """One product, rounded once: there is nothing to be inexact about."""
    row_key, row_index = keys(rows, seed=width)
    dropout = Dropout(0.3, 2**32 - 1, 2**31 + 5, 2**30)
    x = normal(rows, width).to(dtype).requires_grad_()
    y = drop(x, dropout, row_key, row_index)
    dy = normal(rows, width, seed=1).to(dtype)
    y.backward(dy)
    assert x.grad is not None
    for found, source in ((y.detach(), x.detach()), (x.grad, dy)):
        torch.testing.assert_close(found, drop_torch(source, dropout, row_key, row_index), rtol=0, atol=0)


def test_drop_takes_what_is_strided(backend: str) -> None:
    x, (row_key, row_index) = normal(30, 14).float(), keys(14)
    dropout = Dropout(0.5, 1, 2, 3)
    found = drop(x.t(), dropout, row_key, row_index)
    assert torch.equal(found, drop_torch(x.t().contiguous(), dropout, row_key, row_index))


def test_drop_of_no_rows(backend: str) -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert drop(torch.zeros(0, 8), Dropout(0.5, 1, 2, 3), nothing, nothing).shape == (0, 8)


def test_drop_refuses_rows_without_keys(backend: str) -> None:
    with pytest.raises(ValueError, match="does not have a row for each"):
        drop(torch.zeros(3, 8), Dropout(0.5, 1, 2, 3), *keys(4))


def test_the_step_may_be_a_tensor(backend: str) -> None:
    """Read when the mask is drawn, so that a captured graph can be replayed with another one."""
    step = torch.tensor([6])
    x, (row_key, row_index) = torch.ones(5, 40), keys(5)
    for value in (6, 2**32 - 1):
        step.fill_(value)
        found = drop(x, Dropout(0.5, 1, step, 3), row_key, row_index)
        assert torch.equal(found, drop(x, Dropout(0.5, 1, value, 3), row_key, row_index))


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_the_same_bits_on_any_number_of_threads(backend: str) -> None:
    row_key, row_index = keys(301)
    x = normal(301, 100).float()
    bits_of(lambda: [drop(x, Dropout(0.5, 1, 2, 3), row_key, row_index)])


def test_masks_follow_the_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.dropout.library", lambda: pytest.fail("the native library was asked"))
    with using("dropout=torch"):
        keep_mask(Dropout(0.5, 1, 2, 3), *keys(4), width=8)
