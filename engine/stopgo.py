"""Dynamic stop-and-go: one controller per task turns validation scores into go or stop. Imports no torch.

Paper section 3.3 and Algorithm 1; spec sections 4.1 and 4.2. Scores are higher-is-better and not negative; thresholds
are relative to the best score. A controller's state is plain data: `restore(json.loads(json.dumps(c.state_dict())))`
continues as `c` does.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, Protocol


class Decision(StrEnum):
    """Whether a task runs in every iteration, or in every gap-th only."""

    GO = "go"
    STOP = "stop"


class BadScore(ValueError):
    """A validation score that no decision can rest on: not finite, or negative."""


class Controller(Protocol):
    """What the loop needs of a controller."""

    decision: Decision

    def update(self, score: float) -> Decision:
        """Take one validation score; returns the state from now on. Raises BadScore, then nothing has changed."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Settings and state as plain data."""
        ...


class Settings(Protocol):
    """What the configuration says about stop-and-go (`engine.config.StopGo`)."""

    @property
    def controller(self) -> str: ...
    @property
    def stop_threshold(self) -> float: ...
    @property
    def go_threshold(self) -> float: ...
    @property
    def patience(self) -> int: ...
    @property
    def cooldown(self) -> int: ...


@dataclass
class ReferenceController:
    """The authors' controller, step for step (spec section 4.1).

    A gain is measured against the last *accepted* best, so many gains of less than the threshold can add up to one.
    While stopped, an evaluation that stops the task again is not tested for divergence.
    """

    KIND: ClassVar[str] = "reference"

    stop_threshold: float = 0.001
    go_threshold: float = 0.005
    patience: int = 2
    cooldown: int = 1
    best: float | None = None
    without_gain: int = 0
    cooling: int = 0
    decision: Decision = Decision.GO

    def update(self, score: float) -> Decision:
        """See `Controller.update`."""
        _check(score)
        if self.best is None or score > self.best * (1 + self.stop_threshold):
            self.best = score
            self.without_gain = 0
        else:
            self.without_gain += 1
        if self.cooling > 0:
            self.cooling -= 1
            self.without_gain = 0
        if self.without_gain >= self.patience:
            self._turn(Decision.STOP)
        elif self.decision is Decision.STOP and score < self.best * (1 - self.go_threshold):
            self._turn(Decision.GO)
        return self.decision

    def _turn(self, decision: Decision) -> None:
        self.decision = decision
        self.cooling = self.cooldown
        self.without_gain = 0

    def state_dict(self) -> dict[str, Any]:
        """See `Controller.state_dict`."""
        return _plain(self)


@dataclass
class PaperController:
    """Algorithm 1 as written.

    In go, stop when `patience` evaluations have passed since the last change of state (or the start), there is a score
    before them, and none of the last `patience` exceeds (1 + stop_threshold) x the best score before them.
    In stop, go when the score is below (1 - go_threshold) x the best score so far.
    """

    KIND: ClassVar[str] = "paper"

    stop_threshold: float = 0.001
    go_threshold: float = 0.005
    patience: int = 2
    since_change: int = 0
    best_before: float | None = None
    recent: list[float] = field(default_factory=list)
    decision: Decision = Decision.GO

    def update(self, score: float) -> Decision:
        """See `Controller.update`."""
        _check(score)
        self.since_change += 1
        self.recent.append(score)
        if len(self.recent) > self.patience:
            leaving = self.recent.pop(0)
            self.best_before = leaving if self.best_before is None else max(self.best_before, leaving)
        if self.decision is Decision.GO and self._converged():
            self._turn(Decision.STOP)
        elif self.decision is Decision.STOP and self._diverged(score):
            self._turn(Decision.GO)
        return self.decision

    def _converged(self) -> bool:
        if self.since_change < self.patience or self.best_before is None:
            return False
        return max(self.recent) <= self.best_before * (1 + self.stop_threshold)

    def _diverged(self, score: float) -> bool:
        best = max(self.recent) if self.best_before is None else max(self.best_before, *self.recent)
        return score < best * (1 - self.go_threshold)

    def _turn(self, decision: Decision) -> None:
        self.decision = decision
        self.since_change = 0

    def state_dict(self) -> dict[str, Any]:
        """See `Controller.state_dict`."""
        return _plain(self)


def new_controller(settings: Settings) -> ReferenceController | PaperController:
    """A controller in go that has seen nothing."""
    shared = (settings.stop_threshold, settings.go_threshold, settings.patience)
    if settings.controller == PaperController.KIND:
        return PaperController(*shared)
    return ReferenceController(*shared, cooldown=settings.cooldown)


def restore(state: dict[str, Any]) -> ReferenceController | PaperController:
    """The controller whose `state_dict` this is. Raises ValueError for a state of another form."""
    kinds = {kind.KIND: kind for kind in (ReferenceController, PaperController)}
    values = dict(state)
    kind = kinds.get(values.pop("controller", None))
    if kind is None or values.keys() != {field.name for field in fields(kind)}:
        raise ValueError(f"no state of a stop-and-go controller: keys {sorted(state)}")
    values["decision"] = Decision(values["decision"])
    if kind is PaperController:
        values["recent"] = list(values["recent"])
    return kind(**values)


def _plain(controller: ReferenceController | PaperController) -> dict[str, Any]:
    return {"controller": controller.KIND, **asdict(controller), "decision": str(controller.decision)}


def _check(score: float) -> None:
    if not math.isfinite(score) or score < 0:
        raise BadScore(f"{score} is no validation score: it must be a finite number of at least 0")
