"""Which part of the flat parameters one rank keeps, as slices: what sharded optimizers step and checkpoints hold.

A flat partition is a concatenation of pieces of parameters, in order. A piece knows the parameter that it is of by the
names that checkpoints use: unit (the trunk, or a head) and the parameter's name within it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, nn

from engine.model.flat import FlatBlock, Part
from engine.model.vilbert import PRETRAINING, ViLBERT


@dataclass(frozen=True)
class Named:
    """A flat parameter and who it is."""

    unit: str
    name: str
    parameter: nn.Parameter
    decays: bool
    """Matrices decay, vectors do not."""
    prefix: str
    parts: Sequence[Part]
    """What lies where in it, of the published layout."""

    @property
    def numel(self) -> int:
        """Of the whole parameter, also while somebody has sharded it and left it empty."""
        return self.parts[-1].offset + self.parts[-1].numel

    @property
    def key(self) -> str:
        return f"{self.unit}/{self.name}"


@dataclass(frozen=True)
class Piece:
    """Values `start` to `start + length` of a parameter, which lie at `offset` of a flat partition."""

    of: Named
    start: int
    length: int
    offset: int

    def within(self, partition: Tensor) -> Tensor:
        """The piece's values, a view."""
        return partition.narrow(0, self.offset, self.length)


@dataclass(frozen=True)
class Kept:
    """A part of a run's state that one rank keeps: values `start` onwards of the flat tensor `key`."""

    key: str
    """`unit/name/kind`: of `trunk/text_layers.0.matrices/exp_avg`, say; `unit/steps` for the count of a unit's steps."""
    start: int
    values: Tensor
    """Live: a save copies them, a load writes into them."""
    everywhere: bool = False
    """Every rank keeps the same: the first one saves it."""


@dataclass(frozen=True)
class Run:
    """Neighbouring pieces of a partition that are stepped alike: one call of the optimizer's kernel."""

    unit: str
    decays: bool
    offset: int
    length: int


def units(model: ViLBERT) -> dict[str, nn.Module]:
    """What is stepped together, by name: the trunk, every head, the pretraining heads."""
    found: dict[str, nn.Module] = {"trunk": model.trunk, **model.heads}
    if model.pretraining is not None:
        found[PRETRAINING] = model.pretraining
    return found


def named_parameters(model: ViLBERT) -> list[Named]:
    """Every flat parameter, unit after unit; within one the matrices first, so that each unit makes two runs."""
    return [found for unit, module in units(model).items() for found in of_unit(unit, module)]


def of_unit(unit: str, module: nn.Module) -> list[Named]:
    """The flat parameters of one unit."""
    blocks = [(name, block) for name, block in module.named_modules() if isinstance(block, FlatBlock)]
    return [
        Named(unit, f"{name}.matrices".lstrip("."), block.matrices, True, block.prefix, block.matrix_parts)
        for name, block in blocks
    ] + [
        Named(unit, f"{name}.vectors".lstrip("."), block.vectors, False, block.prefix, block.vector_parts)
        for name, block in blocks
    ]


def contiguous_share(parameters: Sequence[Named], start: int, length: int) -> list[Piece]:
    """The pieces of values `start` to `start + length` of all parameters in a row (ZeRO stages 1 and 2)."""
    pieces, at = [], 0
    for named in parameters:
        first, last = max(at, start), min(at + named.numel, start + length)
        if first < last:
            pieces.append(Piece(named, first - at, last - first, first - start))
        at += named.numel
    return pieces


def share_of_each(parameters: Sequence[Named], rank: int, world_size: int) -> list[Piece]:
    """The pieces of a rank that keeps an equal share of every single parameter, rounded up (ZeRO stage 3)."""
    pieces, offset = [], 0
    for named in parameters:
        share = -(-named.numel // world_size)
        length = min(share, named.numel - rank * share)
        if length > 0:
            pieces.append(Piece(named, rank * share, length, offset))
        offset += share
    return pieces


def runs(pieces: Iterable[Piece]) -> Iterator[Run]:
    """Neighbours of one unit and one kind of decay, put together. Gaps (padding) between them separate."""

    def alike(numbered: tuple[int, Piece]) -> tuple[str, bool, int]:
        before, piece = numbered
        return piece.of.unit, piece.of.decays, piece.offset - before

    ordered = list(pieces)
    lengths = [0]
    for piece in ordered:
        lengths.append(lengths[-1] + piece.length)
    for (unit, decays, _), group in groupby(zip(lengths, ordered, strict=False), alike):
        members = [piece for _, piece in group]
        yield Run(unit, decays, members[0].offset, sum(piece.length for piece in members))
