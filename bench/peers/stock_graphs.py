"""*stock* with its steps recorded: what stock torch makes of the recipe on a GPU, whose host cannot launch fast enough.

Padded shapes of a task never change, so one recording serves all its batches: forward with loss and backward in one CUDA graph,
the fused AdamW in another, batches copied to where the recording reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.batches import pad, padded_rows
from bench.memory import tensor_bytes
from bench.peers import stock
from bench.peers.losses import PaddedBatch
from bench.peers.recipe import Recipe, moved
from bench.provider import Rows, Setting, Step
from engine.tasks import TaskRow

_WARMING = 3


@dataclass(frozen=True)
class _Recording:
    """Of one task."""

    batch: PaddedBatch
    forward_backward: torch.cuda.CUDAGraph
    update: torch.cuda.CUDAGraph
    loss: Tensor


class Recorded(Recipe):
    """See `bench.provider.Provider`."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, "stock_graphs", stock.optimizer, autocast=True)
        for group in self.optimizer.param_groups:
            group["capturable"] = True
        self._recording: _Recording | None = None

    def prepare(self, row: TaskRow, turn: int) -> Rows:
        """See `Provider`."""
        samples = self.setting.samples(row, turn)
        batch = pad(samples)
        on_device = moved(batch, self.setting.device)
        if self._recording is None or row.name != self._task:
            self._recording = None
            self._task, self._batch = row.name, on_device
            self._recording = self._record(on_device)
        for static, value in zip(_tensors(self._recording.batch), _tensors(on_device), strict=True):
            static.copy_(value)
        return Rows(padded_rows(batch), samples.real_rows)

    def step(self) -> Step:
        """See `Provider`."""
        recording = self._recording
        assert recording is not None
        self._clock.start()
        recording.forward_backward.replay()
        self._clock.half(lambda: tensor_bytes(p.grad for p in self.model.parameters() if p.grad is not None))
        recording.update.replay()
        return self._clock.stop(recording.loss)

    def rest(self) -> int:
        """See `Provider`."""
        self._recording = None
        self.optimizer.zero_grad()
        return super().rest()

    def _record(self, batch: PaddedBatch) -> _Recording:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMING):
                self._forward_backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
        torch.cuda.synchronize()
        forward_backward, update = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward_backward, stream=stream):
            loss = self._forward_backward()
        with torch.cuda.graph(update, stream=stream, pool=forward_backward.pool()):
            self.optimizer.step()
        return _Recording(batch, forward_backward, update, loss)

    def _forward_backward(self) -> Tensor:
        loss = self._loss()
        (loss * self._loss_scale[self._task]).backward()
        return loss.detach()


def _tensors(batch: PaddedBatch) -> Iterator[Tensor]:
    yield from (value for value in batch.inputs._asdict().values() if isinstance(value, Tensor))
    yield batch.target
    if batch.choice_index is not None:
        yield batch.choice_index


build: Callable[[Setting], Recorded] = Recorded
