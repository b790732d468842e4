"""Few, flat parameters: a block keeps its matrices in one tensor and its vectors in another.

Every hook, reduction and optimizer launch pays per tensor; the published layout has 559 of them, a trunk of blocks some
sixty. Weight decay acts on matrices only, so the split between the two tensors is also the split of decay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from kernels import huge_pages


@dataclass(frozen=True)
class Part:
    """A tensor of the published layout, and where it lies in a block's flat parameter."""

    name: str
    """Published name within the block's prefix."""
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        """This part of `flat`, as a view in the published shape."""
        return flat.narrow(0, self.offset, self.numel).view(self.shape)


class GradientMemory:
    """The memory that a block's own backward writes one parameter's gradient into, the same every step.

    It is lent to one backward at a time: while a gradient lies in it (or is still on its way), others get new memory.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._lent = False

    def lend(self, parameter: nn.Parameter) -> Tensor:
        """Uninitialised memory of the parameter's shape; a new tensor object each time, so that autograd keeps it as
        `parameter.grad` without a copy."""
        if self._lent or parameter.grad is not None:
            return torch.empty_like(parameter)
        if self._memory is None or self._memory.dtype != parameter.dtype or self._memory.device != parameter.device:
            self._memory = huge_pages.empty_like(parameter)
        self._lent = True
        return self._memory.view(self._memory.shape)

    def is_at(self, x: Tensor) -> bool:
        """Whether x lies in this memory."""
        return self._memory is not None and self._memory.data_ptr() == x.data_ptr()

    def give_back(self) -> None:
        """The gradient has been used up."""
        self._lent = False


class FlatBlock(nn.Module):
    """A block whose weights live in `matrices` (decayed) and `vectors` (not decayed).

    Subclasses call `allocate` once with fields in layout order: field name -> published parts that stand one after the
    other (Q, K and V together are one field, so that they are one projection).
    """

    prefix: str
    title: str
    """What a profile calls it: `text 3`, `connection 0`; by default its prefix."""
    number: int = -1
    """Place of the block in the counter space of dropout; the trunk gives it."""
    matrices: nn.Parameter
    vectors: nn.Parameter

    def allocate(
        self,
        prefix: str,
        matrices: dict[str, list[tuple[str, tuple[int, int]]]],
        vectors: dict[str, list[tuple[str, tuple[int]]]],
    ) -> None:
        """Create both parameters (zeros) and remember what lies where. Parts of a field share all but dimension 0."""
        self.prefix, self.title = prefix, prefix.rstrip(".")
        self.matrices, self._matrix_fields, self.matrix_parts = _allocate(matrices)
        self.vectors, self._vector_fields, self.vector_parts = _allocate(vectors)
        self._memory = (GradientMemory(), GradientMemory())
        self._values: tuple[tuple[int, int], dict[str, Tensor]] | None = None
        self._gradients: tuple[tuple[int, int], dict[str, Tensor]] | None = None

    def fields(self) -> dict[str, Tensor]:
        """Every field as a view of its flat parameter; one `split` each, whose backward is one concatenation."""
        return self.fields_of(self.matrices, self.vectors)

    def values(self) -> dict[str, Tensor]:
        """Every field as a view that autograd does not follow, for a block with a backward of its own."""
        where = (self.matrices.data_ptr(), self.vectors.data_ptr())
        if self._values is None or self._values[0] != where:  # first use, or moved to another device or dtype
            self._values = where, self.fields_of(self.matrices.detach(), self.vectors.detach())
        return self._values[1]

    def fields_of(self, matrices: Tensor, vectors: Tensor) -> dict[str, Tensor]:
        """Every field of two flat tensors in this block's layout (gradients, say), as views."""
        return _views(matrices, self._matrix_fields) | _views(vectors, self._vector_fields)

    def lend_gradients(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Memory for the gradients of `matrices` and `vectors`, to be written whole, and its fields."""
        matrices, vectors = self._memory[0].lend(self.matrices), self._memory[1].lend(self.vectors)
        if not (self._memory[0].is_at(matrices) and self._memory[1].is_at(vectors)):
            return matrices, vectors, self.fields_of(matrices, vectors)
        where = (matrices.data_ptr(), vectors.data_ptr())
        if self._gradients is None or self._gradients[0] != where:
            self._gradients = where, self.fields_of(matrices, vectors)
        return matrices, vectors, self._gradients[1]

    def drop_gradients(self) -> None:
        """Forget both gradients, after they were used."""
        self.matrices.grad = self.vectors.grad = None
        for memory in self._memory:
            memory.give_back()

    def published(
        self, of: str = "value", exact: Mapping[nn.Parameter, Tensor] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """(published key, view) of every part; `of` is "value" or "grad" (zeros where no gradient arrived).

        `exact` replaces the values of parameters by others of their shape (float32 masters).
        """
        for flat, parts in ((self.matrices, self.matrix_parts), (self.vectors, self.vector_parts)):
            source = (exact or {}).get(flat, flat).detach()
            if of == "grad":
                source = torch.zeros_like(flat) if flat.grad is None else flat.grad
            for part in parts:
                yield f"{self.prefix}{part.name}", part.of(source)

    @torch.no_grad()
    def initialise(self, std: float, generator: torch.Generator) -> None:
        """Matrices normal(0, std); biases 0; LayerNorm scales 1 (spec section 1.8)."""
        self.matrices.normal_(0.0, std, generator=generator)
        self.vectors.zero_()
        for part in self.vector_parts:
            if is_scale(self.prefix + part.name):
                part.of(self.vectors.detach()).fill_(1.0)


def _views(flat: Tensor, layout: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    pieces = flat.split_with_sizes([prod(shape) for shape in layout.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(layout.items(), pieces, strict=True)}


def add_rows(table: Tensor, ids: Tensor, rows: Tensor) -> None:
    """`table` becomes zeros, plus each of `rows` [n, width] added at row ids[i] (int64 [n], repeats allowed).

    Repeats are summed in float32 and in their order, so the result neither depends on threads nor loses small addends.
    """
    if table.is_cuda:  # sorted segments, float32 inside; finding the distinct ids here would wait for the device
        table.copy_(torch.ops.aten.embedding_dense_backward(rows, ids, len(table), -1, False))
        return
    distinct, place = ids.unique(return_inverse=True)
    sums = rows.new_zeros(len(distinct), rows.shape[1], dtype=torch.float32).index_add_(0, place, rows.float())
    table.zero_().index_copy_(0, distinct, sums.to(table.dtype))


def is_scale(key: str) -> bool:
    """Whether a published key is a LayerNorm scale, which starts at 1."""
    return key.endswith(("LayerNorm.weight", "LayerNorm1.weight", "LayerNorm2.weight", "logit_fc.2.weight"))


def _allocate(
    fields: dict[str, list[tuple[str, tuple]]],
) -> tuple[nn.Parameter, dict[str, tuple[int, ...]], list[Part]]:
    parts: list[Part] = []
    shapes: dict[str, tuple[int, ...]] = {}
    offset = 0
    for field, members in fields.items():
        for name, shape in members:
            parts.append(Part(name, shape, offset))
            offset += prod(shape)
        shapes[field] = (sum(shape[0] for _, shape in members), *members[0][1][1:])
    return nn.Parameter(torch.zeros(offset)), shapes, parts
