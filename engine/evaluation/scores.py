"""What an evaluation finds out about one split of one data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Marks = NDArray[np.float64]
"""[n], in [0, 1]: what each example gets; their mean is the data set's score."""


@dataclass(frozen=True)
class Group:
    """Some of a split's examples: those of one answer type, question type, kind of phrase."""

    score: float
    n: int


@dataclass(frozen=True)
class TaskScores:
    """One data set."""

    score: float | None
    """In [0, 1]: the number that the paper reports, `metrics`' first. None where the split publishes no answers."""
    metrics: dict[str, float]
    """By name, in the order in which people want them. Shares are in [0, 1]; ranks count from 1."""
    groups: dict[str, Group]
    """By `Example.group`, in the order of their names; empty where the data set knows none."""
    n: int
    """Examples of the split."""
    split: str = "test"
    """Which one it was."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summary(
    marks: Marks | None, metrics: Mapping[str, float], names: tuple[str, ...], codes: NDArray[np.int32], split: str
) -> TaskScores:
    """Scores of n examples. `names` and `codes`: the groups, and which of them each example is of, int32 [n]."""
    if marks is None:
        return TaskScores(None, dict(metrics), {}, len(codes), split)
    sums = np.bincount(codes, weights=marks, minlength=len(names))
    counts = np.bincount(codes, minlength=len(names))
    groups = {name: Group(float(s / c), int(c)) for name, s, c in zip(names, sums, counts, strict=True) if name and c}
    return TaskScores(float(marks.mean()), dict(metrics), dict(sorted(groups.items())), len(codes), split)
