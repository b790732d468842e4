"""Where a block's dropout stands in the counter space: seed, step, and one site number per dropout place."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from kernels.dropout import Dropout

SLOTS = 8
"""Dropout places that a block may have."""


@dataclass(frozen=True)
class Randomness:
    """The random coordinates of one forward pass. `training=False` switches every dropout off."""

    seed: int = 0
    step: int | Tensor = 0
    """A number, or an int64 tensor of one element on the device (see `kernels.dropout.Dropout`)."""
    training: bool = False
    block: int = 0

    def at(self, block: int) -> Randomness:
        """The same pass, seen from block number `block`."""
        return replace(self, block=block)

    def dropout(self, p: float, slot: int) -> Dropout | None:
        """The dropout at this block's place `slot`, or None where nothing is dropped."""
        if not self.training or p == 0.0:
            return None
        return Dropout(p, self.seed, self.step, self.block * SLOTS + slot)
