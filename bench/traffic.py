"""Bytes that an op's kernels move, against the least possible: counted in Triton's interpreter, without a GPU.

The op runs on a small batch with every load and store of every program looked at. Two counts come of it:

- *issued*: what programs load and store, lanes that are masked out not, and places that one instruction names twice once;
- *distinct*: each byte once per launch for loading and once for storing. It is what must cross the GPU's memory where its cache
  (40 MB and more) keeps what programs share: the tiles of a matrix product.

Whatever plain torch does between kernels (a copy, a fill, a product) is a launch too, and moves its operands once. Counted
in float16, which the interpreter computes natively and which has bfloat16's size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SAMPLES = 4
"""Of the batch: a few hundred programs, at 1 to 10 ms each."""

_NOTHING_MOVES = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
    "set_",
}
_PART_IS_READ = {"index_select", "index", "gather", "embedding"}
"""torch ops that read of their first operand as much as they write."""


@dataclass
class Traffic:
    """Of one pass over one case. Bytes."""

    launches: int = 0
    issued: int = 0
    distinct: int = 0
    atomics: int = 0
    names: list[str] = field(default_factory=list)
    """What was launched, in order."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.launches + other.launches,
            self.issued + other.issued,
            self.distinct + other.distinct,
            self.atomics + other.atomics,
            self.names + other.names,
        )


@dataclass(frozen=True)
class Counted:
    """One case: its passes, and the least bytes of both together."""

    op: str
    shape: str
    forward: Traffic
    backward: Traffic
    least: int
    longest: int
    """See `Case.longest`."""

    @property
    def both(self) -> Traffic:
        return self.forward + self.backward


GOALS = {"attention": (1.3, 1.5), "coattention": (1.3, 1.5)}
"""Op -> (goal, floor) of bytes over least, where one block holds all keys; the others have (1.1, 1.2)."""

_ONE_KEY_BLOCK = 64
_HAVE_PRODUCTS = ("masked_region_loss", "masked_lm_loss")


def within(case: Counted) -> tuple[tuple[float, float] | None, str]:
    """((goal, floor), verdict); None where no goal is set: attention to more keys than one block holds."""
    if case.op in GOALS and case.longest > _ONE_KEY_BLOCK:
        return None, ""
    goal, floor = GOALS.get(case.op, (1.1, 1.2))
    ratio = (case.both.distinct if case.op in _HAVE_PRODUCTS else case.both.issued) / case.least
    return (goal, floor), "ok" if ratio <= goal else "over the goal" if ratio <= floor else "over the floor"


@contextmanager
def counting() -> Iterator[Traffic]:
    """What Triton kernels (interpreted) and torch ops move while the `with` block runs. Not for several threads."""
    traffic = Traffic()
    with _Operands(traffic) as operands, _interpreter(traffic, operands):
        yield traffic


class _Operands(TorchDispatchMode):
    """Counts torch's own ops; what the interpreter does with its arguments is none."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic, self.paused = traffic, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name().removeprefix("aten::").partition(".")[0]
        if self.paused or func.is_view or name in _NOTHING_MOVES:
            return result
        moved = moved_bytes(name, func, args, kwargs, result)
        self.traffic.launches += 1
        self.traffic.issued += moved
        self.traffic.distinct += moved
        self.traffic.names.append(name)
        return result


def moved_bytes(name: str, func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Each operand read once, each result written once; an operand that is written is not read, but by in-place arithmetic."""
    names = [argument.name for argument in func._schema.arguments]
    written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    given = dict(zip(names, args, strict=False)) | kwargs
    read = sum(_bytes(value) for argument, value in given.items() if argument not in written)
    if name in _PART_IS_READ:
        read += _bytes(result) - _bytes(args[0])
    if written and name.removesuffix("_") in ("add", "sub", "mul", "div", "addmm"):
        read += _bytes(given["self"]) if name != "addmm_" or given.get("beta", 1) else 0
    if name == "index_copy_":
        return read + _bytes(given["source"])  # the rows that are copied, not the whole it is copied into
    return read + _bytes(result)


def _bytes(value: Any) -> int:
    """Of the tensors in it; what is expanded lies in memory once."""
    return sum(_memory(x) for x in tree_leaves(value) if isinstance(x, Tensor))


def _memory(x: Tensor) -> int:
    places = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        places *= size if stride else min(size, 1)
    return places * x.element_size()


class _Launch:
    """Addresses that the programs of one launch touch."""

    def __init__(self) -> None:
        self._loaded: list[NDArray[np.uint64]] = []
        self._stored: list[NDArray[np.uint64]] = []
        self.issued = 0

    def add(self, pointers: NDArray[np.uint64], mask: NDArray[np.bool_], size: int, stored: bool) -> None:
        places = np.unique(pointers[np.broadcast_to(mask, pointers.shape)])
        self.issued += places.size * size
        # Numbered by element from here on, so that elements of different sizes do not weigh the same.
        (self._stored if stored else self._loaded).append(places * np.uint64(16) + np.uint64(size))

    @property
    def distinct(self) -> int:
        return sum(_distinct_bytes(places) for places in (self._loaded, self._stored))


def _distinct_bytes(places: Sequence[NDArray[np.uint64]]) -> int:
    return int((np.unique(np.concatenate(places)) % np.uint64(16)).sum()) if places else 0


@contextmanager
def _interpreter(traffic: Traffic, operands: _Operands) -> Iterator[None]:
    """Triton's interpreter with its loads, stores, atomics and launches counted."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launch = _Launch()

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        value = original["create_masked_load"](self, pointers, mask, *rest)
        launch.add(pointers.data, mask.data, value.data.itemsize, stored=False)
        return value

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launch.add(pointers.data, mask.data, value.data.itemsize, stored=True)
        return original["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.atomics += int(mask.data.sum())
        for stored in (False, True):
            launch.add(pointers.data, mask.data, value.data.itemsize, stored)
        return original["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def execute(self: Any, *arguments: Any, **keywords: Any) -> None:
        nonlocal launch
        launch, operands.paused = _Launch(), True
        try:
            run(self, *arguments, **keywords)
        finally:
            operands.paused = False
        traffic.launches += 1
        traffic.issued += launch.issued
        traffic.distinct += launch.distinct
        traffic.names.append(self.fn.__name__)

    counted = {"create_masked_load": load, "create_masked_store": store, "create_atomic_rmw": atomic}
    original, run = {name: getattr(builder, name) for name in counted}, executor.__call__
    try:
        for name, function in counted.items():
            setattr(builder, name, function)
        executor.__call__ = execute
        yield
    finally:
        for name, function in original.items():
            setattr(builder, name, function)
        executor.__call__ = run


def count(op: str) -> list[Counted]:
    """All cases of an op on a small batch of VQA. Only where TRITON_INTERPRET was 1 when triton was imported."""
    from bench.kernel_case import draw
    from bench.kernel_cases import cases
    from kernels import backends

    setting = replace(draw("vqa", SAMPLES), captions=8, words=3053, parameters=2**18)
    with backends.using("triton"), np.errstate(all="ignore"):
        found = []
        for case in cases(op, setting, torch.float16, torch.device("cpu")):
            forward, backward = _passes(case.ours.function, case.ours.leaves)
            work = case.work.get("both") or case.work["step"]
            found.append(Counted(op, case.shape, forward, backward, work.bytes, case.longest))
        return found


def _passes(function: Callable[..., Any], leaves: tuple[Tensor, ...]) -> tuple[Traffic, Traffic]:
    function(*leaves)  # what is made once and kept (row keys, a step on the device) is made here
    with counting() as forward:
        results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    results = tuple(result for result in results if result.requires_grad)
    if not results:
        return forward, Traffic()
    upstream = tuple(torch.ones_like(result) for result in results)
    with counting() as backward:
        torch.autograd.grad(results, leaves, upstream)
    return forward, backward


def count_all(ops: Sequence[str], jobs: int, on_progress: Callable[[str], None]) -> dict[str, list[Counted] | str]:
    """By op: its cases, or why they could not be counted. One interpreter process per op, `jobs` at a time."""

    def one(op: str) -> list[Counted] | str:
        environment = {name: value for name, value in os.environ.items() if name != "STOPGO_KERNELS"}
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "bench.traffic", op]
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        on_progress(op)
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        rows = json.loads(done.stdout.splitlines()[-1])
        return [
            Counted(**{**row, "forward": Traffic(**row["forward"]), "backward": Traffic(**row["backward"])})
            for row in rows
        ]

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(ops, pool.map(one, ops), strict=True))


if __name__ == "__main__":
    print(json.dumps([asdict(counted) for counted in count(sys.argv[1])]))
