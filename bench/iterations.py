"""`python -m bench.iterations`: training steps per second, against what others would run, task by task.

Three providers train the same full-size model on the same synthetic samples of real lengths (bench/lengths.json):

  ours     engine.step.train_step on packed rows, as a run does it
  authors  the published recipe as its code runs it: padded, float32, every head evaluated, AdamW tensor by tensor
  stock    the same padded model under bfloat16 autocast with torch's fused AdamW
  stock_graphs  on a GPU: the same, its steps recorded as CUDA graphs (padded shapes never change)

On a GPU ours records its steps too (cuda_graphs=false: not). Each has a process of its own, and only one runs at a time:
ours, authors, stock, ours, … A step is forward, loss, backward and update; reading data is not in it. Every round has another
batch, the same for all; after a few warm-up steps each, medians over the rounds count.

With --config, a run's own batches instead (made by its own readers), without peers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import comparison_report, lengths, published_run, records, run_batches
from bench.comparison import TaskResult, compare, duration
from bench.estimate import OURS, START_S, Estimate, gemm_rates
from bench.memory import total_bytes
from bench.provider import Setting
from bench.timing import conditions
from bench.worker import PROVIDERS, WorkerFailed
from engine import assembly
from engine.config import RunConfig, load
from engine.tasks import TaskRow, load_table
from pipelines.errors import BadInput
from pipelines.files import write_atomic

PRECISIONS = {"bf16": "bfloat16", "float32": "float32"}
PEERS = [name for name in PROVIDERS if name != OURS]
ON_A_GPU = "stock_graphs"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (0 done, 1 a provider failed, 2 bad input)."""
    arguments = _parser().parse_args(argv)
    try:
        result = _own_batches(arguments) if arguments.config else _comparison(arguments)
        form = run_batches if arguments.config else comparison_report
        print(form.table(result))
        conditions_of_rows = {
            name: value for name, value in result["conditions"].items() if isinstance(value, str | int)
        }
        records.append(arguments.csv, form.rows(result), conditions_of_rows)
        if arguments.json:
            _write(arguments.json, result)
        if arguments.plot:
            arguments.plot.parent.mkdir(parents=True, exist_ok=True)
            comparison_report.plot(result, arguments.plot)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (WorkerFailed, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.iterations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vilbert_6l_6c", help="preset of configs/models, or a file (%(default)s)")
    parser.add_argument("--tasks", default="all", help="comma-separated names; all: the twelve")
    parser.add_argument(
        "--batch", type=int, default=4, help="samples a step (%(default)s); retrieval's have 4 pairs each"
    )
    parser.add_argument(
        "--against",
        default="all",
        help=f"comma-separated peers, or none (all: {', '.join(PEERS)}; the last on a GPU)",
        metavar="PEERS",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each provider and task (%(default)s)")
    parser.add_argument(
        "--same-batch",
        action="store_true",
        help="one batch for all rounds: steps without the price of shapes not seen yet",
    )
    parser.add_argument("--threads", type=int, help="CPU threads of each provider (torch's choice)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="bf16", help="of ours (%(default)s); peers have their own"
    )
    parser.add_argument("--config", type=Path, metavar="RUN.yaml", help="measure this run's own batches, without peers")
    parser.add_argument("--json", type=Path, metavar="F", help="write all that was measured here, after every task")
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="F.csv",
        default=records.FOLDER / "iterations.csv",
        help="append rows, and to the .jsonl beside it (%(default)s)",
    )
    parser.add_argument("--plot", type=Path, metavar="F.png", help="draw the ratios here")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="of the run, as for engine.train: device=cuda, kernels=torch, …",
    )
    return parser


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())


def _own_batches(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.plot:
        raise BadInput("--plot", "there are no ratios to draw with --config")
    overrides = [*arguments.overrides, *([f"threads={arguments.threads}"] if arguments.threads else [])]
    run = load(arguments.config, overrides)
    parts = assembly.assemble(run)
    around = {**conditions(parts.device), "model": str(arguments.config), "rounds": arguments.rounds}
    around["config"] = records.digest(run.model_dump(mode="json"))
    return {**run_batches.measure(parts, arguments.rounds), "conditions": around}


def _comparison(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = _rows(arguments.tasks)
    if arguments.batch < 1 or arguments.rounds < 1:
        raise BadInput("--batch, --rounds", "at least 1 of each is needed")
    run = run_of(arguments)
    setting = Setting(run, arguments.batch, assembly.device_of(run))
    peers = _peers(arguments.against, setting.device)
    if arguments.plot and not peers:
        raise BadInput("--plot", "there are no ratios to draw without peers")
    rates = gemm_rates(setting.device)
    estimate = Estimate(run.model, getattr(torch, run.precision), arguments.batch, rates, lengths.load())
    providers = [OURS, *peers]
    expected = sum(estimate.task_s(row, providers, arguments.rounds) for row in rows) + START_S * len(providers)
    _say(
        f"{len(rows)} tasks, {arguments.rounds} rounds of {', '.join(providers)}, batch {arguments.batch}: "
        f"about {duration(expected)}"
    )
    around, started, load_before = conditions(setting.device), time.perf_counter(), os.getloadavg()[0]
    turns = [0] * arguments.rounds if arguments.same_batch else range(1, 1 + arguments.rounds)

    def keep(results: list[TaskResult]) -> None:
        if arguments.json:
            _write(arguments.json, comparison_report.as_json(results, {}, around))

    results, described = compare(setting, rows, peers, turns, estimate, _say, keep)
    about = {
        **around,
        "model": arguments.model,
        "batch": arguments.batch,
        "precision": run.precision,
        "seed": run.seed,
        "rounds": arguments.rounds,
        "same_batch": arguments.same_batch,
        "duration_s": time.perf_counter() - started,
        "load_average": [load_before, os.getloadavg()[0]],
        "memory_bytes": total_bytes(),
        "gemm_gflops": {str(dtype).removeprefix("torch."): rate / 1e9 for dtype, rate in rates.items()},
        "overrides": arguments.overrides,
        "config": records.digest(run.model_dump(mode="json")),
    }
    return comparison_report.as_json(results, described, about)


def _rows(names: str) -> list[TaskRow]:
    table = load_table()
    return list(table.default_tasks()) if names == "all" else [table.row(name) for name in names.split(",")]


def _peers(names: str, device: torch.device) -> list[str]:
    if names == "all":
        return [name for name in PEERS if device.type == "cuda" or name != ON_A_GPU]
    peers = [] if names == "none" else names.split(",")
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise BadInput(f"--against {unknown[0]}", "no such peer", f"there are {', '.join(PEERS)}, or none")
    if ON_A_GPU in peers and device.type != "cuda":
        raise BadInput(f"--against {ON_A_GPU}", f"CUDA graphs on {device}", "--against stock")
    return peers


def run_of(arguments: argparse.Namespace) -> RunConfig:
    """The published run, with the model, precision and threads that were asked for."""
    told = published_run.overrides(arguments.model, PRECISIONS[arguments.precision], arguments.threads)
    return load(published_run.RUN, [*told, *arguments.overrides])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
