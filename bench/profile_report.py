"""What a profile has found: as JSON for machines, as tables and a verdict for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.kernel_report import table
from bench.profile_account import Line, Taken, about, alike, kind_of, lines, phases, shares
from bench.profile_roofs import Roofs
from engine.bottleneck import About, Finding, Shares, findings, verdict

_TITLES = {
    "data": "waiting for the batch", "copy": "host to device", "step": "optimizer", "reduce": "reduce (other ranks)",
    "graph": "forward, loss and backward, replayed",
}  # fmt: skip
_SHOWN = 24
TOLERANCE = 0.03
"""How far the phases' sum may be from a step that nobody looks into."""


@dataclass(frozen=True)
class Report:
    """One task."""

    taken: Taken
    lines: list[Line]
    shares: Shares
    about: About
    waits: bool
    """Whether waiting for batches was measured."""

    @classmethod
    def of(cls, taken: Taken, roofs: Roofs, device: torch.device, graphs: bool, waits: bool) -> Report:
        found = lines(taken, roofs)
        return cls(taken, found, shares(found, waits), about(found, device, graphs), waits)

    @property
    def findings(self) -> list[Finding]:
        """What stands out; or, if nothing does, that products do."""
        first = verdict(self.shares, self.about)
        return findings(self.shares, self.about) or ([first] if first else [])

    @property
    def seconds(self) -> float:
        """What the phases add up to."""
        return sum(line.seconds for line in self.lines)

    def as_json(self) -> dict[str, Any]:
        taken = self.taken
        return {
            "step": {
                "plain_s": taken.plain, "profiled_s": taken.profiled, "overhead": taken.overhead,
                "phases_over_plain": self.seconds / taken.plain, "rounds": len(taken.rounds),
                "all": [{"plain": one.plain, "profiled": one.profiled} for one in taken.rounds],
            },
            "phases": phases(self.lines),
            "ops": [asdict(line) for line in self.lines],
            "kernels": _kernels(taken),
            "shares": asdict(self.shares),
            "verdict": [asdict(finding) for finding in self.findings],
        }  # fmt: skip

    def text(self, name: str) -> str:
        """For people."""
        taken, total = self.taken, self.seconds
        head = (
            f"{name}: {_ms(taken.plain)} ms a step; looked into {_ms(taken.profiled)} ({taken.overhead:+.1%}), "
            f"whose phases add up to {total / taken.plain:.1%} of the plain step; {len(taken.rounds)} rounds"
        )
        if abs(total / taken.plain - 1) > TOLERANCE:
            head += f"\n! beyond {TOLERANCE:.0%}: short steps or a busy machine want more --rounds, or a quiet moment"
        parts = [head, _phase_table(self), _block_table(self.lines), _op_table(self.lines, total)]
        said = [f"verdict: {one}" for one in self.findings] or ["verdict: nothing stands out"]
        return "\n\n".join([*parts, "\n".join(said)])


def _kernels(taken: Taken) -> list[dict[str, Any]]:
    """Native kernels over all places: mean calls and seconds of a step."""
    found: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for one in taken.middle:
        for spent in one.spent.values():
            for kernel, seconds in spent.kernels.items():
                found[kernel][0] += len(seconds) / len(taken.middle)
                found[kernel][1] += sum(seconds) / len(taken.middle)
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    return [{"kernel": kernel, "calls": calls, "seconds": seconds} for kernel, (calls, seconds) in ordered]


def _phase_table(report: Report) -> str:
    rows = [] if report.waits else [("waiting for the batch", "not measured", "(synthetic batches; --config)")]
    rows += [
        (_TITLES.get(phase, phase), _ms(seconds), f"{seconds / report.seconds:.1%}")
        for phase, seconds in phases(report.lines).items()
    ]
    return table(("phase", "ms", "of the step"), rows)


def _block_table(found: Sequence[Line]) -> str:
    """Milliseconds of each block, forward and backward; what has no block is in the phases."""
    spent: defaultdict[str, dict[str, float]] = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    for line in found:
        if line.block and line.phase in ("forward", "backward"):
            spent[line.block][line.phase] += line.seconds
    ordered = sorted(spent.items(), key=lambda item: (kind_of(item[0]), len(item[0]), item[0]))
    rows = [(block, _ms(of["forward"]), _ms(of["backward"])) for block, of in ordered]
    return table(("block", "forward, ms", "backward, ms"), rows)


def _op_table(found: Sequence[Line], total: float) -> str:
    """Longest first: alike blocks together."""
    every = alike(found)
    shown, rest = every[:_SHOWN], every[_SHOWN:]
    rows = [_op_row(line, total) for line in shown]
    if rest:
        seconds = sum(line.seconds for line in rest)
        rows.append((f"{len(rest)} more", "", "", _ms(seconds), f"{seconds / total:.1%}", *[""] * 6))
    headers = (
        "where", "calls", "launches", "ms", "of the step", "in Python", "GFLOP", "MB", "GFLOP/s", "GB/s", "of its ceiling",
    )  # fmt: skip
    return table(headers, rows)


def _op_row(line: Line, total: float) -> tuple[str, ...]:
    kernel = line.kernel_seconds
    rates = [f"{work / kernel / 1e9:,.1f}" if kernel and work else "" for work in (line.flops, line.bytes)]
    python = _ms(line.seconds - kernel) if line.op else ""
    return (
        line.key, f"{line.calls:g}", f"{line.launches:g}", _ms(line.seconds), f"{line.seconds / total:.1%}", python,
        f"{line.flops / 1e9:,.2f}" if line.flops else "", f"{line.bytes / 1e6:,.1f}" if line.bytes else "", *rates,
        "" if line.share is None else f"{line.share:.0%} {line.bound}",
    )  # fmt: skip


def ceilings_text(roofs: Roofs) -> str:
    """One line."""
    return (
        f"ceilings, measured in this run: memory {roofs.memory / 1e9:,.1f} GB/s; "
        f"products, {roofs.dtype_name}, {roofs.peak / 1e9:,.0f} GFLOP/s; weights are held to the memory's, "
        "what else a call moves to what a copy of that size reaches"
    )


def as_json(reports: Mapping[str, Report], roofs: Roofs, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Everything."""
    tasks = {name: report.as_json() for name, report in reports.items()}
    return {"tasks": tasks, "ceilings": roofs.as_json(), "conditions": dict(conditions)}


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}"
