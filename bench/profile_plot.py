"""The roofline of a step: every op, against the ceilings that were measured in the same run.

Ops with products stand over their intensity (FLOPs a byte), those without over the bytes of a call. Alike blocks are one
point. Names stand in a column beside the panel, each tied to its point, so that none can cover another.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.profile_account import Line, alike
from bench.profile_report import Report
from bench.profile_roofs import Roofs
from engine.figures import GREY, INK, PALETTE
from pipelines.files import write_atomic

_COLOURS = {
    "text": PALETTE[0], "image": PALETTE[1], "connection": PALETTE[2], "text embedding": PALETTE[3],
    "image embedding": PALETTE[3], "": PALETTE[4],
}  # fmt: skip
"""By kind of block; the others are those of the end: poolers, head."""
_LEGEND = {
    "text": "text",
    "image": "image",
    "connection": "connection",
    "text embedding": "embeddings",
    "": "no block",
    "end": "end",
}
_MARKERS = {"forward": "^", "backward": "v", "step": "s"}
_LABEL_INCHES = 0.16
"""Height of a name."""
_TOP_INCHES, _GAP_INCHES, _BOTTOM_INCHES = 0.75, 0.85, 0.95
_HEADROOM = 8
"""Times the highest value, for the legend."""
At = Callable[[Line], float]


def plot(path: Path, reports: Mapping[str, Report], roofs: Roofs, conditions: Mapping[str, Any]) -> None:
    """Writes a PNG."""
    content = io.BytesIO()
    draw(reports, roofs, conditions).savefig(content, dpi=130, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content.getvalue())


def draw(reports: Mapping[str, Report], roofs: Roofs, conditions: Mapping[str, Any]) -> Figure:
    """Two panels for each task, one under the other."""
    drawn = {name: _points(report) for name, report in reports.items()}
    heights = [max(3.2, 0.8 + _LABEL_INCHES * len(points)) for panels in drawn.values() for points in panels]
    height = sum(heights) + _GAP_INCHES * (len(heights) - 1) + _TOP_INCHES + _BOTTOM_INCHES
    figure = Figure(figsize=(14, height))
    grid = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    figure.subplots_adjust(
        0.06, _BOTTOM_INCHES / height, 0.58, 1 - _TOP_INCHES / height, hspace=_GAP_INCHES * len(heights) / sum(heights)
    )
    for upper, lower, (name, (with_products, without)) in zip(grid[::2], grid[1::2], drawn.items(), strict=True):
        total = reports[name].seconds
        _rooflines(upper, with_products, roofs)
        _place(upper, with_products, _intensity, _flop_rate, total)
        upper.set_title(f"{name}: ops with products", loc="left", fontsize=10)
        upper.set(xlabel="FLOP per byte", ylabel="GFLOP/s")
        _bandwidths(lower, without, roofs)
        _place(lower, without, _call_bytes, _byte_rate, total)
        lower.set_title(f"{name}: ops without", loc="left", fontsize=10)
        lower.set(xlabel="MB of a call", ylabel="GB/s")
    figure.legend(handles=_legend(), loc="lower center", ncols=10, frameon=False, fontsize=8)
    c = conditions
    where = f"{c['device']}, {c['isa']}, threads: {c['threads']}; {c['model']}, batch {c['batch']}, {c['precision']}"
    title = f"{where}; areas, and the first number of a name: share of the step"
    figure.suptitle(title, fontsize=10, y=1 - 0.2 / height, va="top")
    return figure


def _points(report: Report) -> tuple[list[Line], list[Line]]:
    """(ops whose work is mostly products, the others), alike blocks together."""
    ops = [line for line in alike(report.lines) if line.op and line.bytes and line.kernel_seconds]
    products = [line for line in ops if line.op.startswith(("projection", "attention", "co-attention")) and line.flops]
    return products, [line for line in ops if line not in products]


def _intensity(line: Line) -> float:
    return line.flops / line.bytes


def _flop_rate(line: Line) -> float:
    return line.flops / line.kernel_seconds / 1e9


def _call_bytes(line: Line) -> float:
    return line.bytes / max(line.calls, 1) / 1e6


def _byte_rate(line: Line) -> float:
    return line.bytes / line.kernel_seconds / 1e9


def _rooflines(axes: Axes, points: Sequence[Line], roofs: Roofs) -> None:
    """Memory's and the caches' slope, and the flat roof of products."""
    peak, cached = roofs.peak / 1e9, max(roofs.bandwidths.values()) / 1e9
    places = [_intensity(line) for line in points] or [1.0]
    low, high = min(places) / 3, max(*places, 2 * peak / (roofs.memory / 1e9)) * 2
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    rates = [_flop_rate(line) for line in points] or [peak]
    axes.set_ylim(min(*rates, peak) / 2, _HEADROOM * max(*rates, peak))
    for rate, style, name in ((roofs.memory / 1e9, "-", "memory"), (cached, "--", "caches at best")):
        ridge = peak / rate
        axes.plot(
            [low, ridge], [low * rate, peak], style, color=GREY, linewidth=1, zorder=1, label=f"{name} {rate:,.0f} GB/s"
        )
    start = peak / cached
    label = f"products, {roofs.dtype_name}, {peak:,.0f} GFLOP/s"
    axes.plot([start, high], [peak, peak], ":", color=INK, linewidth=1, zorder=1, label=label)
    axes.legend(loc="upper left", fontsize=8, frameon=False, title="ceilings, measured in this run", title_fontsize=8)


def _bandwidths(axes: Axes, points: Sequence[Line], roofs: Roofs) -> None:
    """What a copy, or an update in place, of each size reached."""
    sizes = sorted(roofs.bandwidths)
    rates = [roofs.bandwidths[size] / 1e9 for size in sizes]
    axes.set(xscale="log", yscale="log")
    label = f"copy or update in place; memory {roofs.memory / 1e9:,.0f} GB/s"
    axes.plot([size / 1e6 for size in sizes], rates, "-", color=GREY, linewidth=1, zorder=1, label=label)
    reached = [*rates, *map(_byte_rate, points)]
    axes.set_ylim(min(reached) / 2, _HEADROOM * max(reached))
    axes.legend(loc="upper left", fontsize=8, frameon=False, title="ceiling, measured in this run", title_fontsize=8)


def _place(axes: Axes, points: Sequence[Line], x: At, y: At, total: float) -> None:
    """Points, and their names from top to bottom in the order of their heights."""
    for line in points:
        axes.scatter(
            x(line), y(line), s=18 + 900 * line.seconds / total, marker=_MARKERS.get(line.phase, "o"), zorder=3,
            color=_colour(line), alpha=0.75, linewidths=0.4, edgecolors="white",
        )  # fmt: skip
    ordered = sorted(points, key=lambda line: -y(line))
    for number, line in enumerate(ordered):
        place = (1.06, 1 - (number + 0.5) / len(ordered))
        axes.annotate(
            _label(line, total), (x(line), y(line)), xytext=place, textcoords="axes fraction", va="center", fontsize=7.5,
            color=_colour(line), annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.35, "shrinkA": 0, "shrinkB": 2,
                        "relpos": (0, 0.5)},
        )  # fmt: skip
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _label(line: Line, total: float) -> str:
    where = "" if not line.block else f"{line.block}: "
    share = "" if line.share is None else f", {line.share:.0%} of ceiling"
    return f"{where}{line.op} ({line.phase}): {line.seconds / total:.1%}{share}"


def _colour(line: Line) -> str:
    return _COLOURS.get(line.block, PALETTE[5])


def _legend() -> list[Line2D]:
    def mark(colour: str, marker: str, name: str) -> Line2D:
        return Line2D([], [], color=colour, marker=marker, linestyle="", label=name)

    kinds = [mark(_COLOURS.get(kind, PALETTE[5]), "o", name) for kind, name in _LEGEND.items()]
    return kinds + [mark(INK, marker, phase) for phase, marker in _MARKERS.items()]
