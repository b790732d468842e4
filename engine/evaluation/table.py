"""Scores as a table on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from engine.evaluation.scores import TaskScores
from engine.tasks import TaskRow

PLAIN_WIDTH = 110


def show(scores: Mapping[str, TaskScores], rows: Mapping[str, TaskRow], split: str) -> None:
    """A line a task, shares in percent."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("task", "score", "what it is", "examples", "beside it"):
        right = title in ("score", "examples")
        table.add_column(title, justify="right" if right else "left", no_wrap=right or title == "task")
    for name, task in scores.items():
        metric, *others = task.metrics or ("no answers",)
        score = "" if task.score is None else f"{100 * task.score:.2f}"
        beside = ", ".join([*(told(other, task.metrics[other]) for other in others), *_groups(task)])
        title = rows[name].title if task.split == split else f"{rows[name].title} ({task.split})"
        table.add_row(title, score, metric.replace("_", " "), f"{task.n:,}", beside)
    known = [task.score for task in scores.values() if task.score is not None]
    if len(known) > 1:
        table.add_section()
        table.add_row("average", f"{100 * sum(known) / len(known):.2f}", f"of {len(known)} data sets")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print(f"{split} split, percent", table)


def told(metric: str, value: float) -> str:
    """A metric in words: ranks as they are, shares in percent."""
    shown = f"{value:.1f}" if metric.endswith("_rank") else f"{100 * value:.2f}"
    return f"{metric.replace('_', ' ')} {shown}"


def _groups(task: TaskScores) -> Iterator[str]:
    if len(task.groups) > 1:
        for name, group in task.groups.items():
            yield f"{name} {100 * group.score:.2f} ({group.n:,})"
