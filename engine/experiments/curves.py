"""Training and validation scores of one task over its own steps, from a run's journal. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.journal import EVENTS_FILE, METRICS_FILE, read_rows

Line = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps, scores in per cent."""


@dataclass(frozen=True)
class Curve:
    """One task of one run."""

    training: Line
    """Means of log windows."""
    validation: Line


def curve(folder: Path, task: str) -> Curve:
    """Raises BadInput for a folder without a journal, or a broken one."""
    rows = [row for row in read_rows(folder / METRICS_FILE) if row["task"] == task]
    iterations, steps = ([0, *(row[key] for row in rows)] for key in ("iteration", "steps"))
    scored = [row for row in rows if row["score"] is not None]
    validations = [
        row for row in read_rows(folder / EVENTS_FILE) if row["event"] == "validation" and row["task"] == task
    ]
    places = np.interp([row["iteration"] for row in validations], iterations, steps)
    return Curve(
        (np.array([row["steps"] for row in scored], float), np.array([100 * row["score"] for row in scored], float)),
        (places, np.array([100 * row["score"] for row in validations], float)),
    )
