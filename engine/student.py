"""Quantiles of Student's t, for any level, and the interval of a mean of few values. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cache


@cache
def quantile(level: float, freedom: int) -> float:
    """The t that a share `level` (0 to 1) of the distribution with `freedom` degrees lies within, -t to t.

    ValueError for less than one degree of freedom, or a level outside of 0 to 1.
    """
    if freedom < 1 or not 0 <= level < 1:
        raise ValueError(f"no quantile of level {level} with {freedom} degrees of freedom")
    low, high = 0.0, 1.0
    while _within(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return high


def interval(values: Sequence[float]) -> float:
    """Half-width of the 95 % interval of the mean of these values; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    return quantile(0.95, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def _within(t: float, freedom: int) -> float:
    """P(|T| ≤ t), by the finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for place in range(2 + odd, freedom + 1, 2):
        total += term
        term *= square * (place - 1) / place
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
