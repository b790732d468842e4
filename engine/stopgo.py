"""Dynamic stop-and-go: one controller per task turns validation scores into go or stop. Imports no torch.

Paper section 3.3 and Algorithm 1; spec sections 4.1 and 4.2. Scores are higher-is-better and not negative; thresholds
are relative to the best score. A controller's state is plain data: `restore(json.loads(json.dumps(c.state_dict())))`
continues as `c` does.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, Protocol, Self


class Decision(StrEnum):
    """Whether a task runs in every iteration, or in every gap-th only."""

    GO = "go"
    STOP = "stop"


class BadScore(ValueError):
    """A validation score that no decision can rest on: not finite, or negative."""


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
class Controller(ABC):
    """Settings and state of one task's controller, all of it plain data. A new one is in go."""

    KIND: ClassVar[str]

    stop_threshold: float = 0.001
    go_threshold: float = 0.005
    patience: int = 2
    decision: Decision = Decision.GO

    def update(self, score: float) -> Decision:
        """Take one validation score; returns the state from now on. Raises BadScore, then nothing has changed."""
        if not math.isfinite(score) or score < 0:
            raise BadScore(f"{score} is no validation score: it must be a finite number of at least 0")
        self._take(float(score))
        return self.decision

    @abstractmethod
    def _take(self, score: float) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """Settings and state as plain data, fit for JSON."""
        return {"controller": self.KIND, **asdict(self), "decision": str(self.decision)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """The controller whose `state_dict` this is; `state` is left as it is. Raises ValueError for another form."""
        expected = {"controller", *(field.name for field in fields(cls))}
        if state.keys() != expected or state["controller"] != cls.KIND:
            raise ValueError(f"no state of the {cls.KIND} stop-and-go controller: keys {sorted(state)}")
        values: dict[str, Any] = copy.deepcopy(state)
        del values["controller"]
        values["decision"] = Decision(values["decision"])
        return cls(**values)


@dataclass
class ReferenceController(Controller):
    """The authors' controller, step for step (spec section 4.1).

    A gain is measured against the last *accepted* best, so that many gains below the threshold can add up to one.
    While stopped, an evaluation that stops the task once more is not tested for divergence.
    """

    KIND: ClassVar[str] = "reference"

    cooldown: int = 1
    best: float | None = None
    without_gain: int = 0
    cooling: int = 0

    def _take(self, score: float) -> None:
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

    def _turn(self, decision: Decision) -> None:
        self.decision = decision
        self.cooling = self.cooldown
        self.without_gain = 0


@dataclass
class PaperController(Controller):
    """Algorithm 1 as written.

    In go, stop when `patience` evaluations have passed since the last change of state (or the start), there is a score
    before them, and none of the last `patience` exceeds (1 + stop_threshold) x the best score before them.
    In stop, go when the score is below (1 - go_threshold) x the best score so far.
    """

    KIND: ClassVar[str] = "paper"

    since_change: int = 0
    best_before: float | None = None
    recent: list[float] = field(default_factory=list)

    def _take(self, score: float) -> None:
        self.since_change += 1
        self.recent.append(score)
        if len(self.recent) > self.patience:
            leaving = self.recent.pop(0)
            self.best_before = leaving if self.best_before is None else max(self.best_before, leaving)
        if self.decision is Decision.GO and self._converged():
            self._turn(Decision.STOP)
        elif self.decision is Decision.STOP and self._diverged(score):
            self._turn(Decision.GO)

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


CONTROLLERS: dict[str, type[ReferenceController] | type[PaperController]] = {
    "reference": ReferenceController,
    "paper": PaperController,
}


def new_controller(settings: Settings) -> Controller:
    """The configured controller, in go, with nothing seen."""
    shared = (settings.stop_threshold, settings.go_threshold, settings.patience)
    if settings.controller == "paper":
        return PaperController(*shared)
    return ReferenceController(*shared, cooldown=settings.cooldown)


def restore(state: dict[str, Any]) -> Controller:
    """The controller, of either kind, whose `state_dict` this is. Raises ValueError for a state of another form."""
    kind = CONTROLLERS.get(str(state.get("controller")))
    if kind is None:
        raise ValueError(f"no state of a stop-and-go controller: keys {sorted(state)}")
    return kind.from_state(state)
