"""`python -m bench.hooks`: what DeepSpeed costs the host in a step, for our flat parameters and for the published 559.

Two CPU ranks, started by the command itself. At each ZeRO stage both layouts are DeepSpeed engines of one process, stepped in
turns with the JSON that a run would give; the gradients are those of the trunk and one head, the optimizer does nothing.
Beside them the same modules without DeepSpeed. The model has the full number of tensors and small widths, since hooks cost
by tensor; --full takes the real widths. Stage 3 takes the flat model for one leaf, as the engine does, and the published one
module by module, its vectors resident, as others run it.

Times are those of the main thread on a core, so that neither the other rank nor neighbours count; the JSON has the wall's, too.
"in hooks" is the time within the hooks themselves; "beyond plain" is the median step less that of the same module without
DeepSpeed; "a tensor" is what the published layout has more of it, over the gradients that it has more. Reads and collectives
are counted as bench/host_counts.py says, in a step of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.hook_layouts import LAYOUTS, NARROW, Layout, Standing
from bench.hook_watch import Clocks, HookWatch
from bench.host_counts import HostCounts
from bench.timing import conditions, version
from engine import deepspeed_config
from engine.model.config import ModelConfig
from engine.ranks import finish, join, leave
from pipelines.errors import BadInput
from pipelines.files import write_atomic

WARMING = 3
"""Steps before any that count: stage 3 records its trace in two."""


class _Nothing(torch.optim.Optimizer):
    """An optimizer whose step is free, so that what is left is DeepSpeed's."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""


class _Case:
    """One layout at one stage; `step` is a whole training step of it."""

    def __init__(self, layout: Layout, stage: int, dtype: torch.dtype, world_size: int, deepspeed: Any) -> None:
        self.layout, self.plain = layout, Standing(layout, dtype)
        module = Standing(layout, dtype)
        settings: dict[str, Any] = {"zero_optimization": {"stage": stage}}
        if stage == 3 and layout.one_leaf:
            deepspeed.utils.set_z3_leaf_module(module, True)
        elif stage == 3:
            vectors = [shape for shapes in layout.shapes.values() for shape in shapes.values() if len(shape) == 1]
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 1 + max(shape[0] for shape in vectors)
        config = deepspeed_config.merged(settings, precision="bfloat16", clip=0.0, world_size=world_size)
        self.watch = HookWatch()
        with self.watch:
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=_Nothing(module.parameters()), config=config, dist_init_required=False
            )

    def step(self) -> None:
        """Forward, backward, update under DeepSpeed."""
        with self.watch:
            self._engine.set_gradient_accumulation_boundary(True)
            self._engine.backward(self._engine(_anchor()))
            self._engine.step()

    def plain_step(self) -> None:
        """The same without."""
        self.plain(_anchor()).backward()
        for parameter in self.plain.parameters():
            parameter.grad = None


def _anchor() -> Tensor:
    return torch.ones((), requires_grad=True)


def measure(config: ModelConfig, names: Sequence[str], stages: Sequence[int], steps: int) -> dict[str, dict[str, Any]]:
    """By stage and layout, what one rank counts and times. All ranks must call it."""
    import deepspeed

    found: dict[str, dict[str, Any]] = {}
    for stage in stages:
        layouts = {name: LAYOUTS[name](config) for name in names}
        world_size = torch.distributed.get_world_size()
        cases = {name: _Case(layout, stage, torch.bfloat16, world_size, deepspeed) for name, layout in layouts.items()}
        for case in cases.values():
            for _ in range(WARMING):
                case.step()
                case.plain_step()
        times: dict[str, dict[str, list[Clocks]]] = {name: {"step": [], "plain": [], "hooks": []} for name in cases}
        for _ in range(steps):
            for name, case in cases.items():
                case.watch.reset()
                times[name]["step"].append(_seconds(case.step))
                times[name]["hooks"].append(case.watch.seconds)
                times[name]["plain"].append(_seconds(case.plain_step))
        found[str(stage)] = {name: _counted(case, times[name]) for name, case in cases.items()}
    return found


def _seconds(call: Callable[[], None]) -> Clocks:
    torch.distributed.barrier()
    began = Clocks.now()
    call()
    return Clocks.now().minus(began)


def _milliseconds(times: dict[str, list[Clocks]], clock: str) -> dict[str, float]:
    """Medians on one clock."""
    found = {name: 1e3 * statistics.median(getattr(one, clock) for one in seconds) for name, seconds in times.items()}
    return found | {"beyond_plain": found["step"] - found["plain"]}


def _counted(case: _Case, times: dict[str, list[Clocks]]) -> dict[str, Any]:
    counts = HostCounts()
    case.watch.reset()
    with counts, counts.phase("step"):
        case.step()
    (seen,) = counts.of("step")
    sent = [one for one in seen if one.kind != "read"]
    return {
        "tensors": case.layout.tensors,
        "values": case.layout.values,
        "tensors_with_gradient": case.layout.running_tensors,
        "tensors_with_hooks": len(case.watch.tensors),
        "hooks_fired": sum(case.watch.fired.values()),
        "hooks_fired_by_kind": dict(case.watch.fired),
        "collectives": dict(Counter(one.kind for one in sent)),
        "bytes": {kind: sum(one.bytes for one in sent if one.kind == kind) for kind in {one.kind for one in sent}},
        "reads_by_deepspeed": dict(Counter(one.who for one in seen if one.kind == "read" and one.theirs)),
        "reads_by_us": dict(Counter(one.who for one in seen if one.kind == "read" and not one.theirs)),
        "ms": _milliseconds(times, "thread"),
        "wall_ms": _milliseconds(times, "wall"),
    }


def _microseconds_a_tensor(layouts: dict[str, Any]) -> float:
    ours, theirs = layouts["flat"], layouts["published"]
    more = theirs["ms"]["beyond_plain"] - ours["ms"]["beyond_plain"]
    return float(1e3 * more / (theirs["tensors_with_gradient"] - ours["tensors_with_gradient"]))


def print_table(found: dict[str, dict[str, Any]]) -> None:
    """One row a stage and layout."""
    table = Table(title="DeepSpeed's cost for the host, one step of two CPU ranks")
    for name in (
        "stage",
        "layout",
        "tensors",
        "with hooks",
        "hooks fired",
        "collectives",
        "MB",
        "reads",
        "in hooks",
        "beyond plain",
        "a tensor",
    ):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for stage, layouts in found.items():
        for name, row in layouts.items():
            table.add_row(
                stage, name, str(row["tensors"]), str(row["tensors_with_hooks"]), str(row["hooks_fired"]),
                ", ".join(f"{count} {kind}" for kind, count in sorted(row["collectives"].items())),
                f"{sum(row['bytes'].values()) / 1e6:.2f}", str(sum(row["reads_by_deepspeed"].values())),
                f"{row['ms']['hooks']:.1f} ms", f"{row['ms']['beyond_plain']:.1f} ms",
                f"{_microseconds_a_tensor(layouts):.0f} µs" if name == "published" and len(layouts) == 2 else "",
            )  # fmt: skip
    Console(width=165).print(table)


def main(arguments: list[str] | None = None) -> int:
    """Start two ranks of itself, or be one of them."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.hooks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default="0,1,2,3", help="ZeRO stages (default: 0,1,2,3)")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each (default: 15)")
    parser.add_argument("--layouts", default="flat,published", help="which of the two, in turns (default: both)")
    parser.add_argument("--full", action="store_true", help="the real widths: 268 M values, 10 GB of memory a layout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    given = parser.parse_args(arguments)
    try:
        stages, layouts = [int(stage) for stage in given.stages.split(",")], given.layouts.split(",")
        if not set(stages) <= {0, 1, 2, 3} or given.steps < 1 or not set(layouts) <= LAYOUTS.keys():
            raise ValueError
    except ValueError:
        asked = f"--stages {given.stages} --steps {given.steps} --layouts {given.layouts}"
        known = f"stages are 0 to 3, steps at least 1, layouts {', '.join(LAYOUTS)}"
        print(f"error: {asked}: {known}", file=sys.stderr)
        return 2
    if "RANK" not in os.environ:
        return _launched(arguments)
    try:
        return _as_rank(given, stages)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _launched(arguments: list[str] | None) -> int:
    """The exit code of this command on two ranks."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", "-m", "bench.hooks", *(sys.argv[1:] if arguments is None else arguments),
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONWARNINGS": "ignore::FutureWarning"}
    return subprocess.run(command, env=environment, check=False).returncode


def _as_rank(given: argparse.Namespace, stages: Sequence[int]) -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    ranks = join(600, "cpu")
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    found = measure(ModelConfig() if given.full else NARROW, given.layouts.split(","), stages, given.steps)
    if ranks.first:
        print_table(found)
        if given.json:
            result = {
                "stages": found, "widths": "full" if given.full else "narrow", "steps": given.steps, "ranks": ranks.world_size,
                "conditions": conditions(torch.device("cpu")) | {"deepspeed": version("deepspeed")},
            }  # fmt: skip
            write_atomic(given.json, json.dumps(result, indent=1).encode())
    leave()
    return 0


if __name__ == "__main__":
    finish(main())
