"""This machine's CPU as one rank sees it.

Each kind of work has a line, seconds = calls * fixed + FLOPs * per_flop + bytes * per_byte, fitted to runs of several sizes
that `bench.plan_samples` times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np

from bench.plan_cost import UPDATE_BYTES, Work
from bench.plan_count import Counted
from bench.plan_samples import Sample

Of = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Line:
    """What a kind of work costs."""

    fixed: float
    per_flop: float
    per_byte: float

    def seconds(self, calls: float, flops: float, moved: float) -> float:
        return calls * self.fixed + flops * self.per_flop + moved * self.per_byte

    @classmethod
    def fit(cls, samples: Sequence[Sample]) -> Line:
        """The line whose largest relative errors are least in the mean square; no coefficient is negative."""
        rows = np.array([(s.calls, s.flops, s.bytes) for s in samples], np.float64)
        rows /= np.array([[s.seconds] for s in samples])
        scale = np.maximum(rows.max(0), 1e-300)
        kept = [i for i in range(3) if rows[:, i].any()]
        found = np.zeros(3)
        while kept:
            solution = np.linalg.lstsq(rows[:, kept] / scale[kept], np.ones(len(rows)), rcond=None)[0]
            if (solution >= 0).all():
                found[kept] = solution / scale[kept]
                break
            kept.pop(int(solution.argmin()))
        return cls(*found.tolist())


@dataclass(frozen=True)
class Rates:
    """What kernels take by themselves, and what they take among others: in a step caches are colder, and Python and autograd
    stand between any two."""

    lines: dict[str, Line]
    colder: float
    """Factor on all kernels."""
    between: float
    """Seconds a call."""

    def work(self, counted: Counted) -> Work:
        """Forward and backward; what lies between calls is shared out among them."""
        calls, passed, lines = counted.calls, counted.bytes, self.lines
        flops, moved = (sum(getattr(p, what) for p in counted.products) for what in ("flops", "bytes"))
        products = lines["products"].seconds(calls["products"], flops, moved)
        attention = lines["attention"].seconds(calls["attention"], counted.attention_flops, passed["attention"])
        # A GELU is part of the products that were measured, whether it is fused with them or not.
        elementwise = lines["layernorm"].seconds(calls["layernorm"], 0, passed["layernorm"])
        elementwise += lines["other"].seconds(calls["other"], 0, passed["other"])
        return Work(
            self.colder * products + self.between * calls["products"],
            self.colder * attention + self.between * calls["attention"],
            self.colder * elementwise + self.between * (calls["layernorm"] + calls["other"] + calls["gelu"]),
        )

    @classmethod
    def fit(cls, samples: Sequence[Sample], of: Of = median) -> Rates:
        """Lines from kernels alone; then the two others from whole steps. `of`: the runs of one size, which one counts."""
        by_kind: defaultdict[str, list[Sample]] = defaultdict(list)
        for sample in _once(samples, of):
            by_kind[sample.kind].append(sample)
        steps = by_kind.pop("steps")
        alone = cls({kind: Line.fit(found) for kind, found in by_kind.items()}, 1.0, 0.0)
        among = Line.fit([
            Sample("steps", step.counted.launches, alone.work(step.counted).seconds, 0, step.seconds)
            for step in steps if step.counted
        ])  # fmt: skip
        return cls(alone.lines, among.per_flop, among.fixed)


def _once(samples: Sequence[Sample], of: Of) -> Iterator[Sample]:
    """One sample for all runs of one size."""
    seconds: defaultdict[tuple, list[float]] = defaultdict(list)
    by_size = {}
    for sample in samples:
        c = sample.counted
        step = () if c is None else (c.flops, c.launches, c.rows, *c.bytes.values())
        size = (sample.kind, sample.calls, sample.flops, sample.bytes, *step)
        seconds[size].append(sample.seconds)
        by_size[size] = sample
    for size, sample in by_size.items():
        yield replace(sample, seconds=of(seconds[size]))


@dataclass(frozen=True)
class CpuRank:
    """One of the ranks that share this machine's cores. Nothing overlaps: the cores that would send are those that compute."""

    title: str
    rates: Rates
    images_per_s: float
    memory: float
    reduce: Line = Line(0.0, 0.0, 0.0)
    """An all-reduce between the ranks, by its bytes."""
    deepspeed: Mapping[int, float] = field(default_factory=dict)
    """By ZeRO stage, seconds that it adds to a step."""

    measured = True
    overlap = 0.0

    def work(self, counted: Counted, graphs: bool) -> Work:
        """See `Machine`."""
        return self.rates.work(counted)

    def update(self, values: int, tensors: int) -> float:
        """See `Machine`."""
        return self.rates.lines["adamw"].seconds(tensors, 0, values * UPDATE_BYTES["bfloat16"])

    def travel(self, sent: float, ranks: int, collectives: int, both_ways: bool) -> float:
        """gloo's all-reduce was measured; half of it goes either way."""
        return self.reduce.seconds(collectives, 0, sent) / (1 if both_ways else 2)

    def agree(self, work: Work) -> float:
        """One all-reduce of next to nothing."""
        return self.reduce.seconds(1, 0, 0)

    def engine(self, stage: int) -> float:
        """See `Machine`."""
        return self.deepspeed[stage]

    def load(self, images: int, sent: int, threads: int) -> float:
        """A thread beside the step; it takes its share of a core, which is not counted."""
        return images / (self.images_per_s * threads)
