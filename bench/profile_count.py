"""What a step does in each place, counted: bytes, FLOPs, launches. In a step of its own, which nobody times."""

from __future__ import annotations

import inspect
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.counters import ALLOCATIONS
from bench.gemms import product_flops
from bench.profile_ops import Cost, Kept, Op
from bench.profile_spans import BETWEEN, PHASES, Kind, Place, placed
from bench.traffic import moved_bytes

Function = Callable[..., Any]


@dataclass
class Counted:
    """Of one step in one place."""

    cost: Cost = field(default_factory=Cost)
    launches: int = 0
    """Native kernels, and ops of torch's that compute: views and bare allocations launch nothing."""


class _Where(TorchDispatchMode):
    """A watcher that knows where the step is."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Place(BETWEEN, "", BETWEEN)
        self.by_formula = False
        """Whether an op's own formula counts what happens now."""

    @contextmanager
    def within(self, kind: Kind, name: str, by_formula: bool = False) -> Iterator[None]:
        before = self.place, self.by_formula
        self.place, self.by_formula = placed(self.place, kind, name), by_formula
        try:
            yield
        finally:
            self.place, self.by_formula = before

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        """See `Watcher`."""
        with self.within("phase" if name in PHASES else "block", name):
            yield

    def op(self, op: Op, function: Function) -> Function:
        """See `Watcher`."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            with self.within("op", op.name, by_formula=op.work is not None):
                return function(*arguments, **keywords)

        return call

    def kernel(self, name: str, function: Function) -> Function:
        """See `Watcher`."""
        return function

    def collective(self, name: str, function: Function) -> Function:
        """See `Watcher`."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            with self.within("phase", "reduce"), self.within("op", name):
                return function(*arguments, **keywords)

        return call


class Counting(_Where):
    """Counts while it is entered, and watches."""

    def __init__(self) -> None:
        super().__init__()
        self.found: defaultdict[Place, Counted] = defaultdict(Counted)
        self._kept: Kept = {}

    def op(self, op: Op, function: Function) -> Function:
        """Counted by the op's formula, where it has one."""
        watched, work = super().op(op, function), op.work
        if work is None:
            return watched
        signature = inspect.signature(function)

        def call(*arguments: Any, **keywords: Any) -> Any:
            result = watched(*arguments, **keywords)
            bound = signature.bind(*arguments, **keywords)
            bound.apply_defaults()
            with self.within("op", op.name, by_formula=True):
                self._add(work(bound.arguments, result, self._kept))
            return result

        return call

    def kernel(self, name: str, function: Function) -> Function:
        """One launch."""

        def call(*arguments: Any) -> Any:
            self.found[self.place].launches += 1
            return function(*arguments)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in ALLOCATIONS or name in ("_unsafe_view", "detach", "alias", "_local_scalar_dense"):
            return result
        self.found[self.place].launches += 1
        if not self.by_formula:
            self._add(Cost(moved_bytes(name, func, args, kwargs, result), product_flops(func, args, result)))
        return result

    def _add(self, cost: Cost) -> None:
        counted = self.found[self.place]
        counted.cost = counted.cost + cost


class Holding(_Where):
    """What memory a step holds beside what was there before, where it was taken, and what was held when it was most. Bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak: dict[Place, int] = {}
        """By the place that took it."""
        self.peak_place = self.place
        self.peaks: dict[Place, int] = {}
        """The most that was held in all, while the step was in a place."""
        self._held: Counter[Place] = Counter()
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in func._schema.returns):  # else it lay somewhere before
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    self._notice(x)
        return result

    def _notice(self, x: Tensor) -> None:
        storage, place = x.untyped_storage(), self.place
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def freed(_: object) -> None:
            self.now -= size
            self._held[place] -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self._held[place] += size
        self.peaks[place] = max(self.peaks.get(place, 0), self.now)
        if self.now > self.peak:
            self.peak, self.peak_place, self.at_peak = self.now, place, dict(self._held)

    def as_json(self) -> dict[str, Any]:
        """The peak, and its holders, the largest first."""
        held = sorted(((size, place) for place, size in self.at_peak.items() if size), reverse=True)
        return {
            "peak_bytes": self.peak,
            "peak_in": self.peak_place._asdict(),
            "held_at_peak": [{**place._asdict(), "bytes": size} for size, place in held],
            "most_held_while_in": [{**place._asdict(), "bytes": size} for place, size in self.peaks.items()],
        }
