"""One case measured: every provider in turn, in every mode, and its distance to what the machine can do."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from types import FrameType

import torch
from torch import Tensor

from bench.kernel_case import Call, Case, bytes_of
from bench.kernel_peers import PACKAGES, missing
from bench.peak_memory import peak_bytes
from bench.timing import Spread, Timed, interleaved
from kernels import backends

MEMORY_OPS = ("masked_region_loss", "masked_lm_loss")
"""Ops whose peak memory is a point of its own."""


@dataclass(frozen=True)
class Row:
    """One (op, provider, mode, dtype, shape). Times in microseconds of one call."""

    op: str
    provider: str
    mode: str
    dtype: str
    task: str
    shape: str
    median_us: float
    p20_us: float
    p80_us: float
    least_us: float
    calls: int
    bytes: int
    """The least that must be moved."""
    flops: int
    """Of the products."""
    gb_per_s: float
    gflop_per_s: float
    bound: str
    """What limits: "bandwidth" or "GEMM"."""
    ceiling_us: float
    """The time that the limit allows: measured in this run."""
    share: float
    """ceiling / median."""
    peak_bytes: int | None
    """Memory held at most, beyond inputs; of the masked losses alone, in mode "both"."""
    gradient_bytes: int | None
    """How much of it are the gradients, which are asked for."""
    recorded: bool = False
    """See `bench.timing.Spread`."""
    samples_us: tuple[float, ...] = ()
    """Single calls, evenly spaced, at the same turns as the other providers' of this case."""


@dataclass(frozen=True)
class Skipped:
    """A provider that was not measured, and why."""

    op: str
    provider: str
    dtype: str
    reason: str


class Ceilings:
    """What the machine can do, measured when first asked for; the fastest calls count."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self._device, self._seconds = device, seconds
        self.bytes_per_s = cache(self._bytes_per_s)
        self.flops_per_s = cache(self._flops_per_s)

    def of(self, moved: int, flops: int, dtype: torch.dtype) -> tuple[str, float]:
        """(bound, seconds)."""
        size_class = 1 << max(moved - 1, 2**16).bit_length()
        limits = {"bandwidth": moved / self.bytes_per_s(size_class)}
        if flops:
            limits["GEMM"] = flops / self.flops_per_s(dtype)
        bound = max(limits, key=limits.__getitem__)
        return bound, limits[bound]

    def _bytes_per_s(self, moved: int) -> float:
        """The better of a copy and of an update in place, which reads and writes half of `moved` bytes. On a CPU the copy also
        reads what it is about to overwrite, as any kernel does that writes past its inputs."""
        source, target = self._buffers(moved // 8)
        ways = {"copy": partial(target.copy_, source), "update": partial(source.mul_, 1.0)}
        spreads = interleaved({name: partial(_itself, way) for name, way in ways.items()}, self._device, self._seconds)
        return moved / min(spread.least for spread in spreads.values())

    def _buffers(self, values: int) -> tuple[Tensor, Tensor]:
        """Two of this size, float32; the first is filled."""
        source = torch.ones(values, device=self._device)
        return source, torch.empty_like(source)

    def _flops_per_s(self, dtype: torch.dtype) -> float:
        """Of [2048, 1024] times [1024, 1024]: a projection of the image stream."""
        a, b = (torch.randn(rows, 1024, device=self._device, dtype=dtype) for rows in (2048, 1024))
        out = torch.empty_like(a)
        product = partial(_itself, partial(torch.mm, a, b, out=out))
        return 2 * 2048 * 1024 * 1024 / interleaved({"": product}, self._device, self._seconds)[""].least


def _itself(call: Callable[[], object]) -> Callable[[], object]:
    return call


def measure(
    case: Case, device: torch.device, seconds: float, ceilings: Ceilings, compile_seconds: float
) -> tuple[list[Row], list[Skipped]]:
    """All providers that can run here, for about `seconds` together; torch.compile where `compile_seconds` is not 0."""
    calls, skipped = _providers(case, device, compile_seconds)
    timed = {(name, mode): _timed(call, mode) for name, call in calls.items() for mode in case.work}
    spreads = interleaved(timed, device, seconds)
    rows = [_row(case, *key, spread, ceilings) for key, spread in spreads.items()]
    if case.op in MEMORY_OPS:
        rows = [_with_memory(row, calls[row.provider], device) if row.mode == "both" else row for row in rows]
    return rows, skipped


def own_provider(op: str, dtype: torch.dtype, device: torch.device) -> str:
    """The name of our implementation in use; "reference" where there is nothing but plain torch."""
    backend = backends.choose(op, torch.empty(0, dtype=dtype, device=device))
    return "reference" if backend == "torch" else backend


def _providers(case: Case, device: torch.device, compile_seconds: float) -> tuple[dict[str, Call], list[Skipped]]:
    calls = {own_provider(case.op, case.dtype, device): case.ours}
    skipped, mode = [], list(case.work)[-1]  # "both", or the optimizer's "step"
    for name, make in case.peers.items():
        reason = missing(name, device)
        if not reason and name in PACKAGES:
            reason = _failure(lambda make=make: _timed(make(), mode)()())  # type: ignore[misc]
        if reason:
            skipped.append(Skipped(case.op, name, _name(case.dtype), reason))
        else:
            calls[name] = make()
    if compile_seconds and calls["torch"].leaves:
        compiled = Call(torch.compile(calls["torch"].function, dynamic=False), calls["torch"].leaves)
        reason = _failure(lambda: _compile(compiled, compile_seconds))
        if reason:
            skipped.append(Skipped(case.op, "compile", _name(case.dtype), reason))
        else:
            calls["compile"] = compiled
    return calls, skipped


def _failure(call: Callable[[], object]) -> str:
    """Why other people's code does not run, in one line; empty if it does."""
    try:
        call()
    except _TooLong as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - whatever it raises is a finding of its own
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
    return ""


def _compile(compiled: Call, seconds: float) -> None:
    """Both passes."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes that outlives the run
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # or a backward could not run twice
    with _limited(seconds):
        _timed(compiled, "both")()()


class _TooLong(BaseException):
    """No Exception: the compiler must not take it for a failure of its own and go on."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises _TooLong in the main thread after so many seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong(f"did not finish within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _timed(call: Call, mode: str) -> Timed:
    """What to time: for a backward, the forward runs before the clock does."""
    forward = partial(call.function, *call.leaves)
    if mode in ("forward", "step"):
        return partial(_itself, forward)
    upstream = [_upstream(result) for result in _differentiable(forward())]
    again = any(leaf.is_cuda for leaf in call.leaves)  # a recorded backward reads what the forward kept at every replay

    def backward() -> Callable[[], object]:
        return partial(torch.autograd.grad, _differentiable(forward()), call.leaves, upstream, retain_graph=again)

    return backward if mode == "backward" else partial(_itself, lambda: backward()())


def _differentiable(results: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [x for x in (results if isinstance(results, tuple) else (results,)) if x.requires_grad]


def _upstream(result: Tensor) -> Tensor:
    """1 for a loss, normals for the rest: constants would make softmax gradients vanish."""
    return torch.ones_like(result) if result.dim() == 0 else torch.randn_like(result)


def _row(case: Case, provider: str, mode: str, spread: Spread, ceilings: Ceilings) -> Row:
    work = case.work[mode]
    bound, ceiling = ceilings.of(work.bytes, work.flops, case.dtype)
    times: Mapping[str, float] = {
        "median_us": spread.median, "p20_us": spread.low, "p80_us": spread.high, "least_us": spread.least,
        "ceiling_us": ceiling,
    }  # fmt: skip
    return Row(
        case.op, provider, mode, _name(case.dtype), case.task, case.shape, calls=spread.calls,
        bytes=work.bytes, flops=work.flops, gb_per_s=round(work.bytes / spread.median / 1e9, 2),
        gflop_per_s=round(work.flops / spread.median / 1e9, 2), bound=bound,
        share=round(ceiling / spread.median, 3), peak_bytes=None, gradient_bytes=None, recorded=spread.recorded,
        samples_us=tuple(round(1e6 * seconds, 2) for seconds in spread.kept),
        **{name: round(1e6 * seconds, 2) for name, seconds in times.items()},
    )  # fmt: skip


def _with_memory(row: Row, call: Call, device: torch.device) -> Row:
    return replace(row, peak_bytes=peak_bytes(_timed(call, "both")(), device), gradient_bytes=bytes_of(*call.leaves))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
