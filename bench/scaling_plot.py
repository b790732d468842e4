"""The picture of `bench.scaling`: one panel an axis, dots measured, lines predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.figures import GREY, PALETTE

MIB = 2**20
_MEASURED, _PREDICTED = PALETTE[0], GREY
_LABELS = {
    "batch": "samples of a batch", "texts": "rows of a text", "regions": "rows of an image", "threads": "threads",
    "ranks": "ranks, a thread each",
}  # fmt: skip


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the figure; the format is the file name's."""
    axes = result["axes"]
    panels: list[Callable[[Axes], None]] = []
    for name in (axis for axis in _LABELS if axis in axes):
        panels.append(lambda panel, name=name: _seconds(panel, name, axes[name]))  # type: ignore[misc]
        if "memory" in axes[name][0] and name != "threads":
            panels.append(lambda panel, name=name: _memory(panel, name, axes[name]))  # type: ignore[misc]
    if "tasks" in axes:
        panels += [lambda panel: _stopped(panel, axes["tasks"]), lambda panel: _validation(panel, axes["tasks"])]
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for place, panel in enumerate(grid):
        if place < len(panels):
            panels[place](panel)
            panel.spines[["top", "right"]].set_visible(False)
        else:
            panel.set_visible(False)
    about = result["conditions"]
    figure.suptitle(
        f"{about['model']}, {about['task']}, batch {about['batch']}, {about['precision']}: "
        "dots measured, lines the cost model of bench.plan", fontsize=10,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _seconds(panel: Axes, name: str, rows: Sequence[Mapping[str, float]]) -> None:
    at = [row["at"] for row in rows]
    if "predicted" in rows[0]:
        panel.plot(at, [1e3 * row["predicted"] for row in rows], color=_PREDICTED)
    panel.plot(at, [1e3 * row["seconds"] for row in rows], "o", color=_MEASURED)
    panel.set_title("ms of an iteration of twelve tasks" if name == "ranks" else "ms of a step", fontsize=9, loc="left")
    _frame(panel, name, at)


def _memory(panel: Axes, name: str, rows: Sequence[Mapping[str, float]]) -> None:
    """What grows: the process's peak holds gradients and buffers besides, which are the same at every point."""
    at = [row["at"] for row in rows]
    predicted, measured = ([(row[key] - rows[0][key]) / MIB for row in rows] for key in ("predicted_memory", "memory"))
    panel.plot(at, predicted, color=_PREDICTED)
    panel.plot(at, measured, "o", color=_MEASURED)
    panel.set_title("MiB more than at the first point", fontsize=9, loc="left")
    _frame(panel, name, at)


def _frame(panel: Axes, name: str, at: Sequence[float]) -> None:
    panel.set_xlabel(_LABELS[name], fontsize=9)
    panel.set_ylim(0, 1.08 * panel.dataLim.y1)
    if len(at) < 6:
        panel.set_xticks(at)
    if len(at) < 4:
        panel.set_xlim(min(at) - 0.5, max(at) + 0.5)


def _stopped(panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """What is left of a task's part of an iteration when it is stopped."""
    names = [row["task"] for row in rows]
    panel.barh(names, [1e3 * row["seconds"] for row in rows], color=_PREDICTED, label="go")
    panel.barh(names, [1e3 * row["stopped"] for row in rows], color=_MEASURED, label="stopped")
    panel.set_title("ms of an iteration, tiny model", fontsize=9, loc="left")
    _list(panel)


def _validation(panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    names = [row["task"] for row in rows]
    shares = [100 * row["validation"] / (row["between_validations"] * row["seconds"]) for row in rows]
    panel.barh(names, shares, color=_MEASURED)
    panel.set_title("a validation, % of the steps before it", fontsize=9, loc="left")
    panel.set_yticklabels([])
    _list(panel, legend=False)


def _list(panel: Axes, legend: bool = True) -> None:
    panel.invert_yaxis()
    panel.tick_params(axis="y", labelsize=7)
    if legend:
        panel.set_xlim(right=1.3 * panel.get_xlim()[1])
        panel.legend(fontsize=7, frameon=False, loc="lower right")
