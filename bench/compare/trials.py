"""`python -m bench.compare.trials`: is what bench.compare says true? Equal revisions, and one with a slowdown planted in it.

A trial of equal code compares a revision with itself; every row that it calls slower or faster is a false alarm. A planted one
compares it with the same revision whose one op waits, busily, before each call: so long that a step takes the share of
--planted-share more, in the mean over the tasks. The plant is a commit that no branch knows.

Trials of both kinds take turns, three minutes each. The file is written after every trial; an interrupted series counts what
it has.

    python -m bench.compare.trials --equal 20 --planted 10 --json bench/results/compare.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import Any

from bench.compare.__main__ import _parser as compare_parser
from bench.compare.__main__ import parse_gate, run
from bench.compare.report import Report
from bench.compare.revisions import Repository
from bench.compare.sides import SideFailed
from bench.compare.verdicts import FASTER, SLOWER, STEP
from pipelines.errors import BadInput
from pipelines.files import write_atomic

OP = "bias_dropout_residual_layernorm"
"""After every projection of every layer: in each task's step, many times."""
_WAIT = """

# Planted by bench.compare.trials.
import time as _time

_planted = {op}_forward


def {op}_forward(*arguments, **named):  # type: ignore[no-redef]
    until = _time.perf_counter() + {seconds!r}
    while _time.perf_counter() < until:
        pass
    return _planted(*arguments, **named)
"""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (0 done, 2 bad input, 130 Ctrl-C)."""
    arguments = _parser().parse_args(argv)
    try:
        _series(arguments)
    except (BadInput, SideFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished trials are kept", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare.trials", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--equal", type=int, default=20, help="trials of equal code (%(default)s)")
    parser.add_argument("--planted", type=int, default=10, help="trials with a plant (%(default)s)")
    parser.add_argument("--planted-share", type=parse_gate, default=0.05, metavar="SHARE", help="of a step (5%%)")
    parser.add_argument("--revision", default="HEAD", help="what is compared (%(default)s)")
    parser.add_argument("--json", type=Path, required=True, metavar="F", help="write results here, after every trial")
    parser.add_argument("arguments", nargs="*", help="after --: for bench.compare, such as --minutes 3")
    return parser


def _series(arguments: argparse.Namespace) -> None:
    repository = Repository()
    base = repository.resolve(arguments.revision)
    kinds = zip_longest(["equal"] * arguments.equal, ["planted"] * arguments.planted)
    order = [kind for pair in kinds for kind in pair if kind]
    trials: list[dict[str, Any]] = []
    report, planted = None, ""
    for number, kind in enumerate(order, 1):
        if kind == "planted" and not planted:
            # How long a step and how often the op is called, without the plant.
            report = report or _compare(base, base, [*arguments.arguments, "--minutes", "1.5"], repository)
            planted = plant(repository, base, OP, wait_of(report, OP, arguments.planted_share))
        report = _compare(base, planted if kind == "planted" else base, arguments.arguments, repository)
        trials.append(_trial(kind, report))
        print(f"[{number}/{len(order)}] {kind}: {trials[-1]['said']}", file=sys.stderr, flush=True)
        result = _result(trials, arguments.planted_share, report)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(arguments.json, (json.dumps(result, indent=1) + "\n").encode())


def _compare(base: str, head: str, options: list[str], repository: Repository) -> Report:
    return run(compare_parser().parse_args([base, head, *options]), time.monotonic(), repository)


def _trial(kind: str, report: Report) -> dict[str, Any]:
    step = next(row for row in report.rows if row.kind == STEP)
    told = [row for row in report.rows if row.verdict in (SLOWER, FASTER)]
    return {
        "kind": kind, "ratio": step.ratio, "low": step.low, "high": step.high, "verdict": step.verdict,
        "said": report.headline, "told": {row.name: [row.verdict, row.ratio, row.low, row.high] for row in told},
        "fails": [row.name for row in report.failing], "duration_s": report.provenance["duration_s"],
        "load_average": report.provenance["load_average"], "time": report.provenance["time"],
        "rows": {row.name: [row.ratio, row.low, row.high] for row in report.rows},
    }  # fmt: skip


def _result(trials: list[dict[str, Any]], share: float, report: Report) -> dict[str, Any]:
    equal = [trial for trial in trials if trial["kind"] == "equal"]
    planted = [trial for trial in trials if trial["kind"] == "planted"]
    return {
        "equal": len(equal),
        "equal_with_a_false_alarm": sum(bool(trial["told"]) for trial in equal),
        "equal_that_failed": sum(bool(trial["fails"]) for trial in equal),
        "planted": len(planted),
        "planted_share": share,
        "planted_caught": sum(STEP in trial["fails"] for trial in planted),
        "planted_op_named": sum(OP in trial["fails"] for trial in planted),
        "longest_s": max(trial["duration_s"] for trial in trials),
        "trials": trials,
        "conditions": {name: report.provenance[name] for name in ("model", "batch", "alarm", "harness", "base")},
    }


def wait_of(report: Report, op: str, share: float) -> float:
    """Seconds for each call of the op, by which a step takes `share` more, in the mean over the tasks.

    From what BASE took and from its calls in a step's counts. BadInput where the op was not counted.
    """
    calls = {task: base["ops"].get(f"stopgo_{op}_forward", 0) for task, (base, _) in report.counts.items()}
    rates = [calls[row.name] / row.base_s for row in report.rows if row.base_s and row.name in calls]
    if not any(rates):
        raise BadInput(
            op, "was not called in a step, so there is nothing to plant into", "are the native kernels there?"
        )
    return share / mean(rates)


def plant(repository: Repository, base: str, op: str, seconds: float) -> str:
    """A commit on top of `base` in which every forward of the op takes so much longer; no branch, no file is touched."""
    path = f"kernels/{op}.py"
    with tempfile.TemporaryDirectory() as scratch:
        # Our own index: the checkout's stays as it is.
        environment = {**os.environ, "GIT_INDEX_FILE": f"{scratch}/index"}
        environment |= {f"GIT_{who}_{what}": "bench" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

        def git(*arguments: str, text: str | None = None) -> str:
            done = subprocess.run(
                ["git", *arguments], cwd=repository.root, env=environment, input=text, capture_output=True, text=True,
                check=True,
            )  # fmt: skip
            return done.stdout

        source = git("show", f"{base}:{path}") + _WAIT.format(op=op, seconds=seconds)
        git("read-tree", base)
        blob = git("hash-object", "-w", "--stdin", text=source).strip()
        git("update-index", "--cacheinfo", f"100644,{blob},{path}")
        tree = git("write-tree").strip()
        return git("commit-tree", tree, "-p", base, "-m", f"{op} waits {seconds:.2e} s").strip()


if __name__ == "__main__":
    sys.exit(main())
