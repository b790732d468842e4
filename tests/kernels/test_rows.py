"""The packed row space against plain loops over its items."""

from __future__ import annotations

import torch

from tests.kernels.oracle import LENGTHS, rows_of


def test_every_row_knows_its_item_place_and_key() -> None:
    rows = rows_of(LENGTHS)
    expected = [(item, place) for item, length in enumerate(LENGTHS) for place in range(length)]
    assert list(zip(rows.row_item.tolist(), rows.row_index.tolist(), strict=True)) == expected
    assert rows.row_key.tolist() == [int(rows.item_key[item]) for item, _ in expected]
    assert rows.slots.tolist() == [item * max(LENGTHS) + place for item, place in expected]
    assert rows.is_padding.sum() == len(LENGTHS) * max(LENGTHS) - sum(LENGTHS)
    assert not rows.is_padding.flatten()[rows.slots].any()


def test_row_0_of_every_item() -> None:
    rows = rows_of(LENGTHS)
    assert rows.starts.tolist() == [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    assert rows.first.total == rows.first.n == len(LENGTHS)
    assert torch.equal(rows.first.row_key, rows.item_key)
    assert rows.first.row_index.tolist() == [0] * len(LENGTHS)


def test_items_can_be_taken_in_any_order_and_repeated() -> None:
    rows, items = rows_of([3, 1, 4]), [2, 0, 0, 2]
    key = torch.arange(4) + 100
    taken, gather = rows.take(torch.tensor(items), 14, key)
    starts, lengths = [0, 3, 4], [3, 1, 4]
    assert gather.tolist() == [starts[item] + place for item in items for place in range(lengths[item])]
    assert taken.lengths.tolist() == [4, 3, 3, 4]
    assert taken.n == 4 and taken.total == 14 and taken.cu_seqlens.dtype == torch.int32
    assert torch.equal(taken.item_key, key)
