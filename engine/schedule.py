"""The learning rate over a run: linear warm-up, then a decay. Imports no torch.

Iterations count from 1, and every update of an iteration uses the same multiplier. The published code evaluates its
warm-up one iteration earlier, so that its first update has rate 0 (spec section 4.3); here no update is at rate 0. From
the end of warm-up on, the linear decay is the published one, iteration for iteration.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

PUBLISHED_EPOCHS = 20
"""Epochs of every single-task run (spec section 3.2)."""


def longest_task_iterations(epoch_iterations: Iterable[int]) -> int:
    """The paper's N: iterations of the longest single-task run, 20 epochs of the task with the largest n_t."""
    return PUBLISHED_EPOCHS * max(epoch_iterations)


def warmup_iterations(max_iterations: int, longest_task: int, fraction: float = 0.1) -> int:
    """The smaller of `fraction` x N and `fraction` x `max_iterations`, whole iterations (paper section 3.3).

    `longest_task`: the paper's N. Bounded by the run itself, as the paper does not state its length: a run shorter than
    N would otherwise spend itself in warm-up.
    """
    return round(fraction * min(longest_task, max_iterations))


def multiplier(
    iteration: int,
    warmup: int,
    max_iterations: int,
    decay: Literal["linear", "steps", "constant"] = "linear",
    boundaries: Sequence[int] = (),
    factor: float = 0.2,
) -> float:
    """Factor in (0, 1] on every learning rate in `iteration`, 1 <= iteration <= max_iterations.

    Warm-up: iteration / warmup, reaching 1 at iteration = warmup. Then `linear`: from 1 down to one step above 0 at the
    last iteration; `steps`: times `factor` from each of `boundaries` (iterations) on; `constant`: 1.
    """
    if not 1 <= iteration <= max_iterations:
        raise ValueError(f"iteration {iteration} lies outside 1..{max_iterations}")
    if iteration <= warmup:
        return iteration / warmup
    if decay == "linear":
        return (max_iterations + 1 - iteration) / (max_iterations - warmup)
    if decay == "steps":
        return float(factor ** sum(iteration >= boundary for boundary in boundaries))
    return 1.0
