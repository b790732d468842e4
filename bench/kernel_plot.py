"""One picture of a run of `bench.kernels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.kernel_measure import Row
from bench.kernel_report import geometric_mean, pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "torch": "#4477aa", "torch_gemm_bias": "#66ccee", "torch_fused": "#66ccee", "torch_all_rows": "#bbbbbb",
    "sdpa": "#228833", "compile": "#ccbb44", "flash_attn": "#ee6677", "liger": "#aa3377", "apex": "#222255",
    "native": "#4477aa", "triton": "#4477aa", "reference": "#bbbbbb",
}  # fmt: skip
"""Paul Tol's bright palette: told apart by colour-blind readers too."""

Bars = dict[str, dict[str, float]]
"""Op -> label -> value."""


def plot(path: Path, rows: Sequence[Row], conditions: Mapping[str, str]) -> None:
    """Left: how many times longer each peer takes, both passes. Right: our share of the measured ceiling."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    bars = [(ratios(of), shares(of)) for of in ([r for r in rows if r.dtype == dtype] for dtype in dtypes)]
    heights = [0.9 + 0.17 * sum(_bands(*pair).values()) for pair in bars]
    figure, axes = plt.subplots(
        len(dtypes), 2, figsize=(13, sum(heights) + 1), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for (left, right), (of_peers, of_us), dtype in zip(axes, bars, dtypes, strict=True):
        bands = _bands(of_peers, of_us)
        left.set_xscale("log")
        _draw(left, of_peers, bands, f"{dtype}: time of others / ours, both passes", "{:.1f} ×", start=1.0)
        left.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} ×"))
        left.xaxis.set_minor_formatter(NullFormatter())
        _draw(right, of_us, bands, f"{dtype}: our share of what this machine reaches", "{:.0%}", start=0.0)
        right.axvline(1, color="black", linewidth=0.8)
        right.xaxis.set_major_formatter(PercentFormatter(1))
    for column, side in enumerate(("left", "right")):
        labels = {
            text: bar for of in axes[:, column] for bar, text in zip(*of.get_legend_handles_labels(), strict=True)
        }
        style: dict[str, Any] = {"loc": f"outside lower {side}", "ncols": 9, "fontsize": 8, "frameon": False}
        figure.legend([*labels.values()], [*labels], **style)
    where = f"{conditions['device']}, {conditions['isa']}, {conditions['threads']} threads, torch {conditions['torch']}"
    figure.suptitle(f"{where}; geometric means over shapes", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def ratios(rows: Sequence[Row]) -> Bars:
    """Of each op, the time of each peer over ours; the optimizer has one pass only."""
    found: dict[str, dict[str, list[float]]] = {}
    for mine, theirs in pairs(rows):
        if mine.mode in ("both", "step"):
            for peer, row in theirs.items():
                found.setdefault(mine.op, {}).setdefault(peer, []).append(row.median_us / mine.median_us)
    return _means(found)


def shares(rows: Sequence[Row]) -> Bars:
    """Of each op, our share of the ceiling. Both passes together: some ops make gradients in forward, others in backward."""
    found: dict[str, dict[str, list[float]]] = {}
    for mine, _ in pairs(rows):
        if mine.mode in ("both", "step"):
            found.setdefault(mine.op, {}).setdefault(mine.provider, []).append(mine.share)
    return _means(found)


def _means(found: Mapping[str, Mapping[str, list[float]]]) -> Bars:
    return {op: {label: geometric_mean(values) for label, values in of_op.items()} for op, of_op in found.items()}


def _bands(left: Bars, right: Bars) -> dict[str, int]:
    """How many bars high an op's band is, so that it stands at the same height on both sides."""
    return {op: 1 + max(len(left.get(op, ())), len(right.get(op, ()))) for op in {**left, **right}}


def _draw(axes: Axes, bars: Bars, bands: Mapping[str, int], title: str, text: str, start: float) -> None:
    """Horizontal bars from `start`, a band for each op, read from the top."""
    top, middles = 0.0, []
    seen: set[str] = set()
    for op, band in bands.items():
        of_op = bars.get(op, {})
        middles.append(top + (band - 2) / 2)
        first = middles[-1] - (len(of_op) - 1) / 2
        for place, (label, value) in enumerate(of_op.items()):
            name = label if label not in seen else None
            axes.barh(first + place, value - start, 0.85, left=start, color=_COLOURS[label], label=name)
            axes.text(max(value, start), first + place, " " + text.format(value), va="center", fontsize=6.5)
            seen.add(label)
        top += band
    axes.axvline(start, color="black", linewidth=0.8)
    axes.set_yticks(middles, list(bands))
    axes.set_ylim(top - 1, -1)
    axes.margins(x=0.12)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10)
