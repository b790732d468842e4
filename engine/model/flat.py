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


class FlatBlock(nn.Module):
    """A block whose weights live in `matrices` (decayed) and `vectors` (not decayed).

    Subclasses call `allocate` once with fields in layout order: field name -> published parts that stand one after the
    other (Q, K and V together are one field, so that they are one projection).
    """

    prefix: str
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
        self.prefix = prefix
        self.matrices, self._matrix_fields, self.matrix_parts = _allocate(matrices)
        self.vectors, self._vector_fields, self.vector_parts = _allocate(vectors)

    def fields(self) -> dict[str, Tensor]:
        """Every field as a view of its flat parameter; one `split` each, whose backward is one concatenation."""
        views: dict[str, Tensor] = {}
        for flat, layout in ((self.matrices, self._matrix_fields), (self.vectors, self._vector_fields)):
            pieces = flat.split([prod(shape) for shape in layout.values()])
            views |= {name: piece.view(shape) for (name, shape), piece in zip(layout.items(), pieces, strict=True)}
        return views

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
