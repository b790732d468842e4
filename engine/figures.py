"""Pictures of one run, drawn from its `metrics.jsonl` and `events.jsonl` alone. Each returns the PNG that it wrote."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from engine.journal import EVENTS_FILE, METRICS_FILE, read_rows
from pipelines.errors import BadInput

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#8E4A9E", "#B8860B", "#56B4E9")
"""One colour per group, told apart by colour-blind readers too."""
GREY, INK = "#9a9a9a", "#222222"
_UNTIMED: dict[str, dict[str, None]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
STYLE: dict[str, Any] = {"fontsize": 9, "color": INK}


@dataclass
class TaskHistory:
    """What the journal says of one task."""

    name: str
    title: str
    group: str
    colour: str
    validations: list[tuple[int, float]] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    changes: list[tuple[int, str]] = field(default_factory=list)
    result: dict[str, Any] | None = None

    def bands(self, last: int) -> list[tuple[int, int, str]]:
        """(from, to, state) over iterations 0..last."""
        edges = [(0, "go"), *self.changes, (last, "")]
        return [(start, end, state) for (start, state), (end, _) in pairwise(edges) if end > start]


@dataclass
class RunHistory:
    name: str
    tasks: list[TaskHistory]
    last: int


def dsg_timeline(folder: Path, path: Path | None = None) -> Path:
    """Paper Fig. 2, left: one row per task over iterations, thick in go, thin in stop, a tick at each validation.

    `path`: a .png or .svg to write to, instead of `dsg.png` of the run folder.
    """
    run = read_history(folder)
    figure = Figure(figsize=(9, 0.8 + 0.32 * len(run.tasks)), layout="constrained")
    axes = figure.subplots()
    for row, task in enumerate(run.tasks):
        for start, end, state in task.bands(run.last):
            thick = state == "go"
            axes.plot(
                [start, end], [row, row], color=task.colour, lw=9 if thick else 1.4, solid_capstyle="butt", zorder=2
            )
        ticks = [iteration for iteration, _ in task.validations]
        axes.plot(ticks, [row + 0.33] * len(ticks), "|", color=INK, ms=3.5, mew=0.7, alpha=0.6, zorder=3)
    axes.set_yticks(range(len(run.tasks)), [task.title for task in run.tasks], **STYLE)
    for label, task in zip(axes.get_yticklabels(), run.tasks, strict=True):
        label.set_color(task.colour)
    axes.set_ylim(len(run.tasks) - 0.4, -0.6)
    axes.set_xlim(0, run.last)
    axes.tick_params(length=0, labelsize=9)
    plain(axes, ("bottom",))
    axes.grid(axis="x", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("iteration", **STYLE)
    legend = [
        Line2D([], [], color=GREY, lw=8, solid_capstyle="butt", label="go: every iteration"),
        Line2D([], [], color=GREY, lw=1.4, label="stop: sparse updates"),
        Line2D([], [], color=INK, marker="|", ls="", ms=5, alpha=0.6, label="validation"),
    ]
    figure.legend(handles=legend, loc="outside upper right", ncols=3, frameon=False, fontsize=8.5)
    figure.suptitle(f"Dynamic stop-and-go: {run.name}", x=0.01, ha="left", fontsize=11, color=INK)
    return save(figure, path or folder / "dsg.png")


def curves(folder: Path) -> Path:
    """Small multiples: each task's validation score with its best, its training loss behind, stops shaded."""
    run = read_history(folder)
    columns = min(4, len(run.tasks))
    rows = -(-len(run.tasks) // columns)
    figure = Figure(figsize=(0.4 + 3.1 * columns, 0.6 + 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, task in zip(panels, run.tasks, strict=False):
        _curve(axes, task, run.last)
    for axes in panels[len(run.tasks) :]:
        axes.set_visible(False)
    legend = [
        Line2D([], [], color=INK, marker="o", ms=3, lw=1.5, label="validation score, % (left)"),
        Line2D([], [], color=INK, lw=0.9, ls=":", label="best"),
        Line2D([], [], color=GREY, lw=1.1, label="training loss (right)"),
        Line2D([], [], color="#efefef", lw=8, label="stop"),
    ]
    figure.legend(handles=legend, loc="outside upper right", ncols=4, frameon=False, fontsize=8.5)
    figure.suptitle(f"Learning curves: {run.name}", x=0.01, ha="left", fontsize=11, color=INK)
    return save(figure, folder / "curves.png")


def scores(folder: Path) -> Path:
    """Final score of each task beside the majority answer and the image-blind baseline, where they were measured.

    Raises BadInput where the run has not come to its results.
    """
    run = read_history(folder)
    done = [task for task in run.tasks if task.result]
    if not done:
        raise BadInput(folder / EVENTS_FILE, "no results yet", "let the run finish")
    figure = Figure(figsize=(8, 1.0 + 0.34 * len(done)), layout="constrained")
    axes = figure.subplots()
    for row, task in enumerate(done):
        assert task.result is not None
        score, majority, blind = task.result["score"], task.result.get("majority"), task.result.get("blind")
        axes.barh(row, 100 * score, height=0.62, color=task.colour, alpha=0.85, zorder=2)
        marks = [100 * value for value in (score, majority, blind) if value is not None]
        axes.text(max(marks) + 1.2, row, f"{100 * score:.1f}", va="center", **STYLE)
        if majority is not None:
            axes.plot([100 * majority] * 2, [row - 0.4, row + 0.4], color=INK, lw=2, zorder=3)
        if blind is not None:
            axes.plot(100 * blind, row, "o", ms=6.5, mfc="white", mec=INK, mew=1.3, zorder=4)
    axes.set_yticks(range(len(done)), [task.title for task in done], **STYLE)
    axes.set_ylim(len(done) - 0.4, -0.6)
    axes.set_xlim(0, 106)
    axes.set_xticks(range(0, 101, 20))
    axes.tick_params(length=0, labelsize=9)
    plain(axes, ("left",))
    axes.grid(axis="x", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("validation score, %", **STYLE)
    legend = [
        Line2D([], [], color=INK, marker="|", ls="", ms=11, mew=2, label="majority answer"),
        Line2D([], [], marker="o", ls="", ms=6.5, mfc="white", mec=INK, mew=1.3, label="image-blind"),
    ]
    figure.legend(handles=legend, loc="outside upper right", ncols=2, frameon=False, fontsize=8.5)
    figure.suptitle(f"Scores: {run.name}", x=0.01, ha="left", fontsize=11, color=INK)
    return save(figure, folder / "scores.png")


def _curve(axes: Axes, task: TaskHistory, last: int) -> None:
    loss_axes = axes.twinx()
    for start, end, state in task.bands(last):
        if state == "stop":
            loss_axes.axvspan(start, end, color="#efefef", lw=0, zorder=0)
    loss_axes.plot(*_columns(task.losses), color=GREY, lw=1.1)
    loss_axes.set_ylim(bottom=0)
    loss_axes.tick_params(length=0, labelsize=7, colors=GREY)
    loss_axes.yaxis.set_major_locator(MaxNLocator(4))
    iterations, values = _columns([(iteration, 100 * score) for iteration, score in task.validations])
    axes.plot(iterations, values, color=task.colour, lw=1.6, marker="o", ms=2.6)
    if values:
        axes.axhline(max(values), color=task.colour, lw=0.9, ls=":")
    axes.set_zorder(loss_axes.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.set_title(task.title, fontsize=9.5, loc="left", color=task.colour)
    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(length=2, labelsize=7.5)
    for panel in (axes, loss_axes):
        plain(panel, ("left", "bottom") if panel is axes else ())


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def plain(axes: Axes, keep: tuple[str, ...]) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
        spine.set_color("#b0b0b0")


def read_history(folder: Path) -> RunHistory:
    """Raises BadInput for a folder without journal files, or whose events lack the start of the run."""
    events, metrics = read_rows(folder / EVENTS_FILE), read_rows(folder / METRICS_FILE)
    start = next((row for row in events if row["event"] == "start"), None)
    if start is None:
        raise BadInput(folder / EVENTS_FILE, "no start event", "it is not the journal of a run")
    groups = list(dict.fromkeys(task["group"] for task in start["tasks"]))
    tasks = {
        task["name"]: TaskHistory(
            task["name"], task["title"], task["group"], PALETTE[groups.index(task["group"]) % len(PALETTE)]
        )
        for task in start["tasks"]
    }
    for row in metrics:
        if row["loss"] is not None:
            tasks[row["task"]].losses.append((row["iteration"], row["loss"]))
    for row in events:
        if row["event"] == "validation":
            tasks[row["task"]].validations.append((row["iteration"], row["score"]))
        elif row["event"] == "decision":
            tasks[row["task"]].changes.append((row["iteration"], row["state"]))
        elif row["event"] == "result":
            tasks[row["task"]].result = row
    last = max((row["iteration"] for row in (*events, *metrics)), default=0)
    return RunHistory(start["name"], list(tasks.values()), max(last, 1))


def save(figure: Figure, path: Path) -> Path:
    """Write a figure atomically, as .png or .svg by its name, without the time of day: the same figure gives the same file."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(temporary, dpi=150, facecolor="white", metadata=_UNTIMED[path.suffix])
    os.replace(temporary, path)
    return path
