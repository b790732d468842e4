"""What may be said of measured ratios: an interval for each row, and a verdict that allows for how many rows there are.

All is done on logarithms of HEAD's time over BASE's. Processes of the same code differ by luck (where memory lies, which
pages are huge), and all pairs of one start share that luck. So a start, not a pair, is one value: the median over its
visits. The interval is Student's t over starts. A bootstrap over pairs would call luck a slowdown, and one over a handful of
starts is too narrow (bench/LOG.md has both).

The interval that is shown is the one of 95 %. With two dozen rows one of them would miss 1 in most comparisons of equal code:
for a verdict of slower or faster, an interval of a higher level must exclude 1. A comparison of equal code gives any such
verdict with a probability of at most `ALARM`: half of it belongs to the row "step", the other rows share the rest
evenly (Bonferroni). Where "step" has such a verdict, the code is not equal: then the others share `WHERE`, to say in which
tasks and ops, which does not touch what equal code gets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.student import quantile

ALARM, WHERE = 0.02, 0.05
STEP, TASK, OP = "step", "task", "op"
"""Kinds of rows; "step" is one row, the mean over the tasks."""
SLOWER, FASTER, SAME, NOISY = "slower", "faster", "same", "too noisy to say"
Key = tuple[str, str]
"""Kind and name of a row."""


@dataclass(frozen=True)
class Estimate:
    """log(HEAD's time / BASE's time): mean, its standard error, degrees of freedom (0: nothing is known of the error)."""

    mean: float
    error: float
    freedom: int

    def interval(self, level: float) -> tuple[float, float]:
        """Of the ratio of times."""
        if self.freedom < 1:
            return 0.0, math.inf
        half = quantile(level, self.freedom) * self.error
        return math.exp(self.mean - half), math.exp(self.mean + half)


@dataclass(frozen=True)
class Row:
    """One line of a comparison. `ratio` is HEAD's time over BASE's, `low` to `high` its 95 % interval."""

    kind: str
    name: str
    ratio: float
    low: float
    high: float
    verdict: str
    judged_low: float
    """The interval that the verdict uses."""
    judged_high: float
    base_s: float | None = None
    """Median seconds, for orientation."""
    head_s: float | None = None

    def fails(self, gate: float) -> bool:
        """Whether it is slower for sure, and by more than `gate` (0.03: 3 %)."""
        return self.verdict == SLOWER and self.ratio > 1 + gate


def of_starts(values: Sequence[float]) -> Estimate:
    """One value of a row for each start."""
    starts = np.asarray(values)
    error = float(starts.std(ddof=1) / math.sqrt(len(starts))) if len(starts) > 1 else math.inf
    return Estimate(float(starts.mean()), error, len(starts) - 1)


def of_visits(visits: Sequence[Sequence[tuple[float, float]]]) -> list[float]:
    """(BASE's, HEAD's) seconds of every visit of every start -> one value for each start."""
    return [float(np.median([math.log(head / base) for base, head in start])) for start in visits]


def difference(head: Sequence[float], base: Sequence[float]) -> Estimate:
    """Of two samples of logarithms that are no pairs (Welch)."""
    parts = [
        (float(np.var(side, ddof=1)) / len(side), len(side) - 1) if len(side) > 1 else None for side in (head, base)
    ]
    mean = float(np.mean(head) - np.mean(base))
    known = [part for part in parts if part is not None]
    return Estimate(mean, *_pooled(known)) if len(known) == 2 else Estimate(mean, math.inf, 0)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent rows."""
    mean = float(np.mean([one.mean for one in estimates]))
    if any(one.freedom < 1 for one in estimates):
        return Estimate(mean, math.inf, 0)
    error, freedom = _pooled([(one.error**2, one.freedom) for one in estimates])
    return Estimate(mean, error / len(estimates), freedom)


def _pooled(variances: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """(error, degrees of freedom) of a sum: Satterthwaite's, rounded down."""
    total = sum(variance for variance, _ in variances)
    spread = sum(variance**2 / freedom for variance, freedom in variances)
    return math.sqrt(total), int(total**2 / spread) if spread else min(freedom for _, freedom in variances)


def judge(
    estimates: Mapping[Key, Estimate], gate: float, seconds: Mapping[Key, tuple[float, float]] | None = None
) -> list[Row]:
    """A row for each estimate. "same": the 95 % interval lies within the gate on both sides."""
    steps = {key: estimate for key, estimate in estimates.items() if key[0] == STEP}
    others = {key: estimate for key, estimate in estimates.items() if key[0] != STEP}
    found = seconds or {}
    rows = [_row(key, estimate, ALARM / 2, gate, found) for key, estimate in steps.items()]
    shared = WHERE if any(row.verdict in (SLOWER, FASTER) for row in rows) else ALARM / 2
    return rows + [_row(key, estimate, shared / len(others), gate, found) for key, estimate in others.items()]


def _row(key: Key, estimate: Estimate, alarm: float, gate: float, seconds: Mapping[Key, tuple[float, float]]) -> Row:
    low, high = estimate.interval(0.95)
    judged = estimate.interval(1 - alarm)
    verdict = _verdict((low, high), judged, gate)
    return Row(*key, math.exp(estimate.mean), low, high, verdict, *judged, *seconds.get(key, (None, None)))


def _verdict(shown: tuple[float, float], judged: tuple[float, float], gate: float) -> str:
    if judged[0] > 1:
        return SLOWER
    if judged[1] < 1:
        return FASTER
    return SAME if 1 / (1 + gate) < shown[0] and shown[1] < 1 + gate else NOISY
