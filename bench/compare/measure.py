"""Measuring two checkouts in turns: several starts of both, rounds over tasks and ops within each, until the time is over.

A visit is a step of each side on the same batch, BASE first and HEAD first by turns (ABBA over two rounds): whatever drifts,
and whoever goes first, falls on both. Every round has another batch, as in training. Starts share the time evenly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, Protocol

from bench.compare.revisions import Checkout
from bench.compare.sides import Pair, Side, SideFailed
from bench.compare.verdicts import OP, STEP, TASK, Estimate, Key, of_starts, of_visits
from pipelines.errors import BadInput

FEWEST_STARTS = 3
"""With fewer there is no telling luck from a difference."""
_WARMING = 10_000
"""The batch of an untimed step of each task in every start: the second step of a task takes as long as the tenth."""
_COUNTED = 0
"""The batch whose step is counted."""
_OP_SECONDS = 0.02
"""How long an op is called in one turn, at least."""

Say = Callable[[str], None]


class Progress(Protocol):
    """Told how far it is."""

    def __call__(self, share: float, doing: str) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long."""

    config: Path
    overrides: tuple[str, ...]
    tasks: tuple[str, ...]
    ops: tuple[str, ...]
    batch: int
    seconds: float
    """For all starts together."""
    starts: int
    spent_s: float = 0.0
    """Of the time that was asked for, what is gone or kept back."""

    def told(self) -> dict[str, Any]:
        """The part that a side is told. The path is relative to its checkout, or absolute."""
        return {
            "config": str(self.config), "overrides": list(self.overrides), "batch": self.batch, "ops": list(self.ops)
        }  # fmt: skip


@dataclass
class Measured:
    """What came of it."""

    visits: dict[Key, list[list[tuple[float, float]]]] = field(default_factory=dict)
    """Row -> start -> visits: seconds of (BASE, HEAD)."""
    counts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=dict)
    """Task -> what a step does, of BASE and HEAD; padded rows among it."""
    conditions: tuple[dict[str, str], dict[str, str]] = ({}, {})
    missing: dict[str, str] = field(default_factory=dict)
    """Op -> why it has no row."""
    losses_differ: float = 0.0
    """Largest relative difference of the two losses on one batch: 0 where both sides compute the same bits."""
    starts: int = 0

    def add(self, key: Key, base_s: float, head_s: float) -> None:
        """One visit, to the start under way."""
        starts = self.visits.setdefault(key, [])
        starts.extend([] for _ in range(self.starts - len(starts)))
        starts[-1].append((base_s, head_s))

    def estimates(self) -> dict[Key, Estimate]:
        """Of every row, "step" first: the mean over tasks of each start."""
        values = {key: of_visits(visits) for key, visits in self.visits.items()}
        tasks = [of_start for (kind, _), of_start in values.items() if kind == TASK]
        steps = [math.fsum(start) / len(start) for start in zip(*tasks, strict=True)]
        return {(STEP, STEP): of_starts(steps), **{key: of_starts(value) for key, value in values.items()}}

    def seconds(self) -> dict[Key, tuple[float, float]]:
        """Median seconds of BASE and HEAD in every row."""
        found = {}
        for key, starts in self.visits.items():
            base, head = zip(*(visit for start in starts for visit in start), strict=True)
            found[key] = (median(base), median(head))
        tasks = [pair for (kind, _), pair in found.items() if kind == TASK]
        base, head = zip(*tasks, strict=True)
        return {(STEP, STEP): (geometric_mean(base), geometric_mean(head)), **found}


def measure(base: Checkout, head: Checkout, plan: Plan, progress: Progress, say: Say) -> Measured:
    """Both in turns. Raises SideFailed, and BadInput where the time does not suffice or the sides do different work."""
    run, ends = _Run(plan, progress, Measured()), time.monotonic() + plan.seconds
    starts, number, longest = plan.starts, 0, 0.0
    while number < starts:
        began = time.monotonic()
        until = began + (ends - began) / (starts - number)
        with Side(f"BASE {base.name}", base.folder) as one, Side(f"HEAD {head.name}", head.folder) as other:
            run.start(
                Pair(one, other), f"start {number + 1} of {starts}", (number / starts, (number + 1) / starts), until
            )
        number += 1
        longest = max(longest, run.needed_s)
        starts = _affordable(plan, number, longest, ends - time.monotonic(), starts)
    if starts < plan.starts:
        say(f"a start with one round takes {longest:.0f} s here: {starts} starts instead of {plan.starts}")
    return run.measured


def _affordable(plan: Plan, done: int, cost: float, left: float, starts: int) -> int:
    """How many starts there will be: those that are done, and what fits into the seconds that are left at `cost` each."""
    most = min(starts, done + max(0, int(left / cost)))
    if done == 1 and most < FEWEST_STARTS:
        needed = math.ceil((plan.spent_s + (plan.seconds - left) + (FEWEST_STARTS - 1) * cost) / 15) / 4
        raise BadInput(
            "--minutes", f"too little: a start with one round takes {cost:.1f} s here, {FEWEST_STARTS} are needed, and after "
            f"the first {max(0.0, left):.0f} s are left", f"--minutes {needed:g}, a smaller --model, or fewer --tasks",
        )  # fmt: skip
    return max(most, min(FEWEST_STARTS, starts))


@dataclass
class _Run:
    """One comparison under way."""

    plan: Plan
    progress: Progress
    measured: Measured
    calls: dict[str, int] = field(default_factory=dict)
    """How often an op is called in one turn, the same on both sides."""
    batch: int = 0
    needed_s: float = 0.0
    """By the last start with one round."""

    def start(self, pair: Pair, name: str, shares: tuple[float, float], until: float) -> None:
        """One start of both sides; rounds until the time is over, one at least.

        `shares`: of the comparison that are done before and after this start.
        """
        began = time.monotonic()
        before, after = shares
        self.progress(before, name)
        self.measured.starts += 1
        self._ready(pair)
        self._warm(pair)
        ready = time.monotonic()
        if not self.measured.counts:
            self._count(pair)
        longest = 0.0
        while True:
            round_began = time.monotonic()
            self._round(pair)
            ended = time.monotonic()
            longest = max(longest, ended - round_began)
            if ended + longest > until:
                self.needed_s = ready - began + longest
                return
            left = (until - ended) / (until - began)
            self.progress(after - left * (after - before), name)

    def _ready(self, pair: Pair) -> None:
        base, head = pair.both("start", self.plan.told())
        self.measured.conditions = base["conditions"], head["conditions"]
        self.measured.missing = {**base["missing"], **head["missing"]}

    def _warm(self, pair: Pair) -> None:
        """Caches, memory, moments; and how long a call of each op takes."""
        for task in self.plan.tasks:
            self._prepare(pair, task, _WARMING)
            pair.both("step")
        for op in self._ops():
            warm = [side.ask("op", op, 3) for side in pair.sides]
            self.calls.setdefault(op, max(1, round(_OP_SECONDS / median(warm[0]))))

    def _count(self, pair: Pair) -> None:
        for task in self.plan.tasks:
            rows = self._prepare(pair, task, _COUNTED)
            counts = pair.both("count")
            for of_side, (all_rows, real) in zip(counts, rows, strict=True):
                of_side["padded_rows"] = all_rows - real
            self.measured.counts[task] = counts

    def _round(self, pair: Pair) -> None:
        """Every task and every op once. Who goes first changes from round to round, and from row to row."""
        self.batch += 1
        for place, task in enumerate(self.plan.tasks):
            self._prepare(pair, task, self.batch)
            (base_s, base), (head_s, head) = pair.visit("step", head_first=bool((self.batch + place) % 2))
            self._losses(task, base, head)
            self.measured.add((TASK, task), base_s, head_s)
        for place, op in enumerate(self._ops()):
            calls = pair.visit("op", op, self.calls[op], head_first=bool((self.batch + place) % 2))
            self.measured.add((OP, op), *map(median, calls))

    def _prepare(self, pair: Pair, task: str, turn: int) -> tuple[list[int], list[int]]:
        base, head = pair.both("prepare", task, turn)
        if base[1] != head[1]:
            raise BadInput(
                f"{task}, batch {turn}", f"the revisions draw other samples ({base[1]} and {head[1]} rows): their steps are "
                "different work", "compare revisions whose bench/lengths.json and bench/batches.py are the same",
            )  # fmt: skip
        return base, head

    def _losses(self, task: str, base: float, head: float) -> None:
        for name, loss in (("BASE", base), ("HEAD", head)):
            if not math.isfinite(loss):
                raise SideFailed(f"{name}, {task}: loss {loss}; a step that computes nothing is no measurement")
        largest = max(abs(base), abs(head))
        if largest:
            self.measured.losses_differ = max(self.measured.losses_differ, abs(head - base) / largest)

    def _ops(self) -> list[str]:
        return [op for op in self.plan.ops if op not in self.measured.missing]
