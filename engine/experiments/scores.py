"""What a finished run scored. The one place that knows where scores come from. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.config import load, load_tasks
from engine.journal import EVENTS_FILE, METRICS_FILE, read_rows

SPLIT = "val"


@dataclass(frozen=True)
class Score:
    """One task of one run, in [0, 1]."""

    score: float
    """On `split`, after the last iteration."""
    split: str
    metric: str
    majority: float | None
    """Of the majority answer, or chance."""
    blind: float | None
    """Of the same weights with every region feature zeroed."""


def scores_of(folder: Path) -> dict[str, Score]:
    """Scores of a finished run by task: the final validation of its journal. Raises BadInput for a folder without one."""
    metrics = {row.name: row.metric for row in load_tasks(load(folder / "config.yaml"))[1]}
    return {
        row["task"]: Score(row["score"], SPLIT, metrics[row["task"]], row["majority"], row["blind"])
        for row in read_rows(folder / EVENTS_FILE)
        if row["event"] == "result"
    }


def steps_of(folder: Path) -> dict[str, int]:
    """Steps that each task of a run took."""
    return {row["task"]: row["steps"] for row in read_rows(folder / METRICS_FILE)}
