"""`Rows`: a packed row space, i.e. items of different lengths standing one after the other without padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where each item of a packed tensor starts, and who it is.

    `cu_seqlens`: int32 [n + 1]; `total` and `max_seqlen` are known on the host, so that no op asks the device;
    `item_key`: int64 [n] in [0, 2**32), the item's identity in counter-based random draws.
    """

    cu_seqlens: Tensor
    total: int
    max_seqlen: int
    item_key: Tensor

    @property
    def n(self) -> int:
        """Items."""
        return self.cu_seqlens.numel() - 1

    @cached_property
    def lengths(self) -> Tensor:
        """int64 [n]."""
        return self.cu_seqlens.diff().long()

    @cached_property
    def starts(self) -> Tensor:
        """int64 [n]: row 0 of each item."""
        return self.cu_seqlens[:-1].long()

    @cached_property
    def row_item(self) -> Tensor:
        """int64 [total]: which item a row belongs to."""
        items = torch.arange(self.n, device=self.cu_seqlens.device)
        return items.repeat_interleave(self.lengths, output_size=self.total)

    @cached_property
    def row_index(self) -> Tensor:
        """int64 [total]: a row's place within its item."""
        return torch.arange(self.total, device=self.cu_seqlens.device) - self.starts[self.row_item]

    @cached_property
    def row_key(self) -> Tensor:
        """int64 [total]: the item key of each row."""
        return self.item_key[self.row_item]

    @cached_property
    def slots(self) -> Tensor:
        """int64 [total]: each row's place in a padded [n * max_seqlen] layout (plain torch attention needs it)."""
        return self.row_item * self.max_seqlen + self.row_index

    @cached_property
    def is_padding(self) -> Tensor:
        """bool [n, max_seqlen]: True where the padded layout holds no row."""
        places = torch.arange(self.max_seqlen, device=self.cu_seqlens.device)
        return places[None, :] >= self.lengths[:, None]

    @cached_property
    def first(self) -> Rows:
        """The row space of row 0 of every item."""
        cu_seqlens = torch.arange(self.n + 1, dtype=torch.int32, device=self.cu_seqlens.device)
        return Rows(cu_seqlens, self.n, 1, self.item_key)

    def take(self, items: Tensor, total: int, item_key: Tensor) -> tuple[Rows, Tensor]:
        """The row space of `items` (int64 [m], repeats allowed), and the int64 [total] gather from this one to it."""
        lengths = self.lengths[items]
        cu_seqlens = torch.zeros(items.numel() + 1, dtype=torch.int32, device=items.device)
        torch.cumsum(lengths, 0, out=cu_seqlens[1:])
        taken = Rows(cu_seqlens, total, self.max_seqlen, item_key)
        return taken, self.starts[items][taken.row_item] + taken.row_index
