"""What becomes of measured rows: a table for people, ratios for the README."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from bench.kernel_measure import Row

OWN = ("native", "triton", "reference")
_LONG = ("guesswhat_pointing", "guesswhat_306")
_LAYERNORM = "bias_dropout_residual_layernorm"
_Key = tuple[str, str, str, str, str]


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they need; the first one to the left, the others to the right."""
    lines = [tuple(headers), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def report(rows: Sequence[Row]) -> str:
    """One table for each op and dtype: our time, its share of the ceiling, and how much longer each peer takes."""
    texts = []
    for (op, dtype), group in groupby(sorted(rows, key=lambda r: (r.op, r.dtype)), key=lambda r: (r.op, r.dtype)):
        of_group = list(group)
        peers = list(dict.fromkeys(row.provider for row in of_group if row.provider not in OWN))
        lines = [_line(mine, theirs, peers) for mine, theirs in pairs(of_group)]
        headers = (f"{op}, {dtype}", "mode", "µs", "20 to 80 %", "ceiling", "share", *(f"× {peer}" for peer in peers))
        texts.append(table(headers, lines))
    return "\n\n".join(texts)


def _line(mine: Row, theirs: Mapping[str, Row], peers: Sequence[str]) -> tuple[str, ...]:
    ratios = (f"{theirs[peer].median_us / mine.median_us:.2f}" if peer in theirs else "" for peer in peers)
    quantiles = f"{mine.p20_us:.0f} to {mine.p80_us:.0f}"
    share = f"{100 * mine.share:.0f} %"
    return f"{mine.task}: {mine.shape}", mine.mode, f"{mine.median_us:.0f}", quantiles, mine.bound, share, *ratios


def pairs(rows: Iterable[Row]) -> Iterator[tuple[Row, dict[str, Row]]]:
    """Each of our rows with its peers' by name; in the order of ours."""
    found: dict[_Key, dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.op, row.mode, row.dtype, row.task, row.shape), {})[row.provider] = row
    for providers in found.values():
        mine = next((row for name, row in providers.items() if name in OWN), None)
        if mine is not None:
            yield mine, {name: row for name, row in providers.items() if name not in OWN}


Ratio = dict[str, float]


def headline(rows: Sequence[Row]) -> dict[str, dict[str, Ratio]]:
    """The ratios that the README quotes, where they were measured: a peer's time over ours, both passes together, geometric
    means over shapes; of medians, and of the fastest calls, which a busy machine disturbs least. "worst" is the median of the
    worst shape, "memory" is ours over theirs.
    """
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    layernorm = {
        f"{peer}, {dtype}": _ratio(rows, peer, lambda row, d=dtype: (row.op, row.dtype) == (_LAYERNORM, d))  # type: ignore[misc]
        for peer in ("torch", "torch_gemm_bias")
        for dtype in dtypes
    }
    attention = {
        f"{peer}{name}": _ratio(rows, peer, lambda row, p=p: _is_short_attention(row, p))  # type: ignore[misc]
        for peer in ("sdpa", "torch", "flash_attn")
        for name, p in (("", "0.1"), (", no dropout", "0"))
    }
    regions = {dtype: _against_all_regions(rows, dtype) for dtype in dtypes}
    found = {
        "layernorm": layernorm, "short_attention_bfloat16": attention, "masked_region_loss_against_all_regions": regions
    }  # fmt: skip
    return {name: {key: ratio for key, ratio in of.items() if ratio} for name, of in found.items()}


def _ratio(rows: Sequence[Row], peer: str, wanted: Callable[[Row], bool]) -> Ratio:
    found = [
        (mine, theirs[peer]) for mine, theirs in pairs(rows) if mine.mode == "both" and peer in theirs and wanted(mine)
    ]
    if not found:
        return {}
    return {
        "median": geometric_mean(theirs.median_us / mine.median_us for mine, theirs in found),
        "least": geometric_mean(theirs.least_us / mine.least_us for mine, theirs in found),
        "worst": round(min(theirs.median_us / mine.median_us for mine, theirs in found), 2),
    }


def _is_short_attention(row: Row, p: str) -> bool:
    attends = row.op in ("attention", "coattention") and row.task not in _LONG
    return attends and row.dtype == "bfloat16" and row.shape.endswith(f"dropout {p}")


def _against_all_regions(rows: Sequence[Row], dtype: str) -> Ratio:
    """Time as elsewhere; memory of ours over theirs: all that is held beyond inputs, and what is held beside gradients too."""

    def wanted(row: Row) -> bool:
        return (row.op, row.dtype, row.mode) == ("masked_region_loss", dtype, "both")

    times = _ratio(rows, "torch_all_rows", wanted)
    for mine, theirs in pairs(rows):
        if times and wanted(mine):
            ours, others = ((row.peak_bytes or 0, row.gradient_bytes or 0) for row in (mine, theirs["torch_all_rows"]))
            beyond = (ours[0] - ours[1]) / (others[0] - others[1])
            return {**times, "memory": round(ours[0] / others[0], 4), "memory_beyond_gradients": round(beyond, 4)}
    return {}


def geometric_mean(values: Iterable[float]) -> float:
    """To two digits behind the point. StatisticsError of nothing."""
    return round(statistics.geometric_mean(values), 2)
