"""`python -m bench.gate`: what the engine does, counted, against what it did when `bench/baseline.json` was written.

Counters do not depend on how busy a machine is: launches, copies, allocations and syncs of a training step of each task, rows
and padding, products' FLOPs and everything's bytes, what packing a batch allocates, what ZeRO sends and reads at each stage,
and registers, spills and bytes of the compiled GPU kernels. One that grew is a regression until somebody says otherwise:

    python -m bench.gate --update          # measure again and write the baseline; the commit's message says why

Exit codes: 0 nothing grew, 1 something did (its name and by how much), 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.errors import BadInput
from pipelines.files import write_atomic

BASELINE = Path(__file__).parent / "baseline.json"
ISA = "avx2"
"""Instructions that every machine has on which this runs: which products are whose depends on them."""

OF_OP = "of op"
MOST_LINES = 60

Counters = dict[str, float]
"""By name, from the largest thing to the smallest: `steps/vqa/copies`. More is worse, of all of them."""


@dataclass(frozen=True)
class Change:
    """A counter that is not what it was. A counter that is not there is 0."""

    name: str
    before: float
    now: float

    @property
    def grew(self) -> bool:
        return self.now > self.before

    @property
    def explains(self) -> bool:
        """Whether it only says what a total is made of: one op in place of another is no regression."""
        return f"/{OF_OP}/" in self.name

    @property
    def group(self) -> str:
        """What it was counted of: `steps/vqa`."""
        return "/".join(self.name.split("/")[:2])

    def __str__(self) -> str:
        share = f" ({self.now / self.before - 1:+.1%})" if self.before else ""
        return f"{self.name}: {_number(self.before)} -> {_number(self.now)}{share}"


def changes(before: Mapping[str, float], now: Mapping[str, float], within: Sequence[str]) -> list[Change]:
    """Counters of these groups that differ. Of ops, those of whose step a total grew."""
    names = sorted({name for name in (*before, *now) if name.partition("/")[0] in within})
    found = [Change(name, before.get(name, 0.0), now.get(name, 0.0)) for name in names]
    found = [change for change in found if change.before != change.now]
    worse = {change.group for change in found if change.grew and not change.explains}
    return [change for change in found if not change.explains or (change.grew and change.group in worse)]


def flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """(name, counter) of a tree of them."""
    for key, value in tree.items():
        name = f"{above}/{key}" if above else str(key)
        if isinstance(value, Mapping):
            yield from flat(value, name)
        else:
            yield name, value


def counted(groups: Mapping[str, Callable[[], Mapping[str, Any]]], say: Callable[[str], None]) -> Counters:
    """Every counter of these groups."""
    found: Counters = {}
    for name, count in groups.items():
        say(f"counting {name}")
        found |= flat({name: count()})
    return found


def read(path: Path) -> Counters:
    """The baseline. Raises BadInput where there is none."""
    try:
        found = json.loads(path.read_text())
        return {name: float(value) for name, value in found["counters"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(path, f"no baseline: {error!r}", "python -m bench.gate --update") from None


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    from bench import gate_counts  # which imports torch: --help need not wait for it

    try:
        names = arguments.only.split(",") if arguments.only else [*gate_counts.GROUPS]
        if unknown := set(names) - gate_counts.GROUPS.keys():
            raise BadInput(f"--only {unknown.pop()}", "no such group", f"there are {', '.join(gate_counts.GROUPS)}")
        before = {} if arguments.update and not arguments.baseline.exists() else read(arguments.baseline)
        now = counted({name: gate_counts.GROUPS[name] for name in names}, _say)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = changes(before, now, names)
    if before:
        _report(found, len(now))
    if arguments.update:
        kept = {name: value for name, value in before.items() if name.partition("/")[0] not in names}
        result = {"isa": os.environ.get("STOPGO_ISA", ISA), "counters": dict(sorted((kept | now).items()))}
        write_atomic(arguments.baseline, (json.dumps(result, indent=0) + "\n").encode())
        print(f"written to {arguments.baseline.name}")
        return 0
    return int(any(change.grew for change in found))  # an op's counter is among them only with a total's


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", metavar="GROUPS", help="of steps, products, buckets, batches, ranks, kernels; default: all"
    )
    parser.add_argument("--update", action="store_true", help="write what is counted now as the baseline")
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="F", help="default: bench/baseline.json")
    return parser


def _report(found: Sequence[Change], total: int) -> None:
    """What grew line by line, with nothing cut off; what shrank in a table."""
    grew, shrank = [c for c in found if c.grew], [c for c in found if not c.grew]
    for change in grew[:MOST_LINES]:
        print(f"{'      by' if change.explains else 'GREW'}  {change}")
    if len(grew) > MOST_LINES:
        print(f"and {len(grew) - MOST_LINES} more")
    if shrank:
        table = Table(title="less than before: python -m bench.gate --update keeps it so", title_justify="left")
        for heading in ("counter", "before", "now"):
            table.add_column(heading, justify="left" if heading == "counter" else "right", overflow="fold")
        for change in shrank[:MOST_LINES]:
            table.add_row(change.name, _number(change.before), _number(change.now))
        Console().print(table)
    print(f"{total:,} counters: {sum(not c.explains for c in grew)} grew, {len(shrank)} shrank")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.6g}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("STOPGO_ISA", ISA)  # here, not in main: tests call that, and start processes of their own
    sys.exit(main())
