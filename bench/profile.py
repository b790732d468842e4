"""`python -m bench.profile`: where one step of a task spends its time, and what to turn to make it shorter.

Steps run in turns: one as it is, one that is looked into. Time is told by phase (waiting for data, host to device, forward,
loss, backward, reduce, optimizer), by block and by op, with calls, launches, bytes, FLOPs, and the share of the ceiling that
each op reaches; ceilings are measured in the same run. The verdict names what the step waits for, and the knob to turn.

Batches are synthetic, of real lengths, one a task; with --config they are a run's own, made by its own reader while steps run,
and waiting for them is told too. Under torchrun each rank profiles itself; rank 0 writes and prints.

--against compares with an earlier --json: the op whose time or counters changed most is named.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench import lengths
from bench.iterations import PRECISIONS, run_of
from bench.profile_account import run
from bench.profile_against import Earlier, compare
from bench.profile_report import Report, as_json, ceilings_text
from bench.profile_roofs import Roofs
from bench.profile_subject import Subject, Visit, own, synthetic
from bench.profile_trace import busy, memory, trace
from bench.provider import Setting
from bench.timing import conditions
from engine import assembly
from engine.config import load
from engine.ranks import Ranks, finish, join, leave
from engine.tasks import load_table
from pipelines.errors import BadInput
from pipelines.files import write_atomic
from pipelines.progress import progress_on_stderr


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (0 done, 2 bad input)."""
    arguments = _parser().parse_args(argv)
    try:
        earlier = Earlier.read(arguments.against) if arguments.against else None
        _check(arguments)
        with ExitStack() as stack:
            stack.callback(leave)
            ranks, subject = _own(arguments, stack) if arguments.config else (Ranks(), _synthetic(arguments))
            if earlier is not None:
                for row in subject.rows:
                    earlier.of(row.name)
            _profile(arguments, subject, ranks, earlier)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tasks", metavar="TASK,…", help="default: vqa; with --config the run's own")
    add("--model", default="vilbert_6l_6c", help="preset of configs/models, or a file (%(default)s)")
    add("--batch", type=int, default=16, help="samples a step (%(default)s); retrieval's have 4 pairs each")
    add("--precision", choices=PRECISIONS, default="bf16", help="default: %(default)s")
    add("--threads", type=int, help="CPU threads (torch's choice)")
    add("--rounds", type=int, default=12, help="of two steps a task, after three that do not count (%(default)s)")
    add("--config", type=Path, metavar="RUN.yaml", help="a run's model, precision and batches instead of the above")
    add("--trace", type=Path, metavar="DIR", help="write rank<r>_trace.json.gz for ui.perfetto.dev here")
    add("--trace-iterations", type=int, default=3, metavar="N", help="how many the trace holds (%(default)s)")
    add("--memory", type=Path, metavar="FILE", help="write where memory is held: on a GPU a snapshot, else JSON")
    add("--json", type=Path, metavar="F", help="write phases, ops, verdict and conditions here")
    add("--plot", type=Path, metavar="F.png", help="draw the roofline here, every op on it")
    add("--against", type=Path, metavar="F.json", help="name what changed since that --json")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="of the run, as for engine.train: device=cuda, kernels=torch, …",
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    for name in ("batch", "rounds", "trace_iterations"):
        if getattr(arguments, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')}", "at least 1 is needed")


def _synthetic(arguments: argparse.Namespace) -> Subject:
    """The published run with the model, precision and threads that were asked for."""
    config = run_of(arguments)
    rows = [load_table().row(name) for name in (arguments.tasks or "vqa").split(",")]
    known = lengths.load()
    for row in rows:
        if row.name not in known:
            raise BadInput(f"--tasks {row.name}", "its lengths are not known", f"there are {', '.join(known)}")
    return synthetic(Setting(config, arguments.batch, assembly.device_of(config)), rows, _say)


def _own(arguments: argparse.Namespace, stack: ExitStack) -> tuple[Ranks, Subject]:
    """A run's own parts; under a launcher, this rank's."""
    overrides = [*arguments.overrides, *([f"threads={arguments.threads}"] if arguments.threads else [])]
    config = load(arguments.config, [*overrides, *([f"tasks=[{arguments.tasks}]"] if arguments.tasks else [])])
    ranks = join(config.ranks.timeout_s, config.device if config.device != "auto" else assembly.device_of(config).type)
    parts = assembly.assemble(config, _say if ranks.first else lambda line: None, ranks)
    return ranks, stack.enter_context(own(parts))


def _profile(arguments: argparse.Namespace, subject: Subject, ranks: Ranks, earlier: Earlier | None) -> None:
    load_before = os.getloadavg()[0]
    with progress_on_stderr() as show:
        taken = run(subject, arguments.rounds, show if ranks.first else lambda *_: None)
    for one in taken:
        one.busy = busy(subject, Visit(one.row, subject.source.turn(0), "counted"))
    said = []
    if arguments.trace:
        said.append(f"trace: {trace(subject, arguments.trace_iterations, arguments.trace, ranks.rank)}")
    if arguments.memory and ranks.first:
        said.append(f"memory: {memory(subject, arguments.memory)}")
    if not ranks.first:
        return
    _say("measuring ceilings")
    roofs = Roofs(subject.device, getattr(torch, subject.run.precision))
    graphs = subject.stepper.graphs is not None
    reports = {one.row.name: Report.of(one, roofs, subject.device, graphs, subject.source.waits) for one in taken}
    about = _conditions(arguments, subject, ranks, load_before)
    _write(arguments, reports, roofs, about)
    print(
        "\n\n".join(
            [*(report.text(name) for name, report in reports.items()), ceilings_text(roofs), _where(about), *said]
        )
    )
    if earlier is not None:
        print("\n" + _against(reports, earlier, about))


def _conditions(arguments: argparse.Namespace, subject: Subject, ranks: Ranks, load_before: float) -> dict[str, Any]:
    config = subject.run
    return {
        **conditions(subject.device), "model": str(arguments.config or arguments.model), "precision": config.precision,
        "batch": "the run's" if arguments.config else arguments.batch,
        "batches": "the run's own" if arguments.config else f"synthetic, real lengths ({lengths.FILE.name})",
        "ranks": ranks.world_size, "rounds": arguments.rounds, "seed": config.seed, "overrides": arguments.overrides,
        "load_average": [load_before, os.getloadavg()[0]],
    }  # fmt: skip


def _write(arguments: argparse.Namespace, reports: dict[str, Report], roofs: Roofs, about: dict[str, Any]) -> None:
    if arguments.plot:
        from bench.profile_plot import plot

        plot(arguments.plot, reports, roofs, about)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(as_json(reports, roofs, about), indent=1, ensure_ascii=False)
        write_atomic(arguments.json, content.encode() + b"\n")


def _against(reports: dict[str, Report], earlier: Earlier, about: dict[str, Any]) -> str:
    lines = [f"against {earlier.path}, commit {earlier.conditions.get('commit', 'unknown')}"]
    lines += [f"not the same: {one}" for one in earlier.differences(about)]
    texts = [compare(earlier.of(name), report.lines).text(name) for name, report in reports.items()]
    return "\n\n".join(["\n".join(lines), *texts])


def _where(c: dict[str, Any]) -> str:
    return (
        f"{c['model']}, batch {c['batch']}, {c['precision']}; batches {c['batches']}; {c['device']} ({c['isa']}), "
        f"{c['threads']} threads, load {c['load_average'][0]:.1f} to {c['load_average'][1]:.1f}, torch {c['torch']}, "
        f"commit {c['commit']}"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    finish(main())
