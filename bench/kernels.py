"""`python -m bench.kernels`: every op against what others run in its place, or, with --aot, what its Triton kernels compile to.

Each op runs on the shapes of the tasks, forward, backward and both, in turns with its peers in one process: plain torch,
torch.compile (one shape of each op), SDPA, and FlashAttention, Liger and apex where there is a GPU and they are installed.
Times are medians with their 20 and 80 % quantiles. "share" is how near we are to what this machine does, in this run, with
bandwidth (the better of a copy and an update in place, of the same size class) or matrix products of the same dtype,
whichever takes longer; "× peer" is how many times longer the peer takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench import aot_report, records
from bench.aot import SHARED_LIMIT
from bench.kernel_case import DEFAULT_TASKS, Case, draw
from bench.kernel_cases import cases, depends_on_task
from bench.kernel_measure import Ceilings, Row, Skipped, measure
from bench.kernel_plot import plot
from bench.kernel_report import headline, report
from bench.timing import conditions, cores
from engine.tasks import load_table
from kernels import native_library
from kernels.names import OPS
from pipelines.errors import BadInput

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.aot:
        return aot_report.run(arguments.op, arguments.aot, arguments.jobs, arguments.json)
    try:
        return _measure(arguments)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    tasks = (*load_table().tasks, "guesswhat_306")
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--aot", metavar="ARCH,…", type=_listed(SHARED_LIMIT), help="compile for these GPUs (sm_80,sm_90), measure nothing; "
        "exit code 1 for a spill or a missing tensor-core instruction")  # fmt: skip
    add("--op", metavar="OP,…", type=_listed(OPS), default=list(OPS), help="these ops only: " + ", ".join(OPS))
    add("--dtype", metavar="DTYPE,…", type=_listed(_DTYPES), default=["float32", "bfloat16"], help="default: both")
    add(
        "--tasks",
        metavar="TASK,…",
        type=_listed(tasks),
        default=list(DEFAULT_TASKS),
        help=f"default: {','.join(DEFAULT_TASKS)}",
    )
    add("--batch", type=int, default=16, help="samples of a batch (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--threads", type=int, help=f"CPU threads (default: torch's, {torch.get_num_threads()})")
    add("--seconds", type=float, default=0.5, help="for each case, all its providers together (default: %(default)s)")
    add("--compile-seconds", type=float, default=60, help="most for one torch.compile; 0: none (default: %(default)s)")
    add("--quick", action="store_true", help="one task, small pretraining batches, 0.1 s a case, no torch.compile")
    add("--json", type=Path, metavar="FILE", help="write rows, conditions and headline ratios")
    add(
        "--csv",
        type=Path,
        metavar="FILE",
        default=records.FOLDER / "kernels.csv",
        help="append rows, and to the .jsonl beside it (default: %(default)s)",
    )
    add("--plot", type=Path, metavar="FILE.png", help="draw ratios and shares")
    add("--jobs", type=int, default=cores(), help="with --aot: compilers at a time (default: %(default)s)")
    return parser


def _listed(allowed: Collection[str]) -> Callable[[str], list[str]]:
    """An argument type: names with commas between them."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)} (there are {', '.join(allowed)})")
        return names

    return parse


def _measure(arguments: argparse.Namespace) -> int:
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if device.type == "cpu" and not native_library.available():
        print("there are no native kernels here: the rows called reference are plain torch", file=sys.stderr)
    seconds, compile_seconds = (0.1, 0.0) if arguments.quick else (arguments.seconds, arguments.compile_seconds)
    ceilings = Ceilings(device, min(seconds, 0.2))
    rows: list[Row] = []
    skipped: list[Skipped] = []
    compiled: set[tuple[str, str]] = set()
    for case in _cases(arguments, device):
        kind = (case.op, str(case.dtype))
        found, missing = measure(case, device, seconds, ceilings, 0.0 if kind in compiled else compile_seconds)
        compiled.add(kind)
        rows += found
        skipped += missing
        print(f"{case.op}, {kind[1].removeprefix('torch.')}, {case.task}: {case.shape}", file=sys.stderr)
    return _write(arguments, rows, list(dict.fromkeys(skipped)), conditions(device))


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    settings = [draw(task, arguments.batch) for task in arguments.tasks]
    if arguments.quick:
        settings = [replace(settings[0], captions=32)]
    for op in arguments.op:
        for dtype in arguments.dtype:
            for setting in settings if depends_on_task(op) else settings[:1]:
                yield from cases(op, setting, _DTYPES[dtype], device)


def _write(arguments: argparse.Namespace, rows: list[Row], skipped: list[Skipped], where: dict[str, str]) -> int:
    asked = {
        name: getattr(arguments, name) for name in ("op", "dtype", "tasks", "batch", "threads", "seconds", "quick")
    }
    where = {**where, "config": records.digest(asked)}
    records.append(arguments.csv, [asdict(row) for row in rows], where)
    print(report(rows))
    print("\n" + ", ".join(f"{name} {value}" for name, value in where.items()))
    for reason in dict.fromkeys((s.provider, s.reason) for s in skipped):
        ops = dict.fromkeys(f"{s.op} {s.dtype}" for s in skipped if (s.provider, s.reason) == reason)
        print(f"not measured: {reason[0]} ({reason[1]}): {', '.join(ops)}")
    launched = {f"{row.provider} of {row.op} ({row.mode})" for row in rows if not row.recorded}
    if torch.device(arguments.device).type == "cuda":
        print("times are of recorded calls (CUDA graphs): without the host's launching"
              + (f"; but {', '.join(sorted(launched))}" if launched else ""))  # fmt: skip
    if arguments.json:
        result = {
            "conditions": where,
            "headline": headline(rows),
            "skipped": [asdict(one) for one in skipped],
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        plot(arguments.plot, rows, where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
