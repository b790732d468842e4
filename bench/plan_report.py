"""What is said of a configuration: a table, totals, warnings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.plan_cost import STAGES, Layout, Machine, Step
from bench.plan_hardware import Limits
from bench.plan_memory import Memory

PROJECTION = "a projection, not a measurement"
MEASURED = "from rates measured on this machine, in this run"
_GB = 1e9


@dataclass(frozen=True)
class Plan:
    """One configuration: so many ranks of a machine at a ZeRO stage."""

    machine: Machine
    layout: Layout
    steps: tuple[Step, ...]
    memory: Memory
    max_iterations: int
    capacity: float
    """Images/s that the threads of one rank fill batches with."""
    limits: Limits
    warnings: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "warnings", tuple(_warnings(self)))

    @property
    def round_s(self) -> float:
        """An iteration in which every task takes its turn."""
        return sum(step.seconds for step in self.steps)

    @property
    def hours(self) -> float:
        """Of the run, if no task ever stops; validation and start not counted."""
        return self.max_iterations * self.round_s / 3600

    @property
    def images_per_s(self) -> float:
        """What a rank would use over a round, if it never waited for data."""
        return sum(step.images for step in self.steps) / sum(step.computing for step in self.steps)

    @property
    def provenance(self) -> str:
        return MEASURED if self.machine.measured else PROJECTION

    def as_json(self) -> dict[str, Any]:
        """Seconds, bytes."""
        flops = sum(step.flops for step in self.steps)
        return {
            "provenance": self.provenance,
            "machine": self.machine.title,
            "ranks": self.layout.ranks,
            "zero": self.layout.stage,
            "cuda_graphs": self.layout.graphs,
            "precision": self.layout.precision,
            "parameters": self.layout.parameters,
            "round_s": self.round_s,
            "iterations_per_s": 1 / self.round_s,
            "task_steps_per_s": len(self.steps) / self.round_s,
            "max_iterations": self.max_iterations,
            "hours": self.hours,
            "flops_per_s_per_rank": flops / self.round_s,
            "communication_s": sum(step.communication.seconds for step in self.steps),
            "exposed_s": sum(step.communication.exposed for step in self.steps),
            "images_per_s_needed": self.images_per_s,
            "images_per_s_available": self.capacity,
            "memory": self.memory.as_json(),
            "memory_of_the_machine": self.machine.memory,
            "warnings": list(self.warnings),
            "tasks": {step.task: step.as_json() for step in self.steps},
        }


def _warnings(plan: Plan) -> list[str]:
    found = []
    total, limit = plan.memory.total, plan.limits.memory_share * plan.machine.memory
    if total > limit:
        kind, most = max(plan.memory.as_json().items(), key=lambda item: (item[0] != "total") * item[1])
        found.append(
            f"does not fit: {total / _GB:.1f} GB a rank, {limit / _GB:.1f} GB are safe; most are {kind}, {most / _GB:.1f} GB"
        )
    if plan.images_per_s > plan.capacity:
        threads = -(-plan.images_per_s * plan.layout.data_threads // plan.capacity)
        found.append(
            f"starves: a rank wants {plan.images_per_s:,.0f} images/s, its data_threads={plan.layout.data_threads} give "
            f"{plan.capacity:,.0f}; data_threads={threads:.0f}, or resident_features"
        )
    waiting = [step.task for step in plan.steps if step.waiting > 0]
    if waiting and plan.images_per_s <= plan.capacity:
        found.append(f"waits for data in {', '.join(waiting)}")
    exposed = sum(step.communication.exposed for step in plan.steps) / plan.round_s
    if exposed > plan.limits.exposed_share:
        found.append(f"bound by communication: {exposed:.0%} of the time ranks wait for each other")
    few = [f"{step.task} ({step.batch})" for step in plan.steps if step.batch < plan.layout.ranks]
    if few:
        found.append(f"fewer examples a step than {plan.layout.ranks} ranks, so some do nothing: {', '.join(few)}")
    host = [step.task for step in plan.steps if step.work.host > step.work.device]
    if host:
        found.append(f"bound by the host's launches in {len(host)} of {len(plan.steps)} tasks: cuda_graphs=true")
    return found


def render(plan: Plan, about: str) -> RenderableType:
    """For a terminal."""
    layout = plan.layout
    ranks = f"{layout.ranks} rank{'s' * (layout.ranks > 1)}"
    title = f"{plan.machine.title}, {ranks}, ZeRO {layout.stage} ({STAGES[layout.stage]}), {layout.precision}"
    grid = Table(title=f"{title}\n{plan.provenance}; {about}", title_justify="left", header_style="bold")
    for heading in (
        "task", "batch", "a rank", "steps/s", "ms", "forward+backward", "update", "waits for ranks", "of sent in",
        "waits for data", "images/s a rank",
    ):  # fmt: skip
        grid.add_column(heading, justify="left" if heading == "task" else "right")
    for step in plan.steps:
        c = step.communication
        milliseconds = (step.seconds, step.work.seconds, step.update, c.exposed, c.seconds, step.waiting)
        total, *others = (f"{1e3 * value:,.1f}" for value in milliseconds)
        grid.add_row(
            step.task, f"{step.batch}", f"{step.per_rank}", f"{1 / step.seconds:,.2f}", total, *others,
            f"{step.images / step.computing:,.0f}",
        )  # fmt: skip
    memory = ", ".join(f"{kind} {value / _GB:.2f}" for kind, value in plan.memory.as_json().items())
    flops = sum(step.flops for step in plan.steps) / plan.round_s
    lines = [
        f"a round of {len(plan.steps)} steps: {plan.round_s:.3f} s; {plan.max_iterations:,} rounds: {plan.hours:,.1f} h "
        "if no task stops, without validation",
        f"memory of a rank, GB: {memory}",
        f"{flops / 1e9:,.0f} GFLOP/s a rank; {plan.images_per_s:,.0f} images/s a rank, {plan.capacity:,.0f} to be had",
    ]
    texts = [Text(line) for line in lines] + [Text(f"warning: {line}", style="bold") for line in plan.warnings]
    return Group(grid, *texts, Text(""))
