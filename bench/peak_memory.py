"""Bytes that torch's allocator holds at most during a call, beyond what it held before: the same on every run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Results count while they are held. What a C++ kernel keeps for itself (rows per thread) is not seen on the CPU."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it says on stderr that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiled:
        held = call()
        del held
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = _all(profiled.profiler.kineto_results.experimental_event_tree())
    sizes = [(event.start_time_ns, event.extra_fields.alloc_size) for event in events if _is_allocation(event)]
    return _peak(size for _, size in sorted(sizes, key=lambda item: item[0]))


def _peak(changes: Iterator[int]) -> int:
    now = most = 0
    for change in changes:
        now += change
        most = max(most, now)
    return most


def _all(events: list) -> Iterator:
    for event in events:
        yield event
        yield from _all(event.children)


def _is_allocation(event: object) -> bool:
    return bool(event.tag == torch._C._profiler._EventType.Allocation)  # type: ignore[attr-defined]
