"""Traces of whole steps that Perfetto opens, and where memory is held."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from bench.profile_count import Holding
from bench.profile_ops import Op
from bench.profile_subject import Subject, Visit
from bench.profile_watch import watching
from pipelines.errors import BadInput
from pipelines.files import write_atomic

Function = Callable[..., Any]
_MEMORY_EVENTS = 1_000_000
"""That a snapshot keeps: some hundred steps."""


class _Recording:
    """A watcher that names ranges, ops and native kernels for torch's profiler, which sees torch's own ops by itself."""

    def range(self, name: str) -> AbstractContextManager[object]:
        """See `Watcher`."""
        return record_function(name)

    def op(self, op: Op, function: Function) -> Function:
        """See `Watcher`."""
        return _recorded(op.name, function)

    def kernel(self, name: str, function: Function) -> Function:
        """See `Watcher`."""
        return _recorded(f"stopgo_{name}", function)

    def collective(self, name: str, function: Function) -> Function:
        """See `Watcher`."""
        return _recorded(f"reduce: {name}", function)


def _recorded(name: str, function: Function) -> Function:
    def call(*arguments: Any, **keywords: Any) -> Any:
        with record_function(name):
            return function(*arguments, **keywords)

    return call


def trace(subject: Subject, iterations: int, folder: Path, rank: int = 0) -> Path:
    """`folder/rank{rank}_trace.json.gz`: so many iterations over all tasks, after one that does not count."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if subject.device.type == "cuda" else [])]
    path = folder / f"rank{rank}_trace.json.gz"
    unfinished = folder / f".rank{rank}_trace.{os.getpid()}.json.gz"  # the name's end says that it is to be compressed
    _make(folder)
    try:
        with watching(_Recording()):
            _iteration(subject, 0)
            with profile(activities=activities) as profiler:
                for number in range(1, iterations + 1):
                    with record_function(f"iteration {number}"):
                        _iteration(subject, number)
        profiler.export_chrome_trace(str(unfinished))
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _iteration(subject: Subject, number: int) -> None:
    visits = [Visit(row, subject.source.turn(number), "plain") for row in subject.rows]
    for place, visit in enumerate(visits):
        with record_function(visit.row.name):
            subject.step(visit, visits[place + 1 :])


def busy(subject: Subject, visit: Visit) -> float | None:
    """Seconds that the GPU's kernels run in one step; None on a CPU."""
    if subject.device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        subject.step(visit)
    return kernel_seconds(profiler.events() or [])


def kernel_seconds(events: Iterable[Any]) -> float:
    """Of the profiler's events, those that are the device's own; its ranges lie over them and do not count."""
    kernels = (one for one in events if one.device_type == DeviceType.CUDA and not one.is_user_annotation)
    return sum(one.time_range.elapsed_us() for one in kernels) / 1e6


def memory(subject: Subject, path: Path) -> str:
    """One step of every task: on a GPU the allocator's snapshot (pytorch.org/memory_viz opens it), elsewhere JSON of what was
    held when it was most, and where it was taken. Returns what was written, in words. The GPU's way was never run."""
    _make(path.parent)
    if subject.device.type == "cuda":
        return _snapshot(subject, path)
    found = {row.name: _held(subject, row_visit) for row, row_visit in _each(subject)}
    write_atomic(path, json.dumps(found, indent=1).encode() + b"\n")
    most = max(found, key=lambda name: found[name]["peak_bytes"])
    return f"{path}: at most {found[most]['peak_bytes'] / 2**20:,.1f} MiB beside weights and optimizer, in {most}"


def _held(subject: Subject, visit: Visit) -> dict[str, Any]:
    holding = Holding()
    with watching(holding), holding:
        subject.step(visit)
    return holding.as_json()


def _snapshot(subject: Subject, path: Path) -> str:
    torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS, stacks="python")
    try:
        for _, visit in _each(subject):
            subject.step(visit)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        torch.cuda.memory._dump_snapshot(str(unfinished))
        os.replace(unfinished, path)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    return f"{path}: open it at pytorch.org/memory_viz"


def _each(subject: Subject) -> Sequence[tuple[Any, Visit]]:
    return [(row, Visit(row, 0, "counted")) for row in subject.rows]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(folder, error.strerror or str(error), "give a folder that can be written") from None
