"""CUDA graphs: forward, loss and backward of one head in one shape bucket, recorded once and then replayed as a whole.

A step of this model is some two thousand small launches; a replay is one. What changes between replays goes through memory
that stays where it is: the batch is copied into a static slab in one piece, dropout reads its step from the device (while
recording, `kernels.dropout` refuses a number), and gradients lie where the blocks' backward put them when it was recorded.
The optimizer stays outside.

The first batch of a bucket runs as usual, on a side stream, which also warms up what a recording must not do (compiling
kernels, creating handles, taking memory); the second one is recorded. Shapes that occur once cost no recording.

Run on one H100: replays equal eager steps to the bit. On a CPU the bookkeeping is tested with a recorder that repeats the work.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.model.randomness import Randomness
from pipelines.batch import Batch
from pipelines.buckets import bucket_of
from pipelines.errors import BadInput

LIMIT = 128
"""Graphs kept. Of the twelve tasks' steps with real lengths nine in ten fall into 100 buckets with batches of 16, into 140 with
the published ones (python -m bench.buckets)."""

Work = Callable[[Batch, Randomness], Tensor]
"""Forward, loss and backward: float32 [n] results, the loss and the mean score first; leaves gradients in the parameters."""


class Recorder(Protocol):
    """How work is run, and recorded to be run again."""

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """The work, done now."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(replay, result): each replay does the work on what its inputs hold by then, and writes the result anew.

        Nothing has been computed before the first replay.
        """


@dataclass
class Counters:
    """What became of the steps so far: each one was run as usual (`eager`) or replayed."""

    eager: int = 0
    captures: int = 0
    replays: int = 0
    dropped: int = 0
    """Graphs let go because there were more than the limit."""
    rows: int = 0
    """Text and region rows over pairs, padding included."""
    padded_rows: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"padded_row_share": self.padded_row_share}

    @property
    def padded_row_share(self) -> float:
        return self.padded_rows / self.rows if self.rows else 0.0

    def __str__(self) -> str:
        return (
            f"CUDA graphs: {self.replays} steps replayed, {self.captures} recorded, {self.eager} run as usual, "
            f"{self.dropped} graphs let go; {100 * self.padded_row_share:.1f} % of rows were padding"
        )


@dataclass(frozen=True)
class _Graph:
    replay: Callable[[], None]
    results: Tensor
    slab: Tensor
    """Where it reads its batch."""
    gradients: list[tuple[nn.Parameter, Tensor]]
    """Where it leaves them."""


class Graphs:
    """The recorded steps of one model. Not thread-safe; one step at a time."""

    def __init__(
        self, model: nn.Module, device: torch.device, recorder: Recorder | None = None, limit: int = LIMIT
    ) -> None:
        """BadInput for a device without graphs, unless a `recorder` is given."""
        if recorder is None:
            refuse_without_gpu(device)
            recorder = CudaRecorder(device)
        self.counters = Counters()
        self._recorder, self._limit = recorder, limit
        self._parameters = list(model.parameters())
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._slab = torch.empty(0, dtype=torch.uint8, device=device)
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: set[Hashable] = set()

    def run(self, key: Hashable, batch: Batch, random: Randomness, work: Work) -> Tensor:
        """What `work` gives, on the device; gradients are left in the parameters.

        `batch` is padded to a bucket (`pipelines.buckets.pad`) and still on the host. `key` stands for everything in `work`
        that is not in the batch's shapes: two works under one key must do the same.
        """
        if batch.slab is None or not batch.padding:
            raise ValueError(f"{batch.task}: no padded batch, so its shapes would hardly ever come again")
        self.counters.rows += batch.pair_text_rows + batch.pair_image_rows
        self.counters.padded_rows += batch.padding
        self._step.fill_(random.step)
        random = replace(random, step=self._step)
        where = (key, batch.task, batch.task_token, batch.features.dtype, bucket_of(batch))

        graph = self._graphs.get(where)
        slab = self._memory(batch.slab) if graph is None else graph.slab
        slab[: batch.slab.numel()].copy_(batch.slab, non_blocking=True)
        static = batch.in_slab(slab)
        if graph is None and where not in self._seen:
            self._seen.add(where)
            self.counters.eager += 1
            return self._recorder.run(lambda: work(static, random))
        if graph is None:
            graph = self._record(where, slab, lambda: work(static, random))
        self._graphs.move_to_end(where)
        graph.replay()
        self.counters.replays += 1
        for parameter, gradient in graph.gradients:
            parameter.grad = gradient
        return graph.results.clone()  # the next replay overwrites them

    def _memory(self, batch: Tensor) -> Tensor:
        """The static slab, grown where this batch does not fit. Graphs recorded before keep theirs."""
        if self._slab.numel() < batch.numel():
            self._slab = self._slab.new_empty(1 << (batch.numel() - 1).bit_length())
        return self._slab

    def _record(self, where: Hashable, slab: Tensor, work: Callable[[], Tensor]) -> _Graph:
        if any(parameter.grad is not None for parameter in self._parameters):
            raise RuntimeError("gradients are left from another step; a graph recorded now would add to them forever")
        if len(self._graphs) >= self._limit:
            dropped, _ = self._graphs.popitem(last=False)
            self._seen.discard(dropped)
            self.counters.dropped += 1
        replay, results = self._recorder.record(work)
        self.counters.captures += 1
        gradients = [(parameter, parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        self._graphs[where] = graph = _Graph(replay, results, slab, gradients)
        return graph


class CudaRecorder:
    """The real one. Graphs share one pool of memory: they run one after the other, never at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        main = torch.cuda.current_stream()
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            result = work()
        main.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may take page-locked memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


def refuse_without_gpu(device: torch.device) -> None:
    """BadInput for a device that has no graphs."""
    if device.type != "cuda":
        raise BadInput(
            "cuda_graphs", f"graphs are recorded on a GPU, and this run is on {device}", "cuda_graphs: false"
        )
