"""Algorithm 1: round-robin over the tasks, dynamic stop-and-go, validation once per task epoch.

The loop owns a `Cursor` and nothing else that changes beside model and optimizer, so that a stop between any two task
steps continues to the bit. Losses stay on the device and are read once per log window.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from engine import checkpoint
from engine.assembly import Parts, Task
from engine.cursor import Cursor, Window
from engine.graphs import Graphs
from engine.model.randomness import Randomness
from engine.rotation import due_for_validation, next_phase, phases, plan
from engine.schedule import longest_task_iterations, multiplier, warmup_iterations
from engine.step import StepResult, train_step
from engine.stopgo import Decision, new_controller, restore
from engine.tasks import MAX_TASK_NUMBER
from engine.validation import Interrupted, Validated, validate
from pipelines.errors import BadInput
from pipelines.loader import Loader


class TooManySkipped(Exception):
    """Too many steps of a task in a row had a loss or gradient that is not finite. Found when a log window is read."""


@dataclass
class Clock:
    """Seconds of a task since the last log iteration: in its steps, and waiting for its batches. No part of a run's state.

    Taken on the host: on a GPU, whose work goes on behind, steps seem shorter than they are.
    """

    step: float = 0.0
    wait: float = 0.0


class Listener:
    """What the loop tells as it goes; `engine.reporting` writes journals and draws the table."""

    def window(self, iteration: int, task: str, window: Window, clock: Clock, lr: float, decision: Decision) -> None:
        """A task's steps since the last log iteration."""

    def validated(
        self, iteration: int, task: str, found: Validated, best: float, decision: Decision, turned: bool
    ) -> None:
        """A validation and the decision after it."""

    def phase_ended(self, iteration: int, tasks: Sequence[str]) -> None:
        """A phase of the curriculum was over with this iteration; `tasks` are those of the next."""

    def iteration_done(self, cursor: Cursor) -> None:
        """After each complete iteration."""

    def saving(self) -> None:
        """A checkpoint is about to be written."""

    def saved(self, path: Path, iteration: int) -> None:
        """A checkpoint is in place."""


class Loop:
    """One run. `run()` returns True when max_iterations are done, False when a stop was asked for (and saved)."""

    def __init__(
        self,
        parts: Parts,
        cursor: Cursor,
        checkpoints: Path,
        listener: Listener,
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.parts, self.config, self.cursor = parts, parts.config, cursor
        self.folder, self.listener, self.stop_asked = checkpoints, listener, stop_asked
        self.controllers = {
            name: restore(cursor.controllers[name])
            if name in cursor.controllers
            else new_controller(self.config.stopgo)
            for name in parts.tasks
        }
        rows = [task.row for task in parts.tasks.values()]
        self.phases = phases(rows, self.config.curriculum.kind, self.config.curriculum.groups)
        epochs = [task.epoch_iterations for task in parts.tasks.values()]
        longest = self.config.warmup.longest_task_iterations or longest_task_iterations(epochs)
        self.warmup = warmup_iterations(self.config.max_iterations, longest, self.config.warmup.fraction)
        self.graphs = Graphs(parts.model, parts.device) if self.config.cuda_graphs else None
        self._pending: list[tuple[str, int, StepResult]] = []
        self._clocks: defaultdict[str, Clock] = defaultdict(Clock)
        self._last_save = time.monotonic()
        self._saved_at: int | None = None if cursor.partial else cursor.iteration

    def run(self) -> bool:
        """Train from the cursor to max_iterations."""
        c = self.cursor
        with Loader(self.parts.training()) as loader:
            self.loader = loader
            while c.iteration < self.config.max_iterations or c.partial:
                if not c.partial:
                    self._begin_iteration()
                try:
                    if not self._finish_iteration():
                        self._save()
                        return False
                    self._end_iteration()
                except (TooManySkipped, BadInput):
                    self._save()  # what was learned before the bad steps, or the damaged record, is not lost
                    raise
        if self._saved_at != c.iteration:
            self._save()
        return True

    def decision(self, task: str) -> Decision:
        """Whether a task goes in every iteration."""
        return self.controllers[task].decision if self.config.stopgo.enabled else Decision.GO

    def _plan(self, iteration: int) -> tuple[str, ...]:
        decisions = {name: self.decision(name) for name in self.parts.tasks}
        return plan(iteration, self.phases[self.cursor.phase], decisions, self.config.stopgo.gap)

    def _begin_iteration(self) -> None:
        c = self.cursor
        c.iteration += 1
        c.remaining = list(self._plan(c.iteration))
        c.due = [
            name
            for name in self.phases[c.phase]
            if due_for_validation(
                c.iteration, self.parts.tasks[name].epoch_iterations, self.config.max_iterations,
                self.config.validation.on_last,
            )
        ]  # fmt: skip

    def _finish_iteration(self) -> bool:
        """Run what is left of the iteration; False if a stop was asked for, with the cursor saying what remains."""
        c = self.cursor
        while c.remaining:
            if self.stop_asked():
                return False
            self._step(c.remaining[0])
            c.remaining.pop(0)
        while c.due:
            try:
                self._validate(c.due[0])
            except Interrupted:
                return False
            c.due.pop(0)
        return True

    def _step(self, name: str) -> None:
        c, task = self.cursor, self.parts.tasks[name]
        step = c.consumed.get(name, 0)
        asked = time.perf_counter()
        batch = self.loader.take(name, step)
        self._prefetch()
        started = time.perf_counter()
        result = train_step(
            self.parts.model,
            self.parts.optimizer,
            batch if self.graphs else batch.to(self.parts.device),
            task.row.head,
            loss_scale=task.loss_scale,
            lr_multiplier=self._multiplier(),
            random=Randomness(self.config.seed, self._random_step(task), training=True),
            share=self.config.share_prefixes,
            graphs=self.graphs,
        )
        self._clocks[name].wait += started - asked
        self._clocks[name].step += time.perf_counter() - started
        self._pending.append((name, batch.examples, result))
        c.consumed[name] = step + 1

    def _prefetch(self) -> None:
        """Ask for the batches of the tasks that come next; past this iteration's end, by the decisions of now."""
        c = self.cursor
        following = [*c.remaining[1:], *self._plan(c.iteration + 1)]
        seen: dict[str, int] = {}
        for name in following[:4]:
            step = c.consumed.get(name, 0) + seen.get(name, 0) + (name == c.remaining[0])
            if not self.loader.request(name, step):
                break
            seen[name] = seen.get(name, 0) + 1

    def _random_step(self, task: Task) -> int:
        """The step coordinate of dropout: unique per iteration and task, whatever ran before."""
        return (self.cursor.iteration * MAX_TASK_NUMBER + task.row.number) & 0xFFFFFFFF

    def _multiplier(self) -> float:
        decay = self.config.decay
        return multiplier(
            self.cursor.iteration, self.warmup, self.config.max_iterations, decay.kind, decay.boundaries, decay.factor
        )

    def _validate(self, name: str) -> None:
        task, c = self.parts.tasks[name], self.cursor
        batches = self.parts.validation(task)
        found = validate(
            self.parts.model, batches, task.row.head, self.parts.device, self.config.share_prefixes, self.stop_asked
        )
        before = self.decision(name)
        self.controllers[name].update(found.score)
        c.controllers[name] = self.controllers[name].state_dict()
        c.scores[name] = found.score
        c.best[name] = max(found.score, c.best.get(name, found.score))
        after = self.decision(name)
        self.listener.validated(c.iteration, name, found, c.best[name], after, before is not after)

    def _end_iteration(self) -> None:
        c, config = self.cursor, self.config
        if config.curriculum.kind != "none":
            decisions = {name: self.decision(name) for name in self.parts.tasks}
            before = c.phase
            c.phase = next_phase(c.phase, c.iteration, self.phases, decisions, config.curriculum.iterations)
            if c.phase != before:
                self.listener.phase_ended(c.iteration, self.phases[c.phase])
        if c.iteration % config.logging.every == 0 or c.iteration == config.max_iterations:
            self._write_windows()
        self.listener.iteration_done(c)
        minutes = (time.monotonic() - self._last_save) / 60
        every = config.checkpoint.every
        if (every and c.iteration % every == 0) or (config.checkpoint.minutes and minutes >= config.checkpoint.minutes):
            self._save()

    def _write_windows(self) -> None:
        c = self.cursor
        self._read_results()
        for name in self.parts.tasks:
            if name in c.windows:
                lr = self.parts.optimizer.units["trunk"].lr * self._multiplier()
                clock = self._clocks[name]
                self.listener.window(c.iteration, name, c.windows[name], clock, lr, self.decision(name))
        c.windows.clear()
        self._clocks.clear()

    def _read_results(self) -> None:
        """The only place where the loop waits for the device: all results since the last time, in one transfer."""
        if not self._pending:
            return
        rows = [_as_row(result) for _, _, result in self._pending]
        values = iter(torch.cat(rows).tolist())
        for (name, examples, _), row in zip(self._pending, rows, strict=True):
            loss, score, grad_norm, skipped, *parts = islice(values, row.numel())
            window = self.cursor.windows.setdefault(name, Window())
            window.steps += 1
            window.skipped += int(skipped)
            in_row = self.cursor.skipped_in_row[name] = self.cursor.skipped_in_row.get(name, 0) + 1 if skipped else 0
            if in_row >= self.config.guard.max_skipped:
                self._pending.clear()
                raise TooManySkipped(
                    f"{in_row} steps of task {name} in a row were not finite, by iteration {self.cursor.iteration}; "
                    "they changed nothing: lower its learning rate, or look at its data"
                )
            if not skipped:
                window.examples += examples
                window.loss += loss
                window.score += score
                window.grad_norm += grad_norm
                window.parts = [a + b for a, b in zip(window.parts or [0.0] * len(parts), parts, strict=True)]
        self._pending.clear()

    def _save(self) -> None:
        self._read_results()
        self.cursor.controllers = {name: controller.state_dict() for name, controller in self.controllers.items()}
        self.listener.saving()
        path = checkpoint.save(
            self.folder, self.parts.model, self.parts.optimizer, self.cursor, self.config.checkpoint.keep
        )
        self._last_save = time.monotonic()
        self._saved_at = self.cursor.iteration if not self.cursor.partial else None
        self.listener.saved(path, self.cursor.iteration)


def _as_row(result: StepResult) -> Tensor:
    return torch.cat((torch.stack((result.loss, result.score, result.grad_norm, result.skipped)), result.parts))
