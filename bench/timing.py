"""Clocks, and the conditions that a number is worth nothing without.

What is compared runs in turns within one process: whatever else the machine does falls on all of it. Every call is timed
by itself; medians and quantiles over the calls count, and the fastest call, which a busy machine disturbs least.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from kernels import native_library

_FLUSHED_BYTES = 256 * 2**20
"""More than the last cache of any GPU: written before each call, so that none finds its inputs there."""
_KEPT = 25


@dataclass(frozen=True)
class Spread:
    """Seconds of one call, over many of them."""

    median: float
    low: float
    """20 % quantile."""
    high: float
    """80 % quantile."""
    least: float
    calls: int
    kept: tuple[float, ...] = ()
    """Single calls, at most `_KEPT` and evenly spaced: the same turns of all that ran in turns."""
    recorded: bool = False
    """On a GPU: the call was recorded as a CUDA graph, so no launch of the host is in its time."""


class Timed(Protocol):
    """Something to time: called once for whatever must not count, it returns what does."""

    def __call__(self) -> Callable[[], object]: ...


Key = TypeVar("Key", bound=Hashable)


def interleaved(
    timed: Mapping[Key, Timed], device: torch.device, seconds: float, most_rounds: int = 1000
) -> dict[Key, Spread]:
    """Each of them in turn, until `seconds` have passed but at least three times, after one round for warming up.

    Calls on a CPU get the caches as the call before left them. On a GPU the caches are overwritten before every call, and a
    call is recorded once and replayed: a host launches for longer than most of them run.
    """
    recorded = {name: _recorded(prepare) for name, prepare in timed.items()} if device.type == "cuda" else {}
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    timed = {name: recorded.get(name) or prepare for name, prepare in timed.items()}
    for prepare in timed.values():
        clock(prepare)
    found: dict[Key, list[float]] = {name: [] for name in timed}
    started = time.perf_counter()
    for turn in range(most_rounds):
        if turn >= 3 and time.perf_counter() - started > seconds:
            break
        for name, prepare in timed.items():
            found[name].append(clock(prepare))
    return {name: replace(spread(times), recorded=bool(recorded.get(name))) for name, times in found.items()}


def spread(seconds: list[float]) -> Spread:
    """Quantiles between the values next to them."""
    low, median, high = torch.tensor(seconds, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    kept = seconds[:: -(-len(seconds) // _KEPT)]
    return Spread(float(median), float(low), float(high), min(seconds), len(seconds), tuple(kept))


def _cpu_seconds(prepare: Timed) -> float:
    call = prepare()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _recorded(prepare: Timed) -> Timed | None:
    """The call as a CUDA graph; None where it cannot be recorded, because it waits for the device, say."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):  # what compiles, takes handles and memory must have done so
                prepare()()
            call = prepare()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            results = call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None

    def replay(_kept: object = (call, results)) -> Callable[[], object]:
        return graph.replay

    return replay


def _cuda_seconds(prepare: Timed) -> float:
    """Between events, so that the time of launching counts only where the GPU waits for it."""
    call = prepare()
    _flushed().zero_()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1000


@cache
def _flushed() -> torch.Tensor:
    return torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")


def conditions(device: torch.device) -> dict[str, str]:
    """Hardware, clock, threads, versions, commit and time, as text; what cannot be read is empty."""
    described = commit()
    return {
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": described,
        "dirty": str(described.endswith("+")).lower(),
        "device": device_name(device),
        "clock": _clock(device),
        "isa": _isa(device),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "driver": _nvidia_smi("driver_version") if device.type == "cuda" else "",
    }


def _clock(device: torch.device) -> str:
    """Now: a CPU's mean, or a GPU's multiprocessors and memory."""
    if device.type == "cuda":
        return _nvidia_smi("clocks.sm,clocks.mem")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    rates = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return f"{sum(rates) / len(rates):.0f} MHz" if rates else ""


def _nvidia_smi(what: str) -> str:
    """Of the first GPU; empty where the driver's tool is missing."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def commit() -> str:
    """The checkout's short commit, with a + where files differ from it; empty outside of git."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def version(package: str) -> str:
    """An installed package's version, or "none"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _isa(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return native_library.isa() if native_library.available() else "none"
