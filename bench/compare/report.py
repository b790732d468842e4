"""A comparison for people, for a pull request, and for machines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.compare.changes import Counts, changed_counters
from bench.compare.verdicts import FASTER, NOISY, SAME, SLOWER, STEP, Row

_COLOURS = {SLOWER: "red", FASTER: "green", SAME: "", NOISY: "dim"}
_TITLES = ("", "BASE ms", "HEAD ms", "HEAD / BASE", "95 %", "")
_MOST_OPS = 8
"""Torch ops whose counts changed that are listed by name."""


@dataclass(frozen=True)
class Report:
    """All that is said of a comparison."""

    base: str
    head: str
    gate: float
    rows: Sequence[Row]
    provenance: Mapping[str, Any]
    notes: Sequence[str] = ()
    counts: Counts = field(default_factory=dict)
    samples: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failing(self) -> list[Row]:
        """Slower for sure, and by more than the gate."""
        return [row for row in self.rows if row.fails(self.gate)]

    @property
    def headline(self) -> str:
        """One sentence."""
        if self.failing:
            worst = ", ".join(f"{row.name} {_percent(row.ratio)}" for row in self.failing)
            return f"slower by more than {100 * self.gate:g} %: {worst}"
        found = {verdict: [row.name for row in self.rows if row.verdict == verdict] for verdict in _COLOURS}
        parts = [f"{verdict}: {', '.join(found[verdict])}" for verdict in (SLOWER, FASTER) if found[verdict]]
        parts += [f"{len(found[verdict])} {verdict}" for verdict in (SAME, NOISY) if found[verdict]]
        return f"nothing is slower by more than {100 * self.gate:g} % ({'; '.join(parts)})"

    def as_json(self) -> dict[str, Any]:
        """Everything. What is not finite is null."""
        return {
            "headline": self.headline,
            "rows": [{name: _finite(value) for name, value in asdict(row).items()} for row in self.rows],
            "failing": [row.name for row in self.failing],
            "gate": self.gate,
            "counters": changed_counters(self.counts),
            "counts": dict(self.counts),
            "notes": list(self.notes),
            "samples": dict(self.samples),
            "provenance": dict(self.provenance),
        }

    def print(self, console: Console) -> None:
        """A table, what changed in the counters, and notes."""
        table = Table(*_TITLES, title=f"{self.base} → {self.head}", title_justify="left", box=None, pad_edge=False)
        for column in table.columns[1:5]:
            column.justify = "right"
        kind = ""
        for row in self.rows:
            if kind not in ("", row.kind):
                table.add_row()
            kind = row.kind
            table.add_row(*_cells(row), style="bold" if row.kind == STEP else "")
        console.print(table)
        for line in (*self._changes(), *self.notes):
            console.print(line, style="dim", highlight=False)
        console.print(self.headline, style="bold", highlight=False)

    def markdown(self) -> str:
        """For a pull request: the sentence, what differs, and the whole table folded away."""
        told = [row for row in self.rows if row.kind == STEP or row.verdict in (SLOWER, FASTER)]
        quiet = [row for row in self.rows if row not in told]
        lines = [f"**{self.base} → {self.head}: {self.headline}**", "", *_markdown_table(told), ""]
        lines += [f"- {line}" for line in self._changes()]
        if quiet:
            lines += [
                "",
                f"<details><summary>{len(quiet)} other rows</summary>",
                "",
                *_markdown_table(quiet),
                "",
                "</details>",
            ]
        lines += ["", *(f"{note}  " for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"

    def _changes(self) -> Iterator[str]:
        """A line for every counter that changed, torch ops last and not too many of them."""
        counters = changed_counters(self.counts)
        if self.counts and not counters:
            yield "counters: no launch, copy, copied byte, sync, allocation, native call or padded row more or less"
        plain = {name: of for name, of in counters.items() if "/" not in name}
        named = {name: of for name, of in counters.items() if "/" in name}
        for number, (name, of_tasks) in enumerate({**plain, **named}.items()):
            if number == len(plain) + _MOST_OPS:
                yield f"and {len(named) - _MOST_OPS} other ops (--json has them)"
                return
            task, (base, head) = max(of_tasks.items(), key=lambda item: abs(item[1][1] - item[1][0]))
            where = f"{len(of_tasks)} of {len(self.counts)} tasks"
            yield f"{name} changed in {where}, most in {task}: {base:,} → {head:,}"


def _cells(row: Row) -> tuple[str, ...]:
    colour = _COLOURS[row.verdict]
    verdict = f"[{colour}]{row.verdict}[/]" if colour else row.verdict
    return (row.name, _ms(row.base_s), _ms(row.head_s), f"{row.ratio:.3f}", _interval(row), verdict)


def _markdown_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| | BASE ms | HEAD ms | HEAD / BASE | 95 % | |", "|---|---:|---:|---:|---:|---|"]
    for row in rows:
        cells = (row.name, _ms(row.base_s), _ms(row.head_s), f"{row.ratio:.3f}", _interval(row), row.verdict)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _interval(row: Row) -> str:
    return f"{row.low:.3f} to {row.high:.3f}" if math.isfinite(row.high) else "unknown"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.3g}"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
