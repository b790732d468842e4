"""What a run leaves behind and shows: journal rows, the live table, the result table, the figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from engine import figures
from engine.assembly import Parts, Task
from engine.baselines import majority
from engine.console import Console, ResultRow, TaskView
from engine.cursor import Cursor, Window
from engine.journal import Journal
from engine.loop import Clock, Listener
from engine.ranks import Ranks
from engine.saving import Saved
from engine.stopgo import Decision
from engine.tasks import LOSS_PARTS
from engine.usage import Meter
from engine.validation import Validated
from pipelines.batch import Batch


class Reporter(Listener):
    """Writes `metrics.jsonl` and `events.jsonl`, and keeps the console's table up to date."""

    def __init__(self, parts: Parts, journal: Journal, console: Console, cursor: Cursor) -> None:
        self.parts, self.journal, self.console, self.cursor = parts, journal, console, cursor
        self.meter = Meter(parts.device)
        self.views = {name: TaskView(score=cursor.scores.get(name), best=cursor.best.get(name)) for name in parts.tasks}

    def window(self, iteration: int, task: str, window: Window, clock: Clock, lr: float, decision: Decision) -> None:
        """See `Listener`."""
        done = window.steps - window.skipped
        view = TaskView(
            state=decision,
            loss=window.loss / done if done else None,
            score=self.cursor.scores.get(task),
            best=self.cursor.best.get(task),
            iterations_per_s=window.steps / clock.step if clock.step else None,
            examples_per_s=window.examples / clock.step if clock.step else None,
            skipped=self.views[task].skipped + window.skipped,
        )
        self.views[task] = view
        self.journal.metrics(
            iteration,
            task=task,
            state=str(decision),
            loss=view.loss,
            score=window.score / done if done else None,
            loss_parts=self._parts(task, [part / done for part in window.parts]) if done else {},
            lr=lr,
            grad_norm=window.grad_norm / done if done else None,
            steps=self.cursor.consumed[task],
            skipped=window.skipped,
            examples_per_s=view.examples_per_s,
            iterations_per_s=view.iterations_per_s,
            step_ms=1000 * clock.step / window.steps,
            data_wait_ms=1000 * clock.wait / window.steps,
        )

    def validated(
        self, iteration: int, task: str, found: Validated, best: float, decision: Decision, turned: bool
    ) -> None:
        """See `Listener`."""
        self.views[task] = replace(self.views[task], state=decision, score=found.score, best=best)
        parts = self._parts(task, found.parts)
        self.journal.event(
            "validation", iteration, task=task, score=found.score, best=best, loss=found.loss, loss_parts=parts
        )
        if turned:
            self.journal.event("decision", iteration, task=task, state=str(decision))
            self.console.message(f"iteration {iteration}: {task} {'wakes up' if decision is Decision.GO else 'stops'}")

    def phase_ended(self, iteration: int, tasks: Sequence[str]) -> None:
        """See `Listener`."""
        self.journal.event("phase", iteration, tasks=list(tasks))
        self.console.message(f"iteration {iteration}: next phase of the curriculum, {len(tasks)} tasks")

    def iteration_done(self, cursor: Cursor) -> None:
        """See `Listener`."""
        every = self.parts.config.logging.every
        if cursor.iteration % every == 0 or cursor.iteration == self.parts.config.max_iterations:
            self.journal.event("usage", cursor.iteration, **self.meter.take())
            self.console.update(cursor.iteration, self.views)

    def saving(self) -> None:
        """See `Listener`. A resume counts on the rows up to its checkpoint."""
        self.journal.sync()

    def saved(self, saved: Saved) -> None:
        """See `Listener`."""
        if saved.error:
            self.journal.event("save_failed", saved.iteration, error=saved.error)
            self.console.message(
                f"checkpoint of iteration {saved.iteration} not saved: {saved.error}; those before it stay"
            )
            return
        self.journal.event("checkpoint", saved.iteration, path=str(saved.path), stalled_ms=1000 * saved.stalled_s)

    def not_finite(self, iteration: int, task: str, rank: int) -> None:
        """See `Listener`."""
        self.console.message(
            f"iteration {iteration}: the loss of {task} was not finite on rank {rank}; no rank stepped"
        )

    def finish(self, folder: Path, cursor: Cursor, found: Mapping[str, tuple[float, float]]) -> None:
        """The result table (last score, best, majority answer, the same weights with the image taken away), figures.

        `found`: what `final_scores` gave.
        """
        rows = []
        for name, task in self.parts.tasks.items():
            most = majority(task.train.data, whole_validation(self.parts, task))
            score, blind = found[name]
            best = cursor.best.get(name, score)
            self.journal.event(
                "result", cursor.iteration, task=name, score=score, best=best, majority=most, blind=blind
            )
            rows.append(ResultRow(task.row.title, task.row.group, score, best, most, blind))
        self.journal.event("end", cursor.iteration, reason="done")
        self.console.finish(rows)
        for figure in (figures.dsg_timeline(folder), figures.curves(folder), figures.scores(folder)):
            self.console.message(f"figure {figure}")
        self.console.message(f"all of it on one page, with pictures: stopgo report {folder}")

    def _parts(self, task: str, values: Sequence[float]) -> dict[str, float]:
        return dict(zip(LOSS_PARTS.get(self.parts.tasks[task].row.loss, ()), values, strict=True))


def final_scores(parts: Parts, cursor: Cursor) -> dict[str, tuple[float, float]]:
    """(score, score with the eyes closed: every region feature zeroed) of each task. Every rank must ask."""
    return {
        name: (
            cursor.scores[name] if name in cursor.scores else parts.validate(task).score,  # its turn never came
            parts.validate(task, blind=True).score,
        )
        for name, task in parts.tasks.items()
    }


def whole_validation(parts: Parts, task: Task) -> Iterator[Batch]:
    """The task's validation batches of all ranks."""
    return replace(parts, ranks=Ranks()).validation(task)
