"""What a provider is: something that trains, one step at a time, and says what the step cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bench import lengths
from bench.batches import Samples, draw
from bench.memory import PeakMemory, minor_faults
from engine.config import RunConfig
from engine.tasks import TaskRow

LR_MULTIPLIER = 1e-3
"""Updates are made, but small: random targets teach nothing."""


@dataclass(frozen=True)
class Setting:
    """What all providers of a run are told."""

    run: RunConfig
    """Model, precision, seed, threads, device, kernels. Peers take their precision from their recipe."""
    batch: int
    device: torch.device

    def samples(self, row: TaskRow, turn: int) -> Samples:
        """The samples of a task's batch number `turn`: the same for every provider, others at every turn."""
        return draw(row, lengths.load()[row.name], self.run.model, self.batch, (self.run.seed, turn))


@dataclass(frozen=True)
class Rows:
    """What a provider's batch of a task holds."""

    rows: int
    """Text and region rows over all pairs, padding included."""
    real: int
    """Those that are no padding."""


@dataclass(frozen=True)
class Step:
    """One training step, measured."""

    forward_backward_s: float
    optimizer_s: float
    loss: float
    minor_faults: int
    peak_bytes: int
    """High-water mark of the process during the step."""
    gradient_bytes: int

    @property
    def seconds(self) -> float:
        return self.forward_backward_s + self.optimizer_s


class Provider(Protocol):
    """One way to train."""

    def prepare(self, row: TaskRow, turn: int) -> Rows:
        """Make batch number `turn` of the task, and forget the last one."""

    def step(self) -> Step:
        """One training step on that batch."""

    def rest(self) -> int:
        """Give back all memory but the weights, until the next `prepare`; returns the bytes still held.

        The optimizer's moments then start anew from zeros: what they hold does not matter to a step's time. The first step
        afterwards is slower, because memory comes back page by page: it must not be timed.
        """

    def state(self) -> dict[str, int]:
        """Bytes of weights and of optimizer state."""

    def describe(self) -> dict[str, Any]:
        """What is said of it in the result."""


class StepClock:
    """Times a step in two parts; what lies between them is on nobody's account."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = PeakMemory(device)

    def start(self) -> None:
        """The step begins now."""
        self.memory.reset()
        self._faults = minor_faults()
        self._started = self._now()

    def half(self, gradients: Callable[[], int]) -> None:
        """Forward and backward are done; `gradients` counts bytes off the clock."""
        self._half = self._now()
        self._gradients = gradients()
        self._resumed = time.perf_counter()

    def stop(self, loss: Tensor) -> Step:
        """The update is done."""
        ended = self._now()
        return Step(
            forward_backward_s=self._half - self._started,
            optimizer_s=ended - self._resumed,
            loss=float(loss),
            minor_faults=minor_faults() - self._faults,
            peak_bytes=self.memory.read(),
            gradient_bytes=self._gradients,
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
