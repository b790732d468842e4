"""`Cursor`: all that a run must remember beside tensors, as plain data. Imports no torch."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

FORMAT = 1
"""Version of the checkpoint format."""


PLANNED = ("iteration", "remaining", "due", "phase", "consumed", "scores", "best", "config_hash")
"""What of a cursor decides what comes next (the controllers follow from the scores)."""


@dataclass
class Window:
    """Sums over a task's steps since the last row of metrics.jsonl, so that a resume continues the same row."""

    steps: int = 0
    examples: int = 0
    loss: float = 0.0
    score: float = 0.0
    grad_norm: float = 0.0
    skipped: int = 0
    parts: list[float] = field(default_factory=list)
    """Sums of the parts of a loss that is a sum."""


@dataclass
class Cursor:
    """Where a run stands. Random draws are functions of (seed, iteration, task, sample), so no generator has a state.

    A stop may fall between two tasks of an iteration: `iteration` is the one under way, `remaining` its tasks that have
    not run yet, `due` its validations that have not happened yet. Both empty: the iteration is complete.
    """

    iteration: int = 0
    remaining: list[str] = field(default_factory=list)
    due: list[str] = field(default_factory=list)
    phase: int = 0
    """Of the curriculum."""
    consumed: dict[str, int] = field(default_factory=dict)
    """Batches that each task has taken; its sampler is a function of this."""
    controllers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """States of the stop-and-go controllers."""
    scores: dict[str, float] = field(default_factory=dict)
    """Last validation score of each task."""
    best: dict[str, float] = field(default_factory=dict)
    """Best validation score of each task."""
    windows: dict[str, Window] = field(default_factory=dict)
    skipped_in_row: dict[str, int] = field(default_factory=dict)
    """Steps of each task that were not finite, since its last good one."""
    config_hash: str = ""

    @property
    def partial(self) -> bool:
        """Whether the iteration is still under way."""
        return bool(self.remaining or self.due)

    def plan_hash(self) -> int:
        """Of all that decides what comes next, below 2**32: the same on every rank."""
        told = [getattr(self, key) for key in PLANNED]
        return zlib.crc32(json.dumps(told, sort_keys=True).encode())

    def covers(self, row: Mapping[str, Any]) -> bool:
        """Whether a journal row was written before this cursor: a resume cuts the others and writes them again."""
        if row["iteration"] < self.iteration:
            return True
        if row["iteration"] > self.iteration or row.get("event") in ("result", "end"):
            return False
        if not self.partial:
            return True
        decided = row.get("event") in ("validation", "decision")
        return decided and row["task"] not in self.due and not self.remaining

    def to_json(self) -> str:
        """Floats keep every bit (Python prints the shortest decimal that reads back equal)."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Cursor:
        """Raises ValueError for text of another form or version."""
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"not a cursor of format {FORMAT}")
        if data.keys() != {f.name for f in fields(cls)}:
            raise ValueError(f"not a cursor of format {FORMAT}: keys {sorted(data)}")
        try:
            data["windows"] = {task: Window(**window) for task, window in data["windows"].items()}
        except (AttributeError, TypeError) as error:
            raise ValueError(f"not a cursor of format {FORMAT}: windows: {error}") from None
        return cls(**data)
