"""*ours*: the engine's own step, model and optimizer as a run has them, on packed rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor

from bench.batches import pack, packed_rows
from bench.counters import counting
from bench.gemms import GemmRecorder, GemmTimes, Replay
from bench.memory import Spare, minor_faults, release, tensor_bytes
from bench.provider import LR_MULTIPLIER, Rows, Setting, Step, StepClock
from engine import assembly
from engine.config import records_steps
from engine.graphs import Graphs
from engine.model.published import PUBLISHED_HEADS
from engine.model.randomness import Randomness
from engine.model.vilbert import ViLBERT
from engine.optimizer import Optimizer
from engine.step import StepResult, train_step
from engine.tasks import TaskRow, load_table, loss_scale
from kernels import backends
from pipelines import buckets
from pipelines.arena import Arena
from pipelines.batch import Batch
from pipelines.slab import in_one_slab

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Ours:
    """`engine.step.train_step` on synthetic batches."""

    def __init__(self, setting: Setting) -> None:
        run = setting.run
        self.setting = setting
        rows = load_table().default_tasks()
        self._loss_scale = loss_scale(rows)
        # The run's own builders, or this would measure a copy of them.
        assembly.use_kernels(run, setting.device, lambda line: None)
        model = ViLBERT(run.model, PUBLISHED_HEADS)
        model.initialise(run.seed)
        self.model = model.to(setting.device)
        self.optimizer = assembly.build_optimizer(run, rows, self.model)
        # As the loop has them: batches in shape buckets, and graphs that copy them to the device.
        self._arena = Arena(pin=setting.device.type == "cuda")
        recorded = records_steps(run, setting.device.type)
        self._grid = buckets.Grid.fitting(run.model.max_position_embeddings) if recorded else None
        self._graphs = Graphs(self.model, setting.device) if recorded else None
        self._moments = Spare(value for key, value in self.optimizer.state_dict().items() if "/exp_avg" in key)
        self._clock = StepClock(setting.device)
        self._steps = 0
        self._batch: Batch | None = None
        self._row: TaskRow | None = None

    def prepare(self, row: TaskRow, turn: int) -> Rows:
        """See `Provider`."""
        self._moments.restore()
        samples = self.setting.samples(row, turn)
        batch = pack(samples, _DTYPES[self.setting.run.precision])
        if self._grid is not None:
            batch = in_one_slab(buckets.pad(batch, self._grid), self._arena.take)
        self._row, self._batch = row, batch if self._graphs else batch.to(self.setting.device)
        return Rows(packed_rows(batch), samples.real_rows)

    def step(self) -> Step:
        """See `Provider`."""
        self._clock.start()
        result = self._train(_AtHalf(self.optimizer, lambda: self._clock.half(self._gradient_bytes)))
        return self._clock.stop(result.loss)

    def count(self) -> dict[str, Any]:
        """What one step does, in counts; page faults of a step that nothing else slows down."""
        faults = minor_faults()
        self._train(self.optimizer)
        faults = minor_faults() - faults
        with counting() as counts:
            self._train(self.optimizer, eager=True)
        return {**counts.as_json(), "minor_faults": faults}

    def gemms(self, rounds: int) -> GemmTimes:
        """Record the products of one forward and backward, then run both in turns."""
        recorder = GemmRecorder()
        with ExitStack() as stack:
            stack.enter_context(recorder)
            self._train(_AtHalf(self.optimizer, stack.close), eager=True)
        replay = Replay(recorder.gemms)
        replay.seconds()  # once for warming up
        replay_s, forward_backward_s = [], []
        for _ in range(rounds):
            forward_backward_s.append(self.step().forward_backward_s)
            replay_s.append(replay.seconds())
        return GemmTimes(replay_s, forward_backward_s, len(recorder.gemms), sum(gemm.flops for gemm in recorder.gemms))

    def rest(self) -> int:
        """See `Provider`."""
        self._batch = None
        self._moments.drop()
        release()
        return self._clock.memory.held()

    def state(self) -> dict[str, int]:
        """See `Provider`."""
        parameters = {parameter.data_ptr() for parameter in self.model.parameters()}
        masters = [value for value in self.optimizer.masters().values() if value.data_ptr() not in parameters]
        return {
            "weights": tensor_bytes(self.model.parameters()),
            "optimizer": tensor_bytes([*self.optimizer.state_dict().values(), *masters]),
        }

    def describe(self) -> dict[str, Any]:
        """See `Provider`."""
        kernels = {choice.op: f"{choice.backend} ({choice.reason})" for choice in backends.report(self.setting.device)}
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "precision": self.setting.run.precision,
            "optimizer": "published AdamW on flat parameters, trunk and the head that ran",
            "layout": "packed",
            "kernels": kernels,
        }

    def _train(self, optimizer: Optimizer | _AtHalf, eager: bool = False) -> StepResult:
        """`eager`: without graphs, so that whoever looks on sees every op."""
        assert self._batch is not None and self._row is not None
        run, graphs = self.setting.run, None if eager else self._graphs
        batch = self._batch.to(self.setting.device) if eager else self._batch
        self._steps += 1
        return train_step(
            self.model, cast(Optimizer, optimizer), batch, self._row.head,
            loss_scale=self._loss_scale[self._row.name], lr_multiplier=LR_MULTIPLIER,
            random=Randomness(run.seed, self._steps, training=True), share=run.share_prefixes, graphs=graphs,
        )  # fmt: skip

    def _gradient_bytes(self) -> int:
        return tensor_bytes(p.grad for p in self.model.parameters() if p.grad is not None)


class _AtHalf:
    """The optimizer, which first says that forward and backward are over: the step itself is the engine's, untouched."""

    def __init__(self, optimizer: Optimizer, half: Callable[[], None]) -> None:
        self._optimizer, self._half = optimizer, half

    def step(self, head: str, lr_multiplier: float, loss: Tensor) -> tuple[Tensor, Tensor]:
        """As the optimizer's."""
        self._half()
        return self._optimizer.step(head, lr_multiplier, loss)
