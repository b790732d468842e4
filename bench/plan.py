"""`python -m bench.plan`: what a run will need and how fast it will be, before a node is booked.

  python -m bench.plan --gpus 8,64 --gpu h100 --zero 1,2      a projection
  python -m bench.plan --cpu-ranks 1 --check                  a prediction, and what is measured here

Counted: products, bytes, launches and what backward keeps, by running the engine's own step on tensors without memory
(bench/plan_count.py), on batches of real lengths. A batch is examples of a step over all ranks. From a table: what GPUs
have, and how much of it a step gets, each with its source (bench/hardware.yaml). Measured in the same run: the rates of
this CPU. Those numbers are projections, and say so.

Warnings: a rank does not fit, starves for data, waits for other ranks, or gets no examples.
Exit codes: 0 done; 1 a check was off by more than 15 %, or its steps failed; 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from bench import plan_batches, plan_check, plan_hardware, plan_ranks, plan_report, plan_run
from bench.plan_check import Checked
from bench.plan_cost import STAGES, Machine, step
from bench.plan_count import Counted
from bench.plan_gpu import GpuRank
from bench.plan_memory import of_rank
from bench.plan_model import Model
from bench.plan_report import Plan
from bench.timing import conditions
from bench.worker import WorkerFailed
from engine import deepspeed_config
from engine.config import RunConfig, load
from engine.tasks import CONFIGS
from kernels import native_library
from pipelines.errors import BadInput

RUN = CONFIGS / "runs/twelve_in_one.yaml"
PIPELINE = Path(__file__).resolve().parent / "results/pipeline.json"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkerFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=RUN, metavar="RUN.yaml", help="the run (twelve_in_one)")
    parser.add_argument("--gpus", metavar="N,N", help="numbers of GPUs, one rank each")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="row of bench/hardware.yaml (%(default)s)")
    parser.add_argument("--per-node", type=int, default=8, metavar="N", help="GPUs of a node (%(default)s)")
    parser.add_argument("--cpu-ranks", metavar="N,N", help="ranks on this machine's cores, each with its share of them")
    parser.add_argument("--zero", default="1", metavar="N,N", help="ZeRO stages, 0 to 3 (%(default)s)")
    parser.add_argument("--check", action="store_true", help="measure here what is predicted for one rank on this CPU")
    parser.add_argument(
        "--check-run",
        metavar="N,N",
        help="run engine.train with N ranks here for some iterations, and put its journal beside what is predicted",
    )
    parser.add_argument("--json", type=Path, metavar="F", help="write everything here")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="of the run: precision=…, cuda_graphs=true (auto is projected without), …",
    )
    return parser


def _run(arguments: argparse.Namespace) -> int:
    stages = _numbers("--zero", arguments.zero, least=0)
    if not set(stages) <= set(STAGES):
        raise BadInput(f"--zero {arguments.zero}", "no such stage", f"there are {', '.join(map(str, STAGES))}")
    gpus = _numbers("--gpus", arguments.gpus) if arguments.gpus else []
    cpu_ranks = _numbers("--cpu-ranks", arguments.cpu_ranks) if arguments.cpu_ranks else []
    if not (gpus or cpu_ranks or arguments.check or arguments.check_run):
        raise BadInput("--gpus, --cpu-ranks", "there is nothing to plan for", "--gpus 8 --gpu h100, or --cpu-ranks 1")
    if arguments.per_node < 1:
        raise BadInput("--per-node", f"{arguments.per_node}, at least 1 is needed")
    run = load(arguments.config, arguments.overrides)
    console = Console(width=None if sys.stdout.isatty() else 160)
    found = _projections(run, arguments, gpus, stages) if gpus else []
    for n in cpu_ranks:
        samples = plan_ranks.measure(run, n, isa(), stages, _say)
        rank = plan_ranks.fitted(run, n, isa(), samples, pipeline_rate())
        found += plans(run, rank, [n], stages, plan_ranks.PROCESS, isa())
    for plan, about in found:
        console.print(plan_report.render(plan, about))
    checked = _checked(run, arguments)
    if checked:
        console.print(plan_check.table(checked))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "conditions": conditions(torch.device("cpu")),
            "load_average": os.getloadavg(),
            "config": os.path.relpath(arguments.config),
            "overrides": arguments.overrides,
            "plans": [plan.as_json() for plan, _ in found],
            "checks": [of.as_json() for of in checked],
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(checked) and plan_check.off(checked) > plan_check.TOLERANCE)


def _checked(run: RunConfig, arguments: argparse.Namespace) -> list[Checked]:
    found: list[Checked] = []
    if arguments.check:
        found += plan_check.one_rank(arguments.config, arguments.overrides, isa(), _say)
    for n in _numbers("--check-run", arguments.check_run) if arguments.check_run else []:
        found += _checked_run(run, arguments, n)
    return found


def _checked_run(run: RunConfig, arguments: argparse.Namespace, n: int) -> list[Checked]:
    """Rates before the run and after it: whatever else the machine does falls on both."""
    stage = deepspeed_config.stage_of(run.deepspeed or deepspeed_config.read("zero1")) if n > 1 else 0
    before = plan_ranks.measure(run, n, isa(), [stage], _say)
    _say(f"a run of engine.train with {n} rank{'s' * (n > 1)}, a minute or more")
    measured = plan_run.measure(arguments.config, arguments.overrides, n)
    after = plan_ranks.measure(run, n, isa(), [stage], _say)
    rank = plan_ranks.fitted(run, n, isa(), before.also(after), pipeline_rate(), of=min)
    ((plan, _),) = plans(run, rank, [n], [stage], isa=isa())
    name = f"engine.train, {n} rank{'s' * (n > 1)}"
    return [Checked(name, step.task, step.computing, measured[step.task]) for step in plan.steps]


def _numbers(where: str, text: str, least: int = 1) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [least - 1]
    if min(numbers) < least:
        raise BadInput(f"{where} {text}", f"whole numbers from {least} on are needed, with commas between them")
    return numbers


def _projections(
    run: RunConfig, arguments: argparse.Namespace, gpus: Sequence[int], stages: Sequence[int]
) -> list[tuple[Plan, str]]:
    """One for each number of GPUs and stage."""
    hardware = plan_hardware.load()
    if run.precision != "bfloat16":
        raise BadInput("precision", f"{run.precision}, but the table of GPUs is for bfloat16", "precision=bfloat16")
    rank = GpuRank(hardware.gpu(arguments.gpu), hardware.efficiencies, arguments.per_node, pipeline_rate())
    return plans(run, rank, gpus, stages, hardware.efficiencies.context.value)


def plans(
    run: RunConfig, machine: Machine, ranks: Sequence[int], stages: Sequence[int], context: float = 0.0, isa: str = ""
) -> list[tuple[Plan, str]]:
    """(plan, where its batches are from) for each number of ranks and stage."""
    source = plan_batches.source(run)
    model = Model(run.model, dict(source.heads), plan_batches.DTYPES[run.precision], isa)
    base = plan_batches.layout_of(run, model)
    hardware = plan_hardware.load()
    base = replace(base, bucket=hardware.efficiencies.bucket.value)
    found = []
    for n in ranks:
        counted: list[Counted] = []
        for row in source.rows:
            counted.append(model.count(source.draw(row, -(-row.batch // n), n), row.head, run.share_prefixes))
        for stage in stages if n > 1 else stages[:1]:
            layout = replace(base, ranks=n, stage=stage if n > 1 else 0)
            steps = tuple(
                step(machine, layout, row.name, row.head, row.batch, -(-row.batch // n), of)
                for row, of in zip(source.rows, counted, strict=True)
            )
            memory = of_rank(layout, counted, context)
            capacity = pipeline_rate() * run.data_threads
            found.append(
                (Plan(machine, layout, steps, memory, run.max_iterations, capacity, hardware.limits), source.said)
            )
    return found


def pipeline_rate(path: Path = PIPELINE) -> float:
    """Images/s that one thread fills batches with, as `bench.pipeline` measured it. BadInput where it has not."""
    try:
        return float(json.loads(path.read_text())["images_per_s"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(path, f"no result: {error!r}", f"python -m bench.pipeline --json {path}") from None


def isa() -> str:
    """Of the native kernels here; empty without them."""
    return native_library.isa() if native_library.available() else ""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
