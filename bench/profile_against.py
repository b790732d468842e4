"""What differs between two profiles: which op changed most, in counters or in time.

Another moment, or another machine, makes all ops slower together. So each op's time is compared with what it would be if it had
changed as most of the step has: the median ratio, ops weighed by their time. What goes beyond is the op's own change. It counts
as noise where the two bands (20 to 80 % of the rounds) meet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bench.kernel_report import table
from bench.profile_account import Line, alike
from pipelines.errors import BadInput

_COUNTERS = ("calls", "launches", "bytes", "flops")
_SHOWN = 10
_WORTH_NAMING = 0.01
"""Of a step: twelve rounds on a busy machine tell no smaller change from chance."""
_SAME = 1e-6
"""Counters of several batches are means."""
_MUST_AGREE = ("model", "batch", "precision", "threads", "device", "isa", "batches")


@dataclass(frozen=True)
class Change:
    """One op in two profiles. Seconds of a step."""

    key: str
    before: float
    now: float
    expected: float
    """What it would be if it had changed as most of the step has."""
    noise: bool
    counters: tuple[str, ...]
    """What is counted differently, in words."""

    @property
    def excess(self) -> float:
        return self.now - self.expected


@dataclass(frozen=True)
class Comparison:
    """One task in two profiles, what changed most first: counters before clocks, and noise last."""

    factor: float
    """How much longer most of the step takes."""
    before: float
    now: float
    changes: list[Change]

    def text(self, name: str) -> str:
        """For people."""
        rows = [self._row(one) for one in self.changes[:_SHOWN]]
        head = f"{name}: {_ms(self.before)} ms before, {_ms(self.now)} now; most of it takes {self.factor:.3f} times as long"
        headers = ("changed most", "before, ms", "now", "own change", "of the step", "", "counted")
        return "\n\n".join([head, table(headers, rows), self.named])

    def _row(self, one: Change) -> tuple[str, ...]:
        share = one.excess / (self.factor * self.before)
        times = (_ms(one.before), _ms(one.now), f"{1e3 * one.excess:+,.2f}", f"{share:+.1%}")
        return one.key, *times, "within the noise" if one.noise else "", "; ".join(one.counters)

    @property
    def named(self) -> str:
        """The first of them, in words."""
        first = next(iter(self.changes), None)
        if first is None or (first.noise and not first.counters):
            return "no op changed beyond the noise"
        if abs(first.excess) < _WORTH_NAMING * self.before * self.factor and not first.counters:
            return f"no op changed by {_WORTH_NAMING:.0%} of the step"
        said = f"{1e3 * abs(first.excess):,.2f} ms {'more' if first.excess > 0 else 'less'} than the rest of the step explains"
        counted = f" ({'; '.join(first.counters)})" if first.counters else ""
        return f"changed most: {first.key}, {said}{counted}"


def compare(before: Sequence[Line], now: Sequence[Line]) -> Comparison:
    """Two accounts of one step; blocks that are alike count together."""
    old, new = ({line.key: line for line in alike(of)} for of in (before, now))
    factor = _factor([(old[key].seconds, line.seconds) for key, line in new.items() if key in old])
    changes = [_change(key, old.get(key), new.get(key), factor) for key in {**old, **new}]
    ordered = sorted(changes, key=lambda one: (one.noise, -abs(one.excess)))
    return Comparison(factor, sum(line.seconds for line in before), sum(line.seconds for line in now), ordered)


def _factor(pairs: Sequence[tuple[float, float]]) -> float:
    """The median of now / before, each weighed by before; 1 where there is nothing to compare."""
    ratios = sorted((now / before, before) for before, now in pairs if before > 0)
    half, passed = sum(weight for _, weight in ratios) / 2, 0.0
    for ratio, weight in ratios:
        passed += weight
        if passed >= half:
            return ratio
    return 1.0


def _change(key: str, before: Line | None, now: Line | None, factor: float) -> Change:
    if before is None or now is None:
        seconds = [0.0 if line is None else line.seconds for line in (before, now)]
        what = "new" if before is None else "gone"
        return Change(key, seconds[0], seconds[1], factor * seconds[0], False, (what,))
    apart = now.low > factor * before.high or now.high < factor * before.low
    return Change(key, before.seconds, now.seconds, factor * before.seconds, not apart, tuple(_counted(before, now)))


def _counted(before: Line, now: Line) -> list[str]:
    pairs = {name: (getattr(before, name), getattr(now, name)) for name in _COUNTERS}
    return [f"{name} {a:,.0f} to {b:,.0f}" for name, (a, b) in pairs.items() if abs(a - b) > _SAME * max(a, b)]


@dataclass(frozen=True)
class Earlier:
    """An earlier profile's JSON."""

    path: Path
    tasks: Mapping[str, list[Line]]
    conditions: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Earlier:
        """BadInput for a file that is not one."""
        try:
            found = json.loads(path.read_text())
            names = {field.name for field in fields(Line)}
            tasks = {
                str(name): [Line(**{key: op[key] for key in names}) for op in task["ops"]]
                for name, task in found["tasks"].items()
            }
            conditions = dict(found["conditions"])
            _check(tasks)
        except OSError as error:
            raise BadInput(path, error.strerror or str(error), "give a file that --json has written") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                path, f"no profile ({type(error).__name__}: {error})", "give a file that --json has written"
            ) from None
        return cls(path, tasks, conditions)

    def of(self, task: str) -> list[Line]:
        """BadInput for a task that it does not have."""
        if task not in self.tasks:
            raise BadInput(self.path, f"has no task {task}", f"--tasks {','.join(self.tasks)}")
        return self.tasks[task]

    def differences(self, conditions: Mapping[str, Any]) -> list[str]:
        """What was not the same, so that times and counters may differ for other reasons than the code."""
        pairs = {name: (self.conditions.get(name), conditions.get(name)) for name in _MUST_AGREE}
        return [f"{name} was {before}, now {now}" for name, (before, now) in pairs.items() if before != now]


def _check(tasks: Mapping[str, Sequence[Line]]) -> None:
    """TypeError for values that are no text or no numbers."""
    for line in (line for found in tasks.values() for line in found):
        for field in fields(Line):
            value, wanted = getattr(line, field.name), str if field.type == "str" else (int, float)
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise TypeError(f"{field.name} is {value!r}")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}"
