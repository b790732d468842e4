"""`python -m bench.kernels --aot`: what the compiler made of every Triton kernel, and how many bytes the kernels move."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.aot import Compiled, check, sources
from bench.kernel_report import table
from bench.timing import version
from bench.traffic import Counted, count_all, within


def run(ops: Sequence[str], archs: Sequence[str], jobs: int, json_path: Path | None) -> int:
    """Prints two tables; 1 where a kernel spills, lacks tensor-core instructions or cannot be compiled or run, else 0."""
    compiled = check([f"kernels.{op}" for op in ops], archs, jobs, _Progress())
    print(variants_table(compiled), flush=True)
    traffic = count_all(ops, jobs, lambda op: print(f"counted the bytes of {op}", file=sys.stderr))
    counted = [case for cases in traffic.values() if not isinstance(cases, str) for case in cases]
    failed = {op: why for op, why in traffic.items() if isinstance(why, str)}
    print("\n" + traffic_table(counted))
    for op, why in failed.items():
        print(f"{op}: its bytes cannot be counted: {why}")
    faulty = [row for row in compiled if row.faults]
    print(f"\n{len(compiled)} kernels compiled for {', '.join(archs)} by Triton {version('triton')}: {_faults(faulty)}")
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "triton": version("triton"),
            "sources": sources(),
            "variants": [asdict(row) | {"verdict": row.verdict} for row in compiled],
            "traffic": [_traffic_json(case) for case in counted],
            "not_counted": failed,
        }
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if faulty or failed else 0


def variants_table(compiled: Sequence[Compiled]) -> str:
    headers = (
        "kernel", "dtype", "for", "registers", "LDL", "STL", "stack", "shared", "tensor core", "async copies", "verdict",
    )  # fmt: skip
    return table(
        headers,
        [
            (
                f"{row.op}: {row.name}", row.dtype, row.arch, f"{row.registers}", f"{row.spill_loads}",
                f"{row.spill_stores}", f"{row.stack}", f"{row.shared:,}", f"{row.tensor_core}", f"{row.copies}", row.verdict,
            )
            for row in compiled
        ],
    )  # fmt: skip


def traffic_table(counted: Sequence[Counted]) -> str:
    """Both passes. The limits are for issued bytes; where a matrix product is inside, for distinct ones."""
    headers = ("case", "launches", "atomics", "issued/least", "distinct/least", "goal", "floor", "verdict")
    return table(headers, [_traffic_line(case) for case in counted])


def _traffic_line(case: Counted) -> tuple[str, ...]:
    both = case.both
    limits, verdict = within(case)
    return (
        f"{case.op}: {case.shape}", f"{case.forward.launches} + {case.backward.launches}", f"{both.atomics}",
        f"{both.issued / case.least:.2f}", f"{both.distinct / case.least:.2f}",
        *((f"{limit:.1f}" for limit in limits) if limits else ("", "")), verdict,
    )  # fmt: skip


def _traffic_json(case: Counted) -> dict:
    """The case with its ratios and verdict."""
    both = case.both
    ratios = {"issued_over_least": both.issued / case.least, "distinct_over_least": both.distinct / case.least}
    return asdict(case) | {name: round(value, 4) for name, value in ratios.items()} | {"verdict": within(case)[1]}


def _faults(faulty: Sequence[Compiled]) -> str:
    if not faulty:
        return "no spills, tensor cores wherever there is a product"
    return f"{len(faulty)} at fault"


class _Progress:
    """A line on stderr every 20 kernels, with the time left."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        if done == total or done % 20 == 0:
            left = (time.perf_counter() - self._started) * (total - done) / done
            print(f"compiled {done} of {total}, {left:.0f} s left", file=sys.stderr)
