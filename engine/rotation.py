"""Which tasks run, and which are validated, in an iteration: pure functions, the same on every rank. No torch.

Iterations count from 1 (Algorithm 1: `for i <- 1 to MaxIter`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from engine.stopgo import Decision
from engine.tasks import TaskRow

FIRST_GROUPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "none": (),
    "curriculum": (("G3",),),
    "anti_curriculum": (("G1",),),
}
"""Groups trained before all others: the fastest-converging one, or the slowest (paper section 3.3)."""


def plan(iteration: int, tasks: Sequence[str], decisions: Mapping[str, Decision], gap: int) -> tuple[str, ...]:
    """The tasks of one iteration in round-robin order (Algorithm 1).

    `tasks`: those of the current phase. A task without a decision goes (stop-and-go off: `decisions` is empty). Stopped
    tasks run when `iteration` is a multiple of `gap`; an iteration may be empty.
    """
    _counts_from_one(iteration)
    stopped_run = iteration % gap == 0
    return tuple(task for task in tasks if stopped_run or decisions.get(task, Decision.GO) is Decision.GO)


def due_for_validation(iteration: int, epoch_iterations: int, max_iterations: int, on_last: bool = True) -> bool:
    """Whether a task of n_t = `epoch_iterations` is scored after this iteration: once per epoch, and after the last."""
    _counts_from_one(iteration)
    return iteration % epoch_iterations == 0 or (on_last and iteration == max_iterations)


def phases(
    tasks: Sequence[TaskRow],
    kind: Literal["none", "curriculum", "anti_curriculum"],
    groups: Sequence[Sequence[str]] = (),
) -> tuple[tuple[str, ...], ...]:
    """Names of the tasks of each phase; the last phase is always all of them.

    `groups`: the groups of each phase before the last; empty for the paper's. A phase that names no task of the run
    is left out.
    """
    first = groups or FIRST_GROUPS[kind]
    chosen = (tuple(task.name for task in tasks if task.group in names) for names in first)
    return (*(names for names in chosen if names), tuple(task.name for task in tasks))


def next_phase(
    phase: int,
    iteration: int,
    phases: Sequence[Sequence[str]],
    decisions: Mapping[str, Decision],
    iterations: int | Literal["until_stopped"],
) -> int:
    """The phase of iteration + 1, given that of `iteration` and the decisions after it.

    `iterations`: length of each phase before the last, or until each of its tasks is stopped at the same time.
    """
    last = len(phases) - 1
    if phase == last:
        return last
    if iterations == "until_stopped":
        ended = all(decisions.get(task, Decision.GO) is Decision.STOP for task in phases[phase])
        return phase + 1 if ended else phase
    return min(iteration // iterations, last)


def _counts_from_one(iteration: int) -> None:
    if iteration < 1:
        raise ValueError(f"iteration {iteration}: iterations count from 1")
