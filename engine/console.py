"""What a person sees while a run trains: a live table of its tasks, or plain lines where there is no terminal."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine.stopgo import Decision
from engine.tasks import TaskRow

PLAIN_WIDTH = 110
TABLE_WIDTH = 78
WINDOW = 20
"""Updates that the speed, and with it the time left, is measured over."""


@dataclass(frozen=True)
class TaskView:
    """What there is to show of one task; None where nothing has been measured yet."""

    state: Decision = Decision.GO
    loss: float | None = None
    """Mean training loss since the last update."""
    score: float | None = None
    """Last validation score, in [0, 1]."""
    best: float | None = None
    iterations_per_s: float | None = None
    """Steps of this task over the time of its own steps."""
    examples_per_s: float | None = None
    skipped: int = 0
    """Steps that the guard refused; the table shows them in red beside the state."""


@dataclass(frozen=True)
class ResultRow:
    """One task's line of the final table; scores in [0, 1]."""

    title: str
    group: str
    score: float
    best: float | None = None
    majority: float | None = None
    """Score of always giving the commonest answer."""
    blind: float | None = None
    """Score without image features."""


class _Lasting(RichConsole):
    """When nobody listens any more (the ssh of a launcher is gone, a pipe's reader ended) a run goes on, and is silent."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with open(os.devnull, "w") as nowhere, suppress(OSError):
            os.dup2(nowhere.fileno(), self.file.fileno())  # what is still buffered goes there at the end


class Console:
    """`start`, then `update` and `message` as often as wanted, then `finish`; `close` where the run ends early.

    Modes: `table` (live), `plain` (lines), `quiet` (nothing), `auto` (table on a terminal, else plain).
    """

    def __init__(
        self,
        mode: Literal["auto", "plain", "table", "quiet"] = "auto",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rich = _Lasting(
            file=stream, quiet=mode == "quiet", highlight=False, force_terminal=mode == "table" or None
        )
        if not self._rich.is_terminal:
            self._rich.width = PLAIN_WIDTH
        self._live_wanted = mode == "table" or (mode == "auto" and self._rich.is_terminal)
        self._live: Live | None = None
        self._clock = clock
        self._total = 0
        self._rows: tuple[TaskRow, ...] = ()
        self._shown: dict[str, TaskView] = {}
        self._times: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def start(self, total_iterations: int, rows: Sequence[TaskRow], iteration: int = 0) -> None:
        """Begin to show a run that has done `iteration` of `total_iterations` (more than 0 after a resume)."""
        self._total, self._rows = total_iterations, tuple(rows)
        self._shown = {row.name: TaskView() for row in rows}
        self._times.clear()
        self._times.append((iteration, self._clock()))
        if self._live_wanted:
            self._live = Live(self._screen(iteration), console=self._rich, auto_refresh=False)
            self._live.start(refresh=True)

    def update(self, iteration: int, views: Mapping[str, TaskView]) -> None:
        """Show the state after `iteration`; tasks that are not in `views` stay as they were."""
        before, self._shown = self._shown, {**self._shown, **views}
        self._times.append((iteration, self._clock()))
        if self._live:
            self._live.update(self._screen(iteration), refresh=True)
            return
        self._rich.print(self._summary(iteration))
        for row in self._rows:
            view = self._shown[row.name]
            if (view.score, view.state) != (before[row.name].score, before[row.name].state):
                text = f"  {row.name}: score {_percent(view.score)}, best {_percent(view.best)}"
                self._rich.print(Text(f"{text}, loss {_number(view.loss)}, {view.state}"))

    def message(self, text: str) -> None:
        """One line of news, above the live table where there is one."""
        self._rich.print(Text(text))

    def finish(self, results: Sequence[ResultRow]) -> None:
        """End the live table and print the result table."""
        self.close()
        if results:
            self._rich.print(_result_table(results))

    def close(self) -> None:
        """Leave the terminal as it was found. May be called twice."""
        if self._live:
            self._live.stop()
            self._live = None

    def _summary(self, iteration: int) -> Text:
        stopped = sum(view.state is Decision.STOP for view in self._shown.values())
        text = (
            f"iteration {iteration}/{self._total}  {_number(self._speed(), 2)} it/s  {self._time_left(iteration)} left"
        )
        return Text(f"{text}  {len(self._shown) - stopped} go, {stopped} stop  (scores in %)")

    def _speed(self) -> float | None:
        """Iterations per second over the last updates, validation included."""
        (first, began), (last, now) = self._times[0], self._times[-1]
        return (last - first) / (now - began) if last > first and now > began else None

    def _time_left(self, iteration: int) -> str:
        speed = self._speed()
        if speed is None:
            return "--:--"
        minutes, seconds = divmod(round((self._total - iteration) / speed), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

    def _screen(self, iteration: int) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("task", no_wrap=True)
        table.add_column("", style="dim", no_wrap=True)
        table.add_column("state", no_wrap=True, min_width=9)
        for name in ("loss", "score", "best", "it/s", "samples/s"):
            table.add_column(name, justify="right", no_wrap=True)
        group = self._rows[0].group if self._rows else ""
        for row in self._rows:
            if row.group != group:
                table.add_section()
                group = row.group
            table.add_row(row.title, row.group, *_cells(self._shown[row.name]))
        progress = Table.grid()
        progress.add_row(ProgressBar(total=self._total, completed=iteration, width=TABLE_WIDTH))
        return Group(table, progress, self._summary(iteration))


def _cells(view: TaskView) -> list[Text]:
    going = view.state is Decision.GO
    state = Text("● go" if going else "■ stop", style="green" if going else "yellow")
    if view.skipped:
        state.append(f" -{view.skipped}", style="red")
    at_best = view.score is not None and view.score == view.best
    numbers = [
        Text(_number(view.loss)),
        Text(_percent(view.score), style="bold" if at_best else ""),
        Text(_percent(view.best)),
        Text(_number(view.iterations_per_s, 2)),
        Text(_number(view.examples_per_s, 0)),
    ]
    if not going:
        for cell in numbers:
            cell.stylize("dim")
    return [state, *numbers]


def _result_table(results: Sequence[ResultRow]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="scores, %", title_justify="left", title_style="bold")
    table.caption_justify = "left"
    if any(row.blind is not None for row in results):
        table.caption = "majority: the best constant answer, or a random pick; image-blind: these weights, eyes closed"
    table.add_column("task", no_wrap=True)
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("score", justify="right", style="bold")
    optional = [
        name for name in ("best", "majority", "blind") if any(getattr(row, name) is not None for row in results)
    ]
    for name in optional:
        table.add_column({"blind": "image-blind"}.get(name, name), justify="right")
    group = results[0].group
    for row in results:
        if row.group != group:
            table.add_section()
            group = row.group
        table.add_row(row.title, row.group, _percent(row.score), *(_percent(getattr(row, name)) for name in optional))
    table.add_section()
    table.add_row("mean", "", _mean(results, "score"), *(_mean(results, name) for name in optional))
    return table


def _mean(results: Sequence[ResultRow], name: str) -> str:
    values = [getattr(row, name) for row in results]
    return _percent(None if None in values else sum(values) / len(values))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
