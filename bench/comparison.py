"""Providers side by side: in processes of their own, let go in turn, task by task; and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench.batches import padded_row_share
from bench.estimate import OURS, Estimate
from bench.gemms import GemmTimes
from bench.memory import available_bytes
from bench.provider import Rows, Setting, Step
from bench.worker import Worker
from engine.tasks import TaskRow

Say = Callable[[str], None]

HEAPS_GROW = 1.5
"""What a provider holds after several steps, over what its first step took: pools keep what batches of other lengths needed."""

WARMING = (10_000, 10_001, 10_002)
"""Batches of untimed steps. One is not enough: the allocator's pools grow over a few, with gigabytes of activations slowly, and
that is no part of training's price."""


@dataclass
class Measured:
    """One provider on one task."""

    state: dict[str, int] = field(default_factory=dict)
    """Bytes of weights and of optimizer state."""
    rows: list[Rows] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def add(self, rows: Rows, step: Step) -> None:
        """One more round."""
        self.rows.append(rows)
        self.steps.append(step)

    @property
    def seconds(self) -> float:
        """Median step."""
        return median(step.seconds for step in self.steps)

    @property
    def peak_bytes(self) -> int:
        return max(step.peak_bytes for step in self.steps)

    @property
    def working_bytes(self) -> int:
        """The peak without weights, gradients and optimizer state: activations, workspaces, batch, libraries."""
        return self.peak_bytes - sum(self.state.values()) - self.steps[-1].gradient_bytes

    @property
    def padded_row_share(self) -> float:
        return padded_row_share(self.total_rows, self.real_rows)

    @property
    def total_rows(self) -> int:
        """Over all rounds."""
        return sum(rows.rows for rows in self.rows)

    @property
    def real_rows(self) -> int:
        """Over all rounds."""
        return sum(rows.real for rows in self.rows)


@dataclass
class TaskResult:
    """All providers on one task, and what is counted of ours."""

    row: TaskRow
    batch: int
    providers: dict[str, Measured] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    gemms: GemmTimes | None = None
    rested: bool = False
    """Memory did not suffice for all at once: whoever had no turn rested, and a step to wake up came before each timed one."""

    @property
    def ratios(self) -> dict[str, float]:
        """How many times faster than each peer ours is."""
        ours = self.providers[OURS].seconds
        return {name: peer.seconds / ours for name, peer in self.providers.items() if name != OURS}


def compare(
    setting: Setting,
    rows: Sequence[TaskRow],
    peers: Sequence[str],
    turns: Sequence[int],
    estimate: Estimate,
    say: Say,
    keep: Callable[[list[TaskResult]], None] = lambda results: None,
) -> tuple[list[TaskResult], dict[str, dict[str, Any]]]:
    """Results by task, and what each provider says of itself. `turns`: which batch each round has. `keep` is given what there
    is after every task: whoever runs out of time has that.

    Raises WorkerFailed, and ValueError for a loss that is not finite.
    """
    names = [OURS, *peers]
    results = []
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(name, setting)) for name in names]
        for place, row in enumerate(rows):
            result = _task(workers, row, setting, turns, estimate)
            results.append(result)
            keep(results)
            left = sum(estimate.task_s(later, names, len(turns)) for later in rows[place + 1 :])
            say(f"[{place + 1:2}/{len(rows)}] {_line(result)}; {duration(left)} left")
        described = {worker.name: worker.ask("describe") for worker in workers}
    return results, described


def _task(
    workers: Sequence[Worker], row: TaskRow, setting: Setting, turns: Sequence[int], estimate: Estimate
) -> TaskResult:
    """One step of each provider on each of these batches. With a batch of its own every round is as in training: row counts
    change, and what a library prepares for each new shape of a product is part of the price."""
    result = TaskResult(row, setting.batch, {worker.name: Measured() for worker in workers})
    result.rested = HEAPS_GROW * sum(_appetite(worker, row) for worker in workers) > available_bytes(setting.device)
    # On a GPU each batch twice before it is timed: its first step runs as usual and its second is recorded (engine.graphs),
    # which a run pays once for shapes that it meets hundreds of times.
    known = [*turns, *turns] if setting.device.type == "cuda" else []
    for worker in () if result.rested else workers:
        for turn in (*WARMING, *known):
            _warm(worker, row, turn)
    for turn in turns:
        for worker in workers:
            if result.rested:
                _warm(worker, row)
            measured = result.providers[worker.name]
            measured.add(worker.ask("prepare", row, turn), _step(worker, row))
            measured.state = worker.ask("state")
            estimate.learn(worker.name, row, measured.steps[-1].seconds)
            if result.rested:
                worker.ask("rest")
    for worker in workers:
        worker.ask("rest")
    ours = next(worker for worker in workers if worker.name == OURS)
    _warm(ours, row)
    result.counts, result.gemms = ours.ask("count"), ours.ask("gemms", len(turns))
    ours.ask("rest")
    return result


def _appetite(worker: Worker, row: TaskRow) -> int:
    """Bytes that a step holds beyond what its provider keeps when it rests."""
    peak = _warm(worker, row).peak_bytes
    kept: int = worker.ask("rest")
    return peak - kept


def _warm(worker: Worker, row: TaskRow, turn: int = 0) -> Step:
    """An untimed step: caches, memory, the task's part of the optimizer's state."""
    worker.ask("prepare", row, turn)
    return _step(worker, row)


def _step(worker: Worker, row: TaskRow) -> Step:
    step: Step = worker.ask("step")
    if not math.isfinite(step.loss):
        raise ValueError(f"{worker.name}, {row.name}: loss {step.loss}; a step that computes nothing is no measurement")
    return step


def _line(result: TaskResult) -> str:
    times = [f"{OURS} {result.providers[OURS].seconds:.3g} s"]
    for name, ratio in result.ratios.items():
        times.append(f"{name} {result.providers[name].seconds:.3g} s ({ratio:.2f} x)")
    return f"{result.row.name}: {', '.join(times)}"


def duration(seconds: float) -> str:
    """For people."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))
