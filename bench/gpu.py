"""`python -m bench.gpu`, `make gpu`: everything that only a GPU can show, in one go.

  tests       every kernel test, its tensors on the GPU
  steps       recorded training steps against steps run as usual
  kernels     each op against torch, torch.compile, SDPA, and FlashAttention, Liger and apex where installed
  iterations  training steps per second against the authors' recipe and the best stock one
  graphs      steps with and without CUDA graphs: times, launches, copies, waits of the host

Results go to bench/results/gpu, one JSON file each and summary.json over all. What fails does not stop the rest.
Exit codes: 0 all passed; 1 something failed; 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.timing import conditions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results/gpu"


@dataclass(frozen=True)
class Part:
    """One command, and what is left of it."""

    name: str
    command: Sequence[str]
    result: Path
    """The JSON file that it writes, or that `finish` makes of what it wrote."""
    environment: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[Path], None] = lambda result: None


def parts(folder: Path, batch: int) -> list[Part]:
    """All of them, in order."""
    python = (sys.executable, "-m")

    def tests(name: str, paths: str, environment: Mapping[str, str]) -> Part:
        result = folder / f"{name}.json"
        command = (*python, "pytest", "-q", paths, "--junitxml", str(_report(result)))
        return Part(name, command, result, environment, summarise_tests)

    def bench(name: str) -> Part:
        result = folder / f"{name}.json"
        return Part(name, (*python, f"bench.{name}", "--batch", str(batch), "--json", str(result)), result)

    return [
        tests("tests", "tests/kernels", {"STOPGO_TEST_DEVICE": "cuda"}),
        tests("steps", "tests/engine/test_graphs.py", {}),
        *map(bench, ("kernels", "iterations", "graphs")),
    ]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: bench/results/gpu)")
    parser.add_argument("--batch", type=int, default=16, help="samples a step (%(default)s: one of eight GPUs)")
    names = [part.name for part in parts(RESULTS, 1)]
    parser.add_argument("--only", choices=names, action="append", help="this part alone; may be repeated")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"error: bench.gpu needs a GPU, and torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    chosen = [part for part in parts(arguments.out, arguments.batch) if part.name in (arguments.only or names)]
    return run(chosen, arguments.out, conditions(torch.device("cuda")))


def run(chosen: Sequence[Part], folder: Path, about: Mapping[str, str]) -> int:
    """Each part, then a summary; the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"conditions": dict(about), "parts": {}}
    for part in chosen:
        print(f"\n{part.name}: {' '.join(part.command)}", flush=True)
        part.result.unlink(missing_ok=True)  # never take an older run's result for this one's
        started = time.perf_counter()
        code = subprocess.run(part.command, cwd=ROOT, env=os.environ | dict(part.environment), check=False).returncode
        part.finish(part.result)
        passed = code == 0 and part.result.is_file()
        summary["parts"][part.name] = {
            "passed": passed,
            "exit_code": code,
            "seconds": time.perf_counter() - started,
            "result": part.result.name if part.result.is_file() else None,
        }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    failed = [name for name, found in summary["parts"].items() if not found["passed"]]
    print(
        f"\n{len(chosen) - len(failed)} of {len(chosen)} parts passed"
        + (f"; failed: {', '.join(failed)}" * bool(failed))
    )
    return 1 if failed else 0


def summarise_tests(result: Path) -> None:
    """pytest's report as JSON: counts, and the names of what failed. Nothing where pytest wrote none."""
    report = _report(result)
    if not report.is_file():
        return
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    report.unlink()
    outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in cases:
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[outcome].append(f"{case.get('classname')}.{case.get('name')}")
    counts: dict[str, Any] = {outcome: len(names) for outcome, names in outcomes.items()}
    result.write_text(json.dumps(counts | {"failures": outcomes["failed"]}, indent=1) + "\n")


def _report(result: Path) -> Path:
    return result.with_suffix(".xml")


if __name__ == "__main__":
    sys.exit(main())
