"""Training batches through DALI: one pipeline for all tasks, which moves them to the device and makes features there.

What comes out is what the plain way gives, bit for bit (`pipelines.raw` says what is left to the device, and why it is the
same). Copying out of feature stores stays with `pipelines.copy_runs`: it is one native call, which DALI would not make faster.

    slab ───────────────────────────────────────────────────► slab     uint8
    bits, keep     rows of which pretraining hides some ─ × ─► features bfloat16 as UINT16, since DALI has no such type
    bytes, scales  rows of stores of bytes ────────────── × ─► features float32

Inputs that a batch does not need are empty. Global rows are put in by torch, behind the pipeline: DALI promises no order of a
sum, and a CPU and a GPU must have the same.

**The index.** The external source is a function of the pipeline's index: index i is the i-th batch that was asked for, a
(task, step), and the batch is a pure function of that. The order in which the loop asks is not known beforehand, as
stop-and-go may wake or stop a task between two iterations; hence a queue, one run of the pipeline per batch that is asked
for, and a depth of 1, so that DALI never asks for an index that nobody has asked for. Batches ahead of time are the loader's
part, as in the plain way, and its thread is where the pipeline runs.

**Resuming.** DALI's own checkpoint restores the index and nothing else; what an index stood for would have to be kept beside
it. The run's cursor has the steps that every task has consumed, which says it all. So a resumed run starts a new pipeline at
index 0 and asks for the batches that come next. That one batch was prefetched and not used, or asked for late, changes none.

**Memory.** With no_copy the pipeline reads the arena's memory in place, until its outputs are there; then it goes back. An
output that would show that memory itself is a copy made by DALI, so whoever keeps a batch keeps DALI's memory.

**A GPU has never run this.** There the pipeline's outputs are copied once more, on the device, into torch's own memory; tests
cover the CPU (`device_id=None`), where DALI only costs time (bench/LOG.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.batch import Batch
from pipelines.errors import BadInput
from pipelines.raw import RawBatch, Work, finished

RawSource = Callable[[int], RawBatch]
"""Gives the batch after `step` consumed ones. Pure: equal steps give equal batches."""
_UNSIGNED = {torch.bfloat16: np.uint16, torch.float32: np.uint32}
Array = NDArray[np.generic]


class Stage:
    """One DALI pipeline for the batches of many tasks. Threads may share it; they take turns."""

    def __init__(self, sources: Mapping[str, RawSource], dtype: torch.dtype, device: torch.device) -> None:
        """`dtype` of the features: float32 or bfloat16. BadInput where there is no DALI."""
        self._sources, self._device, self._bits = dict(sources), device, _UNSIGNED[dtype]
        self._lock = Lock()
        self._asked: dict[int, tuple[str, int]] = {}
        self._raw: RawBatch | None = None
        self._read: deque[tuple[torch.cuda.Event, Any]] = deque()
        self._index = 0
        self._pipeline = self._build()

    def sources(self) -> dict[str, Callable[[int], Batch]]:
        """For `Loader`: the batches of each task by step, on the device."""
        return {task: partial(self.batch, task) for task in self._sources}

    def batch(self, task: str, step: int) -> Batch:
        """The batch of `task` after `step` consumed ones, on the device. Raises BadInput for a damaged record."""
        with self._lock:
            self._asked = {self._index: (task, step)}  # no other index can be asked for
            self._pipeline.schedule_run()  # an error in making the batch comes out as it is, and leaves the index
            self._index += 1
            outputs = self._pipeline.share_outputs()  # the host waits: what was fed has been read
            raw, self._raw = self._raw, None
            assert raw is not None
            batch = self._finish(raw, outputs)
            self._pipeline.release_outputs()
            return batch

    def _inputs(self, index: int) -> list[list[Array]]:
        """What the pipeline asks for: five arrays, views of the batch's memory."""
        task, step = self._asked[index]
        self._raw = raw = self._sources[task](step)
        return [[array] for array in (raw.slab.numpy(), *self._work(raw.work))]

    def _work(self, work: Work | None) -> list[Array]:
        """bits, keep, bytes, scales: empty where there are none."""
        empty: list[Array] = [np.empty((0, 1), kind) for kind in (self._bits, self._bits, np.uint8, np.float32)]
        if work is None:
            return empty
        if work.in_bytes:
            return [*empty[:2], work.values.numpy(), work.factors.numpy()]
        return [work.values.numpy().view(self._bits), work.factors.numpy().view(self._bits), *empty[2:]]

    def _finish(self, raw: RawBatch, outputs: Any) -> Batch:
        slab, bits, floats = (torch.utils.dlpack.from_dlpack(output.as_tensor())[0] for output in outputs)
        features = None if raw.work is None else floats if raw.work.in_bytes else bits
        if self._device.type == "cpu":
            return finished(raw, slab, features)
        # torch knows what still reads its own memory; DALI's is held until it has been copied there
        batch = finished(raw, slab.clone(), None if features is None else features.clone())
        while self._read and self._read[0][0].query():
            self._read.popleft()
        self._read.append((torch.cuda.current_stream(self._device).record_event(), outputs))
        return batch

    def _build(self) -> Any:
        check_installed()
        # imported here: DALI is large, and not among the requirements
        from nvidia.dali import Pipeline, fn, types

        gpu = None
        if self._device.type != "cpu":
            gpu = torch.cuda.current_device() if self._device.index is None else self._device.index
        bits = types.UINT16 if self._bits is np.uint16 else types.UINT32
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=gpu, prefetch_queue_depth=1)
        with pipeline:
            inputs = fn.external_source(
                self._inputs, num_outputs=5, batch=True, no_copy=True, ndim=[1, 2, 2, 2, 2],
                dtype=[types.UINT8, bits, bits, types.UINT8, types.FLOAT],
            )  # fmt: skip
            slab, values, keep, stored, scales = inputs if gpu is None else [x.gpu() for x in inputs]
            pipeline.set_outputs(slab, values * keep, stored * scales)
        pipeline.build()
        return pipeline


def check_installed() -> None:
    """BadInput where DALI cannot be used."""
    try:
        import nvidia.dali  # noqa: F401
    except ModuleNotFoundError as error:
        raise BadInput("data_path", "dali asked for, but nvidia.dali is not installed", "make setup-dali") from error
    except (ImportError, OSError, RuntimeError) as error:  # a library of its own is missing
        reason = str(error).strip().partition("\n")[0]
        raise BadInput("data_path", f"dali asked for, but it cannot be used: {reason}", "make setup-dali") from error
