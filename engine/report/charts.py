"""Charts as coordinates, which the templates draw as inline SVG: small, sharp, and in the colours of the page. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from engine.figures import PALETTE, RunHistory, TaskHistory

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """A place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Band:
    """A stretch of iterations in one state."""

    x: float
    width: float
    going: bool


@dataclass(frozen=True)
class Row:
    """A task's line of the timeline."""

    title: str
    colour: int
    y: float
    bands: tuple[Band, ...]
    validations: tuple[float, ...]
    told: str
    """The same in words."""


@dataclass(frozen=True)
class Timeline:
    """Paper Fig. 2, left."""

    width: float
    height: float
    left: float
    rows: tuple[Row, ...]
    ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Curve:
    """One task's scores and losses over iterations."""

    title: str
    colour: int
    width: float
    height: float
    score: str
    """Points of a polyline; empty: never validated."""
    loss: str
    best: float | None
    """Height of the best score."""
    stops: tuple[Band, ...]
    dots: tuple[tuple[float, float], ...]
    x_ticks: tuple[Tick, ...]
    score_ticks: tuple[Tick, ...]
    told: str


ROW, LEFT, RIGHT, WIDTH = 26.0, 150.0, 12.0, 960.0
_PANEL = (300.0, 170.0)
_FRAME = (34.0, 10.0, 292.0, 146.0)
"""Left, top, right, bottom of a curve's axes."""


def colour(task: TaskHistory) -> int:
    """Number of a group's colour."""
    return PALETTE.index(task.colour)


def timeline(run: RunHistory) -> Timeline:
    """One row per task, a band for each stretch of go and stop."""

    def x(iteration: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * iteration / run.last

    rows = []
    for place, task in enumerate(run.tasks):
        bands = task.bands(run.last)
        stopped = sum(end - start for start, end, state in bands if state != "go")
        told = f"{task.title}: stopped for {stopped} of {run.last} iterations"
        drawn = tuple(Band(x(start), x(end) - x(start), state == "go") for start, end, state in bands)
        validations = tuple(x(iteration) for iteration, _ in task.validations)
        rows.append(Row(task.title, colour(task), ROW * place + ROW / 2, drawn, validations, told))
    ticks = tuple(Tick(x(value), f"{value:,.0f}") for value in _nice(0, run.last, 8))
    return Timeline(WIDTH, ROW * len(rows) + 24, LEFT, tuple(rows), ticks)


def curves(run: RunHistory) -> list[Curve]:
    """A panel for each task: validation score with its best, training loss behind, stops shaded."""
    return [_curve(task, run.last) for task in run.tasks]


def _curve(task: TaskHistory, last: int) -> Curve:
    left, top, right, bottom = _FRAME
    scores = [100 * score for _, score in task.validations]
    low, high = _range(scores)
    highest_loss = max((loss for _, loss in task.losses), default=1.0) or 1.0

    def x(iteration: float) -> float:
        return left + (right - left) * iteration / last

    def y(share: float) -> float:
        return bottom - (bottom - top) * share

    def score_y(score: float) -> float:
        return y((score - low) / (high - low))

    dots = [(x(iteration), score_y(100 * score)) for iteration, score in task.validations]
    losses = [(x(iteration), y(loss / highest_loss)) for iteration, loss in task.losses]
    stops = [Band(x(a), x(b) - x(a), False) for a, b, state in task.bands(last) if state == "stop"]
    told = "not validated yet"
    if scores:
        told = f"score from {scores[0]:.1f} to {scores[-1]:.1f} per cent, best {max(scores):.1f}"
    return Curve(
        task.title, colour(task), *_PANEL, _line(dots), _line(losses), score_y(max(scores)) if scores else None,
        tuple(stops), tuple(dots) if len(dots) <= 40 else (),
        tuple(Tick(x(value), f"{value:,.0f}") for value in _nice(0, last, 4)),
        tuple(Tick(score_y(value), f"{value:g}") for value in _nice(low, high, 4)), told,
    )  # fmt: skip


def _range(scores: Sequence[float]) -> tuple[float, float]:
    """Some room around the values, within 0 and 100 where they are."""
    if not scores:
        return 0.0, 100.0
    low, high = min(scores), max(scores)
    room = max(0.08 * (high - low), 1.0)
    return max(0.0, low - room), min(100.0, high + room)


def _nice(low: float, high: float, count: int) -> list[float]:
    return [float(value) for value in MaxNLocator(count).tick_values(low, high) if low <= value <= high]


def _line(points: Points) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
