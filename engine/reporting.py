"""What a run leaves behind and shows: journal rows, the live table, the result table, the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine import figures
from engine.assembly import Parts
from engine.baselines import majority
from engine.console import Console, ResultRow, TaskView
from engine.cursor import Cursor, Window
from engine.journal import Journal
from engine.loop import Clock, Listener
from engine.stopgo import Decision
from engine.tasks import LOSS_PARTS
from engine.validation import Validated, validate


class Reporter(Listener):
    """Writes `metrics.jsonl` and `events.jsonl`, and keeps the console's table up to date."""

    def __init__(self, parts: Parts, journal: Journal, console: Console, cursor: Cursor) -> None:
        self.parts, self.journal, self.console, self.cursor = parts, journal, console, cursor
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
            self.console.update(cursor.iteration, self.views)

    def saving(self) -> None:
        """See `Listener`. A resume counts on the rows up to its checkpoint."""
        self.journal.sync()

    def saved(self, path: Path, iteration: int) -> None:
        """See `Listener`."""
        self.journal.event("checkpoint", iteration, path=str(path))

    def finish(self, folder: Path, cursor: Cursor) -> None:
        """The result table (last score, best, majority answer, the same weights with the image taken away), figures."""
        rows = []
        for name, task in self.parts.tasks.items():
            most = majority(task.train.data, self.parts.validation(task))
            blind = self._score(name, blind=True)
            score = cursor.scores[name] if name in cursor.scores else self._score(name)  # its turn never came
            best = cursor.best.get(name, score)
            self.journal.event(
                "result", cursor.iteration, task=name, score=score, best=best, majority=most, blind=blind
            )
            rows.append(ResultRow(task.row.title, task.row.group, score, best, most, blind))
        self.journal.event("end", cursor.iteration, reason="done")
        self.console.finish(rows)
        for figure in (figures.dsg_timeline(folder), figures.curves(folder), figures.scores(folder)):
            self.console.message(f"figure {figure}")

    def _score(self, name: str, blind: bool | None = None) -> float:
        """The trained model's score; `blind`: with its eyes closed, every region feature zeroed."""
        task = self.parts.tasks[name]
        batches = self.parts.validation(task, blind)
        found = validate(self.parts.model, batches, task.row.head, self.parts.device, self.parts.config.share_prefixes)
        return found.score

    def _parts(self, task: str, values: Sequence[float]) -> dict[str, float]:
        return dict(zip(LOSS_PARTS.get(self.parts.tasks[task].row.loss, ()), values, strict=True))
