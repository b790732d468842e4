"""The overlap matrix as a picture: the paper's Table 1 as a heat map."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.errors import BadInput
from pipelines.files import write_atomic
from pipelines.overlap import Matrix

FORMATS = (".png", ".svg", ".pdf")
_INK, _QUIET, _ZERO, _EMPTY = "#1d2733", "#6b7580", "#b4bbc2", "#eef0f2"
_DARK = 55  # per cent from which on a cell wants white figures


def check_name(path: Path) -> None:
    """Raises BadInput for a file that no picture can be written to, before any work is done."""
    if path.suffix.lower() not in FORMATS:
        raise BadInput(path, "no picture format that is known", f"end its name in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise BadInput(path, f"no such folder: {path.parent}", "make it, or name another")


def draw(matrix: Matrix, images: Mapping[str, int], path: Path) -> None:
    """Write the heat map to `path`, atomically. `images`: data set -> how many test images it has."""
    names = list(matrix)
    side = 0.5 * len(names)
    figure = Figure(figsize=(side + 2.6, side + 2.1), layout="constrained")
    axes = figure.subplots()
    shares = [[matrix[row][column] for column in names] for row in names]
    filled = [[-1.0 if share is None else share for share in row] for row in shares]
    axes.imshow(filled, cmap=colormaps["Blues"].with_extremes(under=_EMPTY), vmin=0, vmax=100)
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            colour = _ZERO if not share else "white" if share >= _DARK else _INK
            axes.text(x, y, percent(share), ha="center", va="center", fontsize=9, color=colour)
    tested = [f"{name}  ({images[name]:,})" if name in images else f"{name}  (no test)" for name in names]
    _label(axes, names, tested)
    content = BytesIO()
    figure.savefig(content, format=path.suffix.lower()[1:], dpi=150, bbox_inches="tight")
    write_atomic(path, content.getvalue())


def percent(share: float | None) -> str:
    """Whole per cent; what is above 0 never reads 0, what is below 100 never 100."""
    if share is None:
        return "–"
    return "<1" if 0 < share < 0.5 else ">99" if 99.5 <= share < 100 else f"{share:.0f}"


def _label(axes: Axes, columns: list[str], rows: list[str]) -> None:
    """Names above and at the left, white lines between the cells."""
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("per cent that the training or validation set of … shows", color=_QUIET, fontsize=9, loc="left")
    axes.set_ylabel("of the test images of … (how many)", color=_QUIET, fontsize=9, loc="top")
    for place in range(1, len(rows)):
        axes.axhline(place - 0.5, color="white", lw=1.5)
        axes.axvline(place - 0.5, color="white", lw=1.5)
    axes.tick_params(length=0, labelcolor=_INK, labelsize=9)
    axes.spines[:].set_visible(False)
