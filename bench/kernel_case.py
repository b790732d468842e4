"""What a kernel case is: an op on one shape, who else computes the same, and how much work there is to do.

Work is counted, not measured. `bytes` is the least possible: each input once and each output once, of gathered rows those that
are read, and nothing that an implementation keeps for itself. `flops` are those of the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bench.lengths import load
from engine.tasks import load_table
from kernels.dropout import Dropout
from kernels.rows import Rows

DEFAULT_TASKS = ("vqa", "nlvr2", "coco_retrieval", "guesswhat_pointing", "guesswhat_306")
"""One of each kind of shape; the last has GuessWhat's texts with images of 306 regions, its published maximum."""

STREAMS = {"text": (768, 12, 3072), "image": (1024, 8, 1024)}
"""Stream of the full model -> width, heads, width inside."""

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Setting:
    """The sizes of a batch: text and region rows of each pair; captions are those of pretraining."""

    task: str
    texts: tuple[int, ...]
    regions: tuple[int, ...]
    captions: int = 256
    words: int = 30522
    """Of the vocabulary."""
    parameters: int = 7_087_872
    """Of the optimizer's step: those of one text layer."""
    p: float = 0.1


@dataclass(frozen=True)
class Work:
    """Of one mode: "forward", "backward" or "both"; "step" for the optimizer."""

    bytes: int
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Call:
    """`function(*leaves)`; the leaves get gradients."""

    function: Function
    leaves: tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One op on one shape: what we do, and what others do instead. Peers are made when they are called for."""

    op: str
    task: str
    shape: str
    dtype: torch.dtype
    work: Mapping[str, Work]
    ours: Call
    peers: Mapping[str, Callable[[], Call]] = field(default_factory=dict)
    longest: int = 0
    """Attention: rows of the longest item that is attended to (co-attention: of the longest text)."""


def draw(task: str, batch: int, seed: int = 0) -> Setting:
    """Lengths from the task's distribution (`bench/lengths.json`). KeyError for an unknown task.

    One pair is one (text, image) row of the published model: a retrieval sample has four, NLVR2's has two.
    """
    of, regions = ("guesswhat_pointing", 306) if task == "guesswhat_306" else (task, None)
    row, lengths = load_table().tasks[of], load()[of]
    random = np.random.default_rng(seed)
    texts, images = ([0, 1, 0, 2], [0, 0, 1, 0]) if row.loss == "options" else ([0] * row.images, [*range(row.images)])
    text_rows = lengths.texts.draw(random, batch * (max(texts) + 1)).reshape(batch, -1)[:, texts].ravel()
    region_rows = lengths.draw_regions(random, batch * (max(images) + 1)).reshape(batch, -1)[:, images].ravel()
    return Setting(task, tuple(text_rows.tolist()), tuple(regions or rows for rows in region_rows.tolist()))


class Maker:
    """Random tensors of one dtype on one device, the same every time."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, dtype or self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """float32 in [0, 1)."""
        return torch.rand(shape, generator=self._generator).to(self.device)

    def leaf(self, *shape: int) -> Tensor:
        return self.normal(*shape).requires_grad_()

    def weight(self, *shape: int) -> Tensor:
        """A leaf of the size of initial weights: logits of unit normals would give gradients too small for normal numbers."""
        return self.normal(*shape).mul_(0.02).requires_grad_()

    def vectors(self, width: int, n: int) -> list[Tensor]:
        return [self.leaf(width) for _ in range(n)]

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator).to(self.device)

    def choice(self, n: int, m: int) -> Tensor:
        """int64 [m]: m of n, in order."""
        return torch.randperm(n, generator=self._generator)[:m].sort().values.to(self.device)

    def rows(self, lengths: tuple[int, ...]) -> Rows:
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(self.device)
        return Rows(cu_seqlens, sum(lengths), max(lengths), self.integers(2**32, len(lengths)))

    def streams(self, setting: Setting) -> Iterator[tuple[str, Rows]]:
        yield "text", self.rows(setting.texts)
        yield "image", self.rows(setting.regions)

    def heads(self, rows: Rows, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as the model has them: columns of one projection."""
        q, k, v = self.normal(rows.total, 3 * width).split(width, 1)
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def dropout(p: float, rows: Rows, site: int = 0) -> Dropout | None:
    """One dropout place; None for p = 0. On a GPU its step lies there: a number could not be recorded."""
    device = rows.cu_seqlens.device
    return Dropout(p, 1, _step(device) if device.type == "cuda" else 2, site) if p else None


@cache
def _step(device: torch.device) -> Tensor:
    return torch.full((1,), 2, dtype=torch.int64, device=device)


def describe(stream: str, rows: Rows, width: int, p: float | None = None) -> str:
    """A shape for people: items, their mean length, width, dropout."""
    text = f"{stream} {rows.n} × {rows.total / rows.n:.0f} rows × {width}"
    return text if p is None else f"{text}, dropout {p:g}"


def bytes_of(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def work_of(reads: Iterable[Tensor], result: Tensor, gradients: Iterable[Tensor], flops: int = 0) -> dict[str, Work]:
    """Of an op whose backward reads its inputs again, and the gradient of its result; flops are the forward's."""
    once = bytes_of(*reads, result)
    forward, backward = Work(once, flops), Work(once + bytes_of(*gradients), 2 * flops)
    return {"forward": forward, "backward": backward, "both": forward + backward}
