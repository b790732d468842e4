"""`python -m bench.compare BASE HEAD`: which task or op became slower, by how much, whether it is noise, and what changed.

BASE and HEAD are two git revisions, or two result files of bench.iterations or of bench.kernels. "." is the working tree as it
is. Revisions are checked out side by side under build/compare and kept there; each steps with its own code and its own native
kernels in a process of its own, in turns with the other, and this checkout's clock times both.

  rows      "step", the mean over the tasks, which tells small slowdowns best; each task's training step; each op, forward
            and backward, on the shapes of bench.kernels
  ratio     HEAD's time over BASE's: the median over visits (a step of each side on one batch, in the order ABBA over two
            of them) of every start, and the mean over the starts
  95 %      Student's t over the starts: processes of the same code differ by luck, which pairs within them cannot show
  verdict   slower or faster where an interval that allows for the number of rows excludes 1: equal revisions give such a
            verdict in one comparison of a hundred. Once "step" has one, tasks and ops need less, to say where.
            same: the 95 % interval lies within the gate. Else: too noisy to say
  counters  launches, copies, copied bytes, syncs, allocations, native calls and padded rows of a step that changed

By default a model of the paper's widths with fewer layers (bench/compare/model.yaml) and batches of 4 are stepped: 3
minutes, and 4 GB of memory for both sides. With `--model vilbert_6l_6c` it is the paper's: about 11 GB, and more --minutes.

Exit codes: 0 nothing is slower by more than the gate; 1 something is; 2 bad input, or a side that failed; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import published_run, records
from bench.compare import files
from bench.compare.measure import FEWEST_STARTS, Measured, Plan, measure
from bench.compare.progress import progress_on_stderr
from bench.compare.report import Report
from bench.compare.revisions import WORKTREE, Checkout, Repository
from bench.compare.sides import SideFailed
from bench.compare.verdicts import ALARM, judge
from engine.tasks import load_table
from kernels.names import CHOICES
from pipelines.errors import BadInput
from pipelines.files import write_atomic

MODEL = Path(__file__).resolve().with_name("model.yaml")
CONFIG = Path("configs/runs/twelve_in_one.yaml")
"""Of each side's own checkout."""
_PLAIN_WIDTH = 120
_CLOSING = 0.02
"""Share of the time that is left for what comes after the last round."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    began = time.monotonic()
    arguments = _parser().parse_args(argv)
    try:
        report = run(arguments, began)
        console = Console()
        report.print(console if console.is_terminal else Console(width=_PLAIN_WIDTH))
        _write(arguments, report)
    except (BadInput, SideFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was kept but finished worktrees", file=sys.stderr)
        return 130
    return 1 if report.failing else 0


def parse_gate(text: str) -> float:
    """ "3%" and "0.03" are the same."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: 3%, or 0.03")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("base", metavar="BASE", help="revision, file, or .")
    add("head", metavar="HEAD", help="revision, file, or .")
    add("--fail-above", type=parse_gate, default=0.03, metavar="SHARE",
        help="exit code 1 where a row is slower by more than this, and for sure (3%%)")  # fmt: skip
    add("--minutes", type=float, default=3.0, help="for all of it but the first compilation of kernels (%(default)g)")
    add("--starts", type=int, default=8, help="of both sides, at most; they share the time (%(default)s)")
    add("--model", default=str(MODEL), help="preset of configs/models, or a file (bench/compare/model.yaml)")
    add("--tasks", default="all", help="comma-separated names; all: the twelve")
    add("--ops", default="all", help=f"comma-separated names, all, or none: {', '.join(CHOICES)}")
    add("--batch", type=int, default=4, help="samples a step (%(default)s)")
    add("--threads", type=int, default=1, help="CPU threads of each side (%(default)s): with one, a neighbour on another "
        "core costs little, and waiting for a core that somebody else has is not counted; 2 and more for what is about "
        "threads, on a quiet machine")  # fmt: skip
    add("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of the steps (%(default)s)")
    add("--json", type=Path, metavar="F", help="write rows, samples, counters and provenance")
    add("--markdown", type=Path, metavar="F", help="write what a pull request should show")
    add("--csv", type=Path, metavar="F", default=records.FOLDER / "compare.csv",
        help="append rows, and to the .jsonl beside it (%(default)s)")  # fmt: skip
    add("overrides", nargs="*", metavar="key=value", help="of both sides' runs, as for engine.train: device=cuda, …")
    return parser


def run(arguments: argparse.Namespace, began: float, repository: Repository | None = None) -> Report:
    """The comparison that was asked for. Raises BadInput and SideFailed."""
    are_files = [name not in WORKTREE and Path(name).is_file() for name in (arguments.base, arguments.head)]
    if all(are_files):
        return _of_files(arguments)
    if any(are_files):
        raise BadInput(f"{arguments.base} {arguments.head}", "a file and a revision", "compare two of a kind")
    return _of_revisions(arguments, began, repository or Repository())


def _of_files(arguments: argparse.Namespace) -> Report:
    estimates, conditions, notes = files.estimates(Path(arguments.base), Path(arguments.head))
    rows = judge(estimates, arguments.fail_above)
    return Report(arguments.base, arguments.head, arguments.fail_above, rows, {**_told(arguments), **conditions}, notes)


def _of_revisions(arguments: argparse.Namespace, began: float, repository: Repository) -> Report:
    plan = _plan(arguments)
    base, head = (repository.checkout(name) for name in (arguments.base, arguments.head))
    compiling = _build(repository, base, head)
    spent = time.monotonic() - began - compiling + _CLOSING * plan.seconds
    plan = replace(plan, seconds=plan.seconds - spent, spent_s=spent)
    load = os.getloadavg()[0]
    with progress_on_stderr(plan.seconds) as progress:
        measured = measure(base, head, plan, progress, _say)
    for side in (base, head):
        if side.name in WORKTREE and repository.changes() != side.changes:
            raise BadInput(side.folder, "was edited while it was measured", "measure again, or compare commits")
    rows = judge(measured.estimates(), arguments.fail_above, measured.seconds())
    provenance = {
        **_told(arguments), "harness": repository.describe(), "base": _side(base, measured.conditions[0]),
        "head": _side(head, measured.conditions[1]), "starts": measured.starts, "duration_s": time.monotonic() - began,
        "compiling_s": compiling, "load_average": [load, os.getloadavg()[0]], "losses_differ": measured.losses_differ,
        "ops_without_a_row": measured.missing,
    }  # fmt: skip
    return Report(
        _shown(base), _shown(head), arguments.fail_above, rows, provenance, _notes(measured, provenance),
        measured.counts,
        {"/".join(key): visits for key, visits in measured.visits.items()},
    )  # fmt: skip


def _build(repository: Repository, *sides: Checkout) -> float:
    """Their native kernels, where they may be missing. Returns the seconds that it took."""
    began = time.monotonic()
    for side in dict.fromkeys(sides):
        built = repository.built(side)
        if built is None or not built.exists():
            _say(f"kernels of {side.name}: compiled where they are new, about a minute, apart from --minutes")
            repository.build(side)
    return time.monotonic() - began


def _plan(arguments: argparse.Namespace) -> Plan:
    table = load_table()
    tasks = table.default_tasks() if arguments.tasks == "all" else map(table.row, arguments.tasks.split(","))
    named = {"all": CHOICES, "none": ()}
    ops = named[arguments.ops] if arguments.ops in named else tuple(arguments.ops.split(","))
    for op in ops:
        if op not in CHOICES:
            raise BadInput(f"--ops {op}", "no such op", f"there are {', '.join(CHOICES)}, or none")
    if arguments.batch < 1 or arguments.starts < FEWEST_STARTS:
        raise BadInput("--batch, --starts", f"at least 1 sample, and {FEWEST_STARTS} starts, are needed")
    if not 0 < arguments.minutes < math.inf:
        raise BadInput(f"--minutes {arguments.minutes}", "not a time")
    model = str(Path(arguments.model).resolve()) if arguments.model.endswith((".yaml", ".yml")) else arguments.model
    told = published_run.overrides(model, arguments.precision, arguments.threads)
    return Plan(
        CONFIG, (*told, *arguments.overrides), tuple(row.name for row in tasks), ops, arguments.batch,
        60 * arguments.minutes, arguments.starts,
    )  # fmt: skip


def _told(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "command": shlex.join(sys.argv[1:]),
        "batch": arguments.batch, "model": Path(arguments.model).stem, "alarm": ALARM,
    }  # fmt: skip


def _side(checkout: Checkout, conditions: Mapping[str, str]) -> dict[str, str]:
    """What a side says of itself; git's view of it is ours, whatever its own code makes of a worktree."""
    dirty = str(checkout.commit.endswith("+")).lower()
    return {
        **conditions, "revision": checkout.name, "commit": checkout.commit, "dirty": dirty, "changes": checkout.changes
    }  # fmt: skip


def _shown(checkout: Checkout) -> str:
    """The name as it was asked for, with its commit."""
    return checkout.commit if checkout.name.startswith(checkout.commit) else f"{checkout.name} ({checkout.commit})"


def _notes(measured: Measured, provenance: Mapping[str, Any]) -> list[str]:
    c = provenance["head"]
    visits = sum(map(len, next(iter(measured.visits.values()))))
    notes = [
        f"{provenance['model']}, batch {provenance['batch']}, {measured.starts} starts of each side, {visits} visits a row, "
        f"{provenance['duration_s']:.0f} s; {c.get('device', '')} ({c.get('isa', '')}), {c.get('threads', '')} threads, "
        f"torch {c.get('torch', '')}",
        f"losses of the same batch differ by at most {measured.losses_differ:.2g} of themselves",
    ]
    for name in ("torch", "isa", "threads", "device", "config"):
        sides = [provenance[side].get(name) for side in ("base", "head")]
        if sides[0] != sides[1]:
            notes.append(f"{name}: {sides[0]} on BASE, {sides[1]} on HEAD")
    return notes + [f"no row for {op}: {why}" for op, why in measured.missing.items()]


def _write(arguments: argparse.Namespace, report: Report) -> None:
    written = {arguments.json: json.dumps(report.as_json(), indent=1) + "\n", arguments.markdown: report.markdown()}
    for path, text in written.items():
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text.encode())
    told = report.provenance
    sides = {
        f"{side}_{name}": told[side].get(name, "")
        for side in ("base", "head")
        for name in ("commit", "dirty", "device", "clock", "isa", "threads", "torch", "config")
    }
    conditions = {"time": told["time"], "model": told["model"], "batch": told["batch"], **sides}
    records.append(arguments.csv, [asdict(row) for row in report.rows], conditions)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
