"""A comparison's numbers: as JSON for machines, a table for people, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from bench.batches import padded_row_share
from bench.comparison import Measured, TaskResult, geometric_mean
from bench.estimate import OURS
from engine.figures import GREY, PALETTE

GIB = 2**30


def as_json(
    results: Sequence[TaskResult], described: Mapping[str, Mapping[str, Any]], conditions: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that was measured. On top what the README quotes: geometric means, GEMM share, padded rows, tasks."""
    peers = list(results[0].ratios)
    ours = [result.providers[OURS] for result in results]
    return {
        "geometric_mean": {peer: geometric_mean([result.ratios[peer] for result in results]) for peer in peers},
        "gemm_share": gemm_share(results),
        "padded_row_share": padded_row_share(sum(m.total_rows for m in ours), sum(m.real_rows for m in ours)),
        "memory": _memory(results, peers),
        "tasks": {result.row.name: _task(result) for result in results},
        "providers": {name: dict(about) for name, about in described.items()},
        "conditions": dict(conditions),
    }


def gemm_share(results: Sequence[TaskResult]) -> float:
    """Products over forward and backward, medians summed over the tasks."""
    times = [result.gemms for result in results if result.gemms is not None]
    return sum(median(t.replay_s) for t in times) / sum(median(t.forward_backward_s) for t in times)


def _task(result: TaskResult) -> dict[str, Any]:
    seconds = result.providers[OURS].seconds
    return {
        "iterations_per_s": 1 / seconds,
        "samples_per_s": result.batch / seconds,
        "ratio": result.ratios,
        "padded_row_share": {name: m.padded_row_share for name, m in result.providers.items()},
        "rows": {name: m.total_rows / len(m.rows) for name, m in result.providers.items()},
        "seconds": {name: _seconds(m) for name, m in result.providers.items()},
        "memory": {name: _bytes(m) for name, m in result.providers.items()},
        "minor_faults": {name: median(s.minor_faults for s in m.steps) for name, m in result.providers.items()},
        "gemm": None if result.gemms is None else {"share": result.gemms.share, **asdict(result.gemms)},
        "counts": result.counts,
        "rested": result.rested,
    }


def _seconds(measured: Measured) -> dict[str, Any]:
    return {
        "median": measured.seconds,
        "least": min(step.seconds for step in measured.steps),
        "forward_backward": median(step.forward_backward_s for step in measured.steps),
        "optimizer": median(step.optimizer_s for step in measured.steps),
        "all": [step.seconds for step in measured.steps],
    }


def _bytes(measured: Measured) -> dict[str, int]:
    gradients = measured.steps[-1].gradient_bytes
    return {
        "peak": measured.peak_bytes, "working": measured.working_bytes, "gradients": gradients, **measured.state,
    }  # fmt: skip


def _memory(results: Sequence[TaskResult], peers: Sequence[str]) -> dict[str, Any]:
    """The largest over the tasks of each provider; working = peak without weights, gradients and optimizer state."""
    names = [OURS, *peers]
    peak = {name: max(result.providers[name].peak_bytes for result in results) for name in names}
    working = {name: max(result.providers[name].working_bytes for result in results) for name in names}
    return {
        "peak_bytes": peak,
        "working_bytes": working,
        "peak_ratio": {peer: peak[OURS] / peak[peer] for peer in peers},
        "working_ratio": {peer: working[OURS] / working[peer] for peer in peers},
    }


def rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One of each task and provider, for the records."""
    return [
        {
            "task": name, "provider": provider, "median_s": seconds["median"], "least_s": seconds["least"],
            "forward_backward_s": seconds["forward_backward"], "optimizer_s": seconds["optimizer"],
            "rows": task["rows"][provider], "padded_row_share": task["padded_row_share"][provider],
            "working_bytes": task["memory"][provider]["working"], "minor_faults": task["minor_faults"][provider],
            "samples_s": seconds["all"],
        }
        for name, task in result["tasks"].items()
        for provider, seconds in task["seconds"].items()
    ]  # fmt: skip


def table(result: Mapping[str, Any]) -> str:
    """One line a task, the means, and the conditions."""
    peers = list(result["geometric_mean"])
    titles = ["iter/s", "samples/s", *(f"x {peer}" for peer in peers), "GEMM %", "rows", "padded", "pad %", "work GiB"]
    lines = [f"{'task':22}" + "".join(f"{title:>11}" for title in titles)]
    other = peers[0] if peers else OURS
    for name, task in result["tasks"].items():
        cells = [f"{task['iterations_per_s']:.3g}", f"{task['samples_per_s']:.3g}"]
        cells += [f"{task['ratio'][peer]:.2f}" for peer in peers]
        cells += [f"{100 * task['gemm']['share']:.0f}", f"{task['rows'][OURS]:.0f}", f"{task['rows'][other]:.0f}"]
        cells += [f"{100 * task['padded_row_share'][other]:.0f}", f"{task['memory'][OURS]['working'] / GIB:.2f}"]
        lines.append(f"{name:22}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join([*lines, "", *_summary(result)])


def _summary(result: Mapping[str, Any]) -> list[str]:
    c, memory = result["conditions"], result["memory"]
    lines = []
    for peer, mean in result["geometric_mean"].items():
        worst = min(result["tasks"], key=lambda name: result["tasks"][name]["ratio"][peer])
        lines.append(
            f"{mean:.2f} x {peer} (geometric mean of {len(result['tasks'])} tasks; "
            f"least {result['tasks'][worst]['ratio'][peer]:.2f} x at {worst}); "
            f"working memory {memory['working_ratio'][peer]:.2f} x, total {memory['peak_ratio'][peer]:.2f} x"
        )
    lines.append(
        f"GEMM share {100 * result['gemm_share']:.0f} %, padded rows {100 * result['padded_row_share']:.1f} %; peak memory "
        + ", ".join(f"{name} {peak / GIB:.1f} GiB" for name, peak in memory["peak_bytes"].items())
    )
    lines.append(
        f"{c['model']}, batch {c['batch']}, {c['precision']}, medians of {c['rounds']} rounds; {c['device']} ({c['isa']}), "
        f"{c['threads']} threads, torch {c['torch']}, commit {c['commit']}"
    )
    return lines


def plot(result: Mapping[str, Any], path: Path) -> None:
    """How many times faster than each peer, one group of bars a task."""
    peers, tasks = list(result["geometric_mean"]), result["tasks"]
    figure = Figure(figsize=(9, 0.9 + 0.42 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(peers)
    for number, peer in enumerate(peers):
        ratios = [task["ratio"][peer] for task in tasks.values()]
        places = [place + (number - (len(peers) - 1) / 2) * height for place in range(len(tasks))]
        mean = result["geometric_mean"][peer]
        bars = axes.barh(places, ratios, height, color=PALETTE[number], label=f"against {peer} (mean {mean:.2f} ×)")
        axes.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], padding=2, fontsize=8)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks(range(len(tasks)), list(tasks))
    axes.invert_yaxis()
    axes.set_xlabel("times as many training steps per second")
    c = result["conditions"]
    axes.set_title(f"{c['model']}, batch {c['batch']}, {c['device']}, {c['threads']} threads", fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(peers), frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
