"""Bytes that a rank holds, by kind, at each ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.plan_cost import Layout
from bench.plan_count import Counted

STATES = 2
"""Of AdamW: two moments in float32. Parameters in bfloat16 have a float32 master beside them."""
BATCHES = 2
"""On the device: the one that is used and the one that comes after."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Of the task that needs most: what forward and backward hold at most, beside the others here."""
    buffers: float
    """Batches, zeros for parameters without a gradient, what collectives work in, what CUDA and its libraries take."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total}


def of_rank(layout: Layout, counted: Sequence[Counted], context: float = 0.0) -> Memory:
    """`counted`: of every task's largest rank. `context`: what a device's own libraries take.

    Weights of all heads are everywhere; so are gradients, whose memory is kept from step to step. Stage 1 divides the
    optimizer's state by the ranks, stage 2 gradients too, stage 3 weights too.
    """
    n, stage, parameters = layout.ranks, layout.stage, layout.parameters
    weights = gradients = parameters * layout.element_size
    optimizer = parameters * 4 * (STATES + (layout.precision == "bfloat16"))
    largest = layout.largest * layout.element_size
    buffers = context + largest + BATCHES * max(c.batch_bytes for c in counted)
    if n > 1:
        # A bucket on its way, and a second one that backward fills meanwhile; at stage 3 also two blocks' weights, gathered.
        buffers += 2 * layout.trunk * layout.element_size / layout.buckets
        buffers += 2 * largest if stage == 3 else 0
    return Memory(
        weights=weights / (n if stage >= 3 else 1),
        gradients=gradients / (n if stage >= 2 else 1),
        optimizer=optimizer / (n if stage >= 1 else 1),
        activations=max(c.activations for c in counted),
        buffers=buffers,
    )
