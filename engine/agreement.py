"""What the ranks of a run agree on at every step, in one small all-reduce on the host that nobody waits for.

At each step boundary a rank says whether it was asked to stop, which save it has written, whether its last loss was finite,
and what it is about to do (a hash). It learns what all said at the boundary before. One step late, but at the same boundary
on every rank, so that all act together; and the exchange is over long before it is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.ranks import Ranks


@dataclass(frozen=True)
class Said:
    """What one rank says at a boundary, and, of the largest values, what all of them said."""

    stop: bool = False
    save: bool = False
    """It is time for a save by the clock."""
    failed: int = 0
    """A save that could not be written by some rank, by its number; 0: none."""
    not_finite: int = -1
    """A rank whose loss in the step before was not finite; -1: none."""
    written: int = 0
    """The newest save that this rank (all of them) has written whole."""
    committed: int = 0
    """The newest save that is in place, which rank 0 says."""
    plan: int = 0
    """Hash of what comes next, below 2**62."""
    same_plan: bool = True
    """Of all: whether there was one plan."""


class Agreement:
    """The exchange of one run."""

    def __init__(self, ranks: Ranks) -> None:
        self._group = ranks.side
        self._under_way: tuple[dist.Work, Tensor] | None = None

    def exchange(self, said: Said) -> Said:
        """Say this; returns what all said at the call before (at the first: nothing). Alone: what was said now."""
        if self._group is None:
            return said
        before = self._taken()
        values = torch.tensor(
            [said.stop, said.save, said.failed, said.not_finite, -said.written, said.committed, said.plan, -said.plan]
        )
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._under_way = work, values
        return before

    def close(self) -> None:
        """Take the last exchange, so that nothing is left under way."""
        self._taken()

    def _taken(self) -> Said:
        if self._under_way is None:
            return Said()
        work, values = self._under_way
        self._under_way = None
        work.wait()
        stop, save, failed, not_finite, written, committed, plan, other = values.numpy().tolist()
        return Said(bool(stop), bool(save), failed, not_finite, -written, committed, plan, plan == -other)
