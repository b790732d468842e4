"""Spans of one step: what began and ended within what, and what was spent in each place itself.

    step > phase (data, copy, forward, loss, backward, reduce, step) > block (text 3) > op (attention) > kernel

A place is (phase, block, op); op "" is what lies between the ops of a block, or of a phase. The seconds of all places together
are the step's, because each has what no other place within it has. A kernel is inside of an op and takes nothing from it: what
an op takes beyond its kernels is spent in Python. An op that calls none that could be seen counts as a kernel as a whole.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch

from bench.profile_ops import Op

Kind = Literal["step", "phase", "block", "op", "kernel"]
PHASES = ("data", "copy", "forward", "loss", "backward", "graph", "reduce", "step")
"""Ranges of the engine (`engine.ranges`) and of this benchmark that are phases; its others are blocks."""
BETWEEN = ""
"""The phase of what lies between phases; the op of what lies between ops."""


class Place(NamedTuple):
    """Where time goes."""

    phase: str
    block: str
    op: str


_OUTSIDE = Place(BETWEEN, "", BETWEEN)


@dataclass
class Spent:
    """What one step spent in one place. Seconds."""

    seconds: float = 0.0
    kernel_seconds: float = 0.0
    calls: int = 0
    kernels: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds of each call, by the kernel's name."""


class Clock(Protocol):
    """Takes marks, and says what lies between two of them once the step is over."""

    def mark(self) -> Any: ...

    def seconds(self, began: Any, ended: Any) -> float: ...


class HostClock:
    """For CPUs, whose work is done when a call returns."""

    mark = staticmethod(time.perf_counter)

    @staticmethod
    def seconds(began: float, ended: float) -> float:
        return ended - began


class DeviceClock:
    """For GPUs: events on the stream, so that spans hold what the device did. They are launches too: where the host
    is the bottleneck (H100, steps not recorded), a step that is looked into took 62 % longer."""

    @staticmethod
    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def seconds(began: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        return began.elapsed_time(ended) / 1000


def clock_of(device: torch.device) -> Clock:
    """The device's clock."""
    return DeviceClock() if device.type == "cuda" else HostClock()


class Spans:
    """A list that grows by one entry as a span ends; all else is worked out when the step is over.

    An entry says how long the list was when its span began: what was added since lies within it. So spans need no stack, and
    may be those of any thread, as long as one works while the others wait: autograd's, while the step's own waits for it.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock, self._mark = clock, clock.mark
        self._ended: list[tuple[Kind, str, int, Any, Any]] = []

    def timed(self, kind: Kind, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, each call a span. As short as can be: a step calls some eight hundred times."""
        ended, mark, append = self._ended, self._mark, self._ended.append

        def call(*arguments: Any, **keywords: Any) -> Any:
            at, began = len(ended), mark()
            try:
                return function(*arguments, **keywords)
            finally:
                append((kind, name, at, began, mark()))

        return call

    def op(self, op: Op, function: Callable[..., Any]) -> Callable[..., Any]:
        """See `bench.profile_watch.Watcher`."""
        return self.timed("op", op.name, function)

    def kernel(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """See `Watcher`."""
        return self.timed("kernel", name, function)

    def collective(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """See `Watcher`."""
        return self.timed("phase", "reduce", self.timed("op", name, function))

    def range(self, name: str) -> AbstractContextManager[None]:
        """A watcher of `engine.ranges`."""
        return _Range(self._ended, self._mark, name)

    def spent(self) -> dict[Place, Spent]:
        """By place, in the order in which they began. The device must have come to the end of the step."""
        found: defaultdict[Place, Spent] = defaultdict(Spent)
        order: dict[Place, tuple[int, int]] = {}
        around: list[tuple[int, Place]] = []
        for number in reversed(range(len(self._ended))):  # what lies around a span ended after it
            kind, name, at, began, ended = self._ended[number]
            while around and number < around[-1][0]:
                around.pop()
            above = around[-1][1] if around else _OUTSIDE
            place = placed(above, kind, name)
            order[place] = min(order.get(place, (at, -number)), (at, -number))
            spent, seconds = found[place], self._clock.seconds(began, ended)
            if kind == "kernel":
                spent.kernel_seconds += seconds
                spent.kernels[name].append(seconds)
                continue
            spent.seconds += seconds
            spent.calls += 1
            if around:
                found[above].seconds -= seconds
            around.append((at, place))
        for place, spent in found.items():
            if place.op and not spent.kernels:
                spent.kernel_seconds = spent.seconds
        return {place: found[place] for place in sorted(found, key=order.__getitem__)}


class _Range:
    """A phase or a block, entered and left."""

    __slots__ = ("_at", "_began", "_ended", "_mark", "_name")

    def __init__(self, ended: list[tuple[Kind, str, int, Any, Any]], mark: Callable[[], Any], name: str) -> None:
        self._ended, self._mark, self._name = ended, mark, name

    def __enter__(self) -> None:
        self._at, self._began = len(self._ended), self._mark()

    def __exit__(self, *_: object) -> None:
        kind: Kind = "phase" if self._name in PHASES else "block"
        self._ended.append((kind, self._name, self._at, self._began, self._mark()))


def placed(above: Place, kind: Kind, name: str) -> Place:
    """The place of a span that begins within `above`."""
    match kind:
        case "phase":
            return Place(name, above.block, BETWEEN)
        case "block":
            return Place(above.phase, name, BETWEEN)
        case "op":
            return Place(above.phase, above.block, name)
    return above
