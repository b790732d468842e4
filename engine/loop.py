"""Algorithm 1: round-robin over the tasks, dynamic stop-and-go, validation once per task epoch.

The loop owns a `Cursor` and nothing else that changes beside model and optimizer, so that a stop between any two task
steps continues to the bit. Losses stay on the device and are read once per log window. On several ranks each runs this loop;
what they do is a function of seed, iteration and scores, and that it is the same is checked at every step.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.agreement import Agreement, Said
from engine.assembly import Parts, Task
from engine.cursor import PLANNED, Cursor, Window
from engine.model.randomness import Randomness
from engine.ranges import span
from engine.rotation import due_for_validation, next_phase, phases, plan
from engine.saving import Saved, Saver, wait
from engine.schedule import longest_task_iterations, multiplier, warmup_iterations
from engine.step import StepResult
from engine.stopgo import Decision, new_controller, restore
from engine.tasks import MAX_TASK_NUMBER
from engine.validation import Interrupted, Validated
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

    def saved(self, saved: Saved) -> None:
        """A checkpoint is in place, or could not be saved."""

    def not_finite(self, iteration: int, task: str, rank: int) -> None:
        """In this step, some boundaries ago, a rank's loss was not finite."""


class Loop:
    """One run. `run()` returns True when max_iterations are done, False when a stop was asked for (and saved)."""

    def __init__(
        self,
        parts: Parts,
        cursor: Cursor,
        checkpoints: Path,
        listener: Listener,
        stop_asked: Callable[[], bool] = lambda: False,
        moved: Callable[[str], None] = lambda where: None,
    ) -> None:
        """`moved` is told at every boundary where the run is: what a watchdog watches."""
        self.parts, self.config, self.cursor = parts, parts.config, cursor
        self.listener, self.stop_asked, self.moved = listener, stop_asked, moved
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
        self.saver = Saver(
            checkpoints,
            parts.model,
            parts.stepper,
            parts.ranks,
            self.config.checkpoint.keep,
            self.config.checkpoint.best,
        )
        self.agreement = Agreement(parts.ranks)
        self._agreed = Said()
        self._health: Tensor | None = None
        self._last_step: tuple[int, str] | None = None
        self._about: tuple[int, str] | None = None
        self._bad_rank: dict[str, int] = {}
        self._new_best = False
        self._pending: list[tuple[str, int, StepResult]] = []
        self._clocks: defaultdict[str, Clock] = defaultdict(Clock)
        self._last_save = time.monotonic()
        self._saved_at: int | None = None if cursor.partial else cursor.iteration

    def run(self) -> bool:
        """Train from the cursor to max_iterations."""
        c = self.cursor
        try:
            with Loader(self.parts.training()) as loader:
                self.loader = loader
                while c.iteration < self.config.max_iterations or c.partial:
                    if not c.partial:
                        self._begin_iteration()
                    with span(f"iteration {c.iteration}"):
                        done = self._finish_iteration()
                    if not done:
                        self._save(wait_for_it=True)
                        return False
                    self._end_iteration()
            if self._saved_at != c.iteration:
                self._save(wait_for_it=True)
            else:
                self._wait_for_save()
            return True
        except (TooManySkipped, BadInput) as error:
            if isinstance(error, TooManySkipped) or self.parts.ranks.world_size == 1:
                self._save(
                    wait_for_it=True
                )  # what was learned before the bad steps, or the damaged record, is not lost
            raise
        finally:
            self.agreement.close()
            self.saver.close()

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
            if self._told_to_stop(c.remaining[0]):
                return False
            with span(c.remaining[0]):
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
        micro = task.row.accumulation
        with span("data"):
            batches = [self.loader.take(name, step * micro + number) for number in range(micro)]
        self._prefetch()
        started = time.perf_counter()
        result = self.parts.stepper.step(
            batches,
            task.row.head,
            loss_scale=task.loss_scale,
            lr_multiplier=self._multiplier(),
            random=Randomness(self.config.seed, self._random_step(task), training=True),
        )
        self._clocks[name].wait += started - asked
        self._clocks[name].step += time.perf_counter() - started
        self._pending.append((name, batches[0].step_examples, result))
        self._health, self._last_step = _on_host(result.loss), (c.iteration, name)
        c.consumed[name] = step + 1

    def _told_to_stop(self, what: str) -> bool:
        """The boundary before `what`: say how this rank is, learn how all were at the boundary before, and act on that."""
        c, ranks = self.cursor, self.parts.ranks
        self.moved(f"iteration {c.iteration}, task {what}")
        said = self._agreed = self._exchange(stop=self.stop_asked(), save=self._save_is_due(), plan=c.plan_hash())
        if not said.same_plan:
            raise PlansDiffer(_differences(ranks.gathered(c.to_json())))
        self._take_save(self.saver.poll(said))
        return said.stop

    def _exchange(self, **says: Any) -> Said:
        """Say this, and how the last step went; learn what all said in the exchange before, which was about an older step."""
        ranks = self.parts.ranks
        about, self._about, self._last_step = self._about, self._last_step, None
        bad, self._health = _is_bad(self._health), None
        said = self.agreement.exchange(self.saver.says(not_finite=ranks.rank if bad else -1, **says))
        if said.not_finite >= 0 and ranks.world_size > 1 and about is not None:
            self.listener.not_finite(*about, said.not_finite)
            self._bad_rank[about[1]] = said.not_finite
        return said

    def _prefetch(self) -> None:
        """Ask for the batches of the tasks that come next; past this iteration's end, by the decisions of now."""
        c = self.cursor
        following = [*c.remaining[1:], *self._plan(c.iteration + 1)]
        seen: dict[str, int] = {}
        for name in following[:4]:
            step = c.consumed.get(name, 0) + seen.get(name, 0) + (name == c.remaining[0])
            micro = self.parts.tasks[name].row.accumulation
            if not all(self.loader.request(name, step * micro + number) for number in range(micro)):
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
        found = self.parts.validate(task, stop_asked=lambda: self._told_to_stop(f"{name} (validation)"))
        before = self.decision(name)
        self.controllers[name].update(found.score)
        c.controllers[name] = self.controllers[name].state_dict()
        c.scores[name] = found.score
        self._new_best |= name not in c.best or found.score > c.best[name]
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
        every = config.checkpoint.every
        due = (every and c.iteration % every == 0) or (self._new_best and config.checkpoint.best)
        if due or self._agreed.save:
            self._save()
            if config.checkpoint.wait:
                self._wait_for_save()
        self._new_best = False

    def _write_windows(self) -> None:
        c = self.cursor
        self._read_results()
        for name in self.parts.tasks:
            if name in c.windows:
                lr = self.parts.stepper.base_lr * self._multiplier()
                clock = self._clocks[name]
                self.listener.window(c.iteration, name, c.windows[name], clock, lr, self.decision(name))
        c.windows.clear()
        self._clocks.clear()

    def _read_results(self) -> None:
        """The only place where the loop waits for the device: all results since the last time, in one transfer."""
        if not self._pending:
            return
        rows = [_as_row(result) for _, _, result in self._pending]
        values = iter(self._over_ranks(torch.cat(rows).cpu(), [row.numel() for row in rows]).tolist())
        for (name, examples, _), row in zip(self._pending, rows, strict=True):
            loss, score, grad_norm, skipped, *parts = islice(values, row.numel())
            window = self.cursor.windows.setdefault(name, Window())
            window.steps += 1
            window.skipped += int(skipped)
            in_row = self.cursor.skipped_in_row[name] = self.cursor.skipped_in_row.get(name, 0) + 1 if skipped else 0
            if in_row >= self.config.guard.max_skipped:
                self._pending.clear()
                whose = f" (a loss of rank {self._bad_rank[name]})" if name in self._bad_rank else ""
                raise TooManySkipped(
                    f"{in_row} steps of task {name} in a row were not finite{whose}, by iteration {self.cursor.iteration}; "
                    "they changed nothing: lower its learning rate, or look at its data"
                )
            if not skipped:
                window.examples += examples
                window.loss += loss
                window.score += score
                window.grad_norm += grad_norm
                window.parts = [a + b for a, b in zip(window.parts or [0.0] * len(parts), parts, strict=True)]
        self._pending.clear()

    def _over_ranks(self, values: Tensor, lengths: list[int]) -> Tensor:
        """Loss, score and parts summed over ranks; grad_norm and skipped, which are common, as they are."""
        if self.parts.ranks.world_size == 1:
            return values
        common = torch.cat([torch.tensor([False, False, True, True, *[False] * (n - 4)]) for n in lengths])
        return torch.where(common, values, self.parts.ranks.sum(torch.where(common, 0, values)))

    def _save_is_due(self) -> bool:
        minutes = self.config.checkpoint.minutes
        return minutes is not None and (time.monotonic() - self._last_save) / 60 >= minutes

    def _save(self, wait_for_it: bool = False) -> None:
        """Begin to save this moment; the one before is in place first."""
        self._wait_for_save()
        self._read_results()
        self.cursor.controllers = {name: controller.state_dict() for name, controller in self.controllers.items()}
        self.listener.saving()
        self.saver.start(self.cursor)
        self._last_save = time.monotonic()
        self._saved_at = self.cursor.iteration if not self.cursor.partial else None
        if wait_for_it:
            self._wait_for_save(must=True)

    def _wait_for_save(self, must: bool = False) -> None:
        def agreed() -> Said:
            self.moved(f"iteration {self.cursor.iteration}, saving")
            return self._exchange()

        self._take_save(wait(self.saver, agreed), must)

    def _take_save(self, saved: Saved | None, must: bool = False) -> None:
        if saved is None:
            return
        if saved.error and must:
            raise OSError(f"the checkpoint could not be saved: {saved.error}")
        self.listener.saved(saved)


class PlansDiffer(Exception):
    """The ranks were about to do different things."""


def _differences(cursors: list[str]) -> str:
    """What differs between the ranks' cursors, in words."""
    first, *others = (json.loads(text) for text in cursors)
    told = [
        f"rank {rank} has {key} {json.dumps(other[key])}, rank 0 {json.dumps(first[key])}"
        for rank, other in enumerate(others, 1)
        for key in PLANNED
        if other[key] != first[key]
    ]
    return "the ranks plan different things: " + ("; ".join(told) or "they differed one step ago")


def _on_host(loss: Tensor) -> Tensor:
    """A host copy that will be there by the next boundary; nobody waits for it."""
    if not loss.is_cuda:
        return loss.detach()
    copy = torch.empty((), dtype=loss.dtype, pin_memory=True)
    return copy.copy_(loss.detach(), non_blocking=True)


def _is_bad(health: Tensor | None) -> bool:
    """Whether the last loss is known not to be finite. Host memory, so no device is asked."""
    return health is not None and not math.isfinite(float(health.numpy()))


def _as_row(result: StepResult) -> Tensor:
    return torch.cat((torch.stack((result.loss, result.score, result.grad_norm, result.skipped)), result.parts))
