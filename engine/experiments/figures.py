"""The paper's figures from a series: `OUTPUT/figures/NAME.png`, `.svg`, and `NAME.json` with {"title", "caption"}.

What differs from the paper because data differ stands on each figure. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from engine.experiments.curves import curve
from engine.experiments.driver import finished
from engine.experiments.paper import paper_table
from engine.experiments.results import BySeed, Estimate, combine, estimate, mean
from engine.experiments.tables import Found, group_tasks
from engine.figures import GREY, INK, PALETTE, dsg_timeline, plain, save
from pipelines.files import write_atomic

BARS = ("single-task", "all-tasks", "finetune-at")
"""Systems of Figure 1, in order."""
CURVES = (("single-task", "all-tasks"), ("single-grounding", "hdc"))
"""Systems of Figure 4: alone, with others. Phrase grounding is none of the twelve tasks."""
_QUIET = "#6b7580"
Drawn = tuple[Figure, str, str]
"""Figure, title, caption."""


def figure1(found: Found) -> Drawn | None:
    """One model against twelve: a bar for each system and task, with the interval over seeds."""
    systems = [name for name in BARS if any(found.results.of(name, task) for task in found.tasks)]
    if not systems:
        return None
    names = [*found.tasks, "average"]
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(systems)
    for place, system in enumerate(systems):
        scores = [found.results.of(system, task) for task in found.tasks]
        values = [estimate(score) for score in (*scores, mean(scores) if all(scores) else {})]
        _bars(axes, [x + (place - (len(systems) - 1) / 2) * width for x in range(len(names))], values, 0.92 * width,
              PALETTE[place], found.series.catalogue.systems[system].title)  # fmt: skip
    axes.set_xticks(range(len(names)), [*map(found.title, found.tasks), "average"], rotation=35, ha="right",
                    rotation_mode="anchor", fontsize=9)  # fmt: skip
    axes.axvline(len(names) - 1.5, color="#d0d0d0", lw=1)
    _percent(axes, f"{found.split} score, %")
    title = "One model against twelve (paper Fig. 1)"
    return (
        _finish(figure, title, found),
        title,
        f"Score of each task under each system; bars: 95 % interval. {found.what()}",
    )


def figure2_right(found: Found) -> Drawn | None:
    """Mean score of each group over the gap, normalised as in the paper: over the sum of all gaps' scores."""
    gaps = {found.series.base_config.stopgo.gap: ("all-tasks", "")}
    gaps |= {
        int(entry.part): (entry.system, entry.part) for entry in found.series.entries.values() if entry.system == "gaps"
    }
    rows = [row.group for row in found.series.rows]
    groups = [*dict.fromkeys(rows), "average"]

    def at(gap: int, group: str) -> BySeed:
        system, part = gaps[gap]
        return mean(found.results.of(system, task, part) for task in group_tasks(found, group))

    there = [gap for gap in sorted(gaps) if at(gap, "average")]
    if len(there) < 2:
        return None
    figure = Figure(figsize=(6.2, 4.0), layout="constrained")
    axes = figure.subplots()
    for place, group in enumerate(groups):
        scores = [at(gap, group) for gap in there]
        total = combine(lambda *values: sum(values), *scores)
        shares = [estimate(combine(lambda a, b: a / b if b else np.nan, score, total), 1.0) for score in scores]
        means = np.array([share.mean if share else np.nan for share in shares])
        whole = group == "average"
        axes.plot(there, means, marker="o", ms=4, lw=2.4 if whole else 1.4,
                  color=INK if whole else PALETTE[place % len(PALETTE)], label="all tasks" if whole else group)  # fmt: skip
        if whole and all(share and share.seeds > 1 for share in shares):  # the interval of one line is enough to read
            half = np.array([share.half if share else np.nan for share in shares])
            axes.fill_between(there, means - half, means + half, color=INK, alpha=0.12, lw=0)
    axes.set_xlabel("gap Δ: a stopped task is updated every Δ-th iteration", fontsize=9, color=INK)
    axes.set_ylabel("score over the sum of all gaps' scores", fontsize=9, color=INK)
    axes.set_xticks(there)
    plain(axes, ("left", "bottom"))
    axes.legend(frameon=False, fontsize=8.5)
    title = "The gap of stop-and-go (paper Fig. 2, right)"
    caption = (
        "Mean score of each group, normalised over the gaps, mean over seeds; shaded: 95 % interval of all tasks. The paper "
        f"gives no numbers. {found.what()}"
    )
    return _finish(figure, title, found), title, caption


def figure4(found: Found) -> Drawn | None:
    """Score of training and validation over a task's own steps: trained alone, and together with others."""
    shown = [
        (task, systems) for systems in CURVES for task in found.results.tasks() if all(_runs(found, systems, task))
    ]
    if not shown:
        return None
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.9 * columns + 0.4, 2.2 * rows + 1.1), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (task, systems) in zip(panels, shown, strict=False):
        for runs, colour in zip(_runs(found, systems, task), PALETTE, strict=False):
            for one in (curve(found.series.folder(run), task) for run in runs):
                axes.plot(*one.training, color=colour, lw=0.9, ls=":", alpha=0.8)
                axes.plot(*one.validation, color=colour, lw=1.5, alpha=0.8, marker="o", ms=2)
        axes.set_title(found.title(task), fontsize=9.5, loc="left", color=INK)
        axes.set_xlim(left=0)
        axes.tick_params(length=2, labelsize=7.5)
        plain(axes, ("left", "bottom"))
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    keys = [Line2D([], [], color=PALETTE[0], label="alone"), Line2D([], [], color=PALETTE[1], label="with others"),
            Line2D([], [], color=INK, marker="o", ms=2, label="validation, %"),
            Line2D([], [], color=INK, ls=":", lw=0.9, label="training, %")]  # fmt: skip
    figure.legend(handles=keys, loc="outside upper right", ncols=2, frameon=False, fontsize=8.5)
    title = "Trained alone, and with others (paper Fig. 4)"
    caption = (
        "Score over the task's own steps, a line for each seed; training scores are means of log windows. The paper shows "
        f"SNLI-VE and phrase grounding, and gives no numbers. {found.what()}"
    )
    return _finish(figure, title, found, "Over the steps of the task"), title, caption


def table6_bars(found: Found) -> Drawn | None:
    """Average over all tasks under each ablation, the paper's beside it."""
    paper = paper_table("table6")
    rows = [(number, systems[0]) for number, systems in found.series.catalogue.experiments["table6"].rows.items()]
    here = {number: estimate(found.results.mean(system, found.tasks)) for number, system in rows}
    if not any(here.values()):
        return None
    figure = Figure(figsize=(9.4, 3.6), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2, sharey=True), ("paper, test", f"here, {found.split}"), strict=True):
        values: Sequence[Estimate | None] = (
            [here[number] for number, _ in rows]
            if what.startswith("here")
            else [estimate({0: paper.number(number, "average") or np.nan}, 1.0) for number, _ in rows]
        )
        for y, value in enumerate(values):
            if value is None:
                axes.text(
                    0.02, y, "not run", va="center", fontsize=8.5, color=GREY, transform=axes.get_yaxis_transform()
                )
                continue
            axes.errorbar(value.mean, y, xerr=None if value.seeds < 2 else value.half, fmt="o", ms=6,
                          color=PALETTE[0], ecolor=INK, elinewidth=1.2, capsize=3)  # fmt: skip
            axes.annotate(f"{value.mean:.2f}" if what.startswith("paper") else f"{value.mean:.1f}", (value.mean, y),
                          xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8, color=INK)  # fmt: skip
        axes.set_title(what, fontsize=9.5, loc="left", color=INK)
        axes.set_yticks(range(len(rows)), [f"{number}  {paper.rows[number].label}" for number, _ in rows], fontsize=9)
        axes.set_ylim(len(rows) - 0.5, -0.7)
        axes.margins(x=0.12)
        axes.tick_params(length=0, labelsize=8.5)
        axes.grid(axis="x", color="#e6e6e6", lw=0.8)
        axes.set_axisbelow(True)
        plain(axes, ("bottom",))
    title = "Ablations of tokens and schedules, mean over all tasks (paper Table 6)"
    return _finish(figure, title, found), title, f"{paper.note} Bars: 95 % interval over seeds. {found.what()}"


FIGURES: dict[str, Callable[[Found], Drawn | None]] = {
    "figure1": figure1, "figure2_right": figure2_right, "figure4": figure4, "table6": table6_bars,
}  # fmt: skip
"""Name of the files -> what draws it; None where no run of it is there."""


def write_all(found: Found, folder: Path) -> list[str]:
    """Every figure that the series has runs for; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in FIGURES.items():
        drawn = draw(found)
        if drawn is not None:
            figure, title, caption = drawn
            for suffix in (".png", ".svg"):
                save(figure, folder / f"{name}{suffix}")
            describe(folder, name, title, caption)
            written.append(name)
    return written + _timeline(found, folder)


def describe(folder: Path, name: str, title: str, caption: str) -> None:
    """Write `NAME.json` beside a figure."""
    content: dict[str, Any] = {"title": title, "caption": caption}
    write_atomic(folder / f"{name}.json", (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _timeline(found: Found, folder: Path) -> list[str]:
    """Figure 2, left: the timeline of the first all-tasks run."""
    for seed in found.results.seeds():
        run = found.series.folder(f"all-tasks-seed{seed}")
        if finished(run):
            for suffix in (".png", ".svg"):
                dsg_timeline(run, folder / f"figure2_left{suffix}")
            caption = f"Run {run.name}. Thick: go, every iteration; thin: stop, sparse updates. {found.what()}"
            describe(folder, "figure2_left", "Dynamic stop-and-go over a run (paper Fig. 2, left)", caption)
            return ["figure2_left"]
    return []


def _runs(found: Found, systems: tuple[str, str], task: str) -> list[list[str]]:
    """Runs that trained the task, of each of the systems."""
    rows = [row for row in found.results.rows if row.task == task]
    return [sorted({row.run for row in rows if row.system == system}) for system in systems]


def _bars(
    axes: Axes, places: Sequence[float], values: Sequence[Estimate | None], width: float, colour: str, label: str
) -> None:
    shown = [(x, value) for x, value in zip(places, values, strict=True) if value is not None]
    axes.bar([x for x, _ in shown], [value.mean for _, value in shown], width, color=colour, label=label, zorder=2)
    several = [(x, value) for x, value in shown if value.seeds > 1]
    axes.errorbar([x for x, _ in several], [value.mean for _, value in several], [value.half for _, value in several],
                  fmt="none", ecolor=INK, elinewidth=1, capsize=2, zorder=3)  # fmt: skip


def _percent(axes: Axes, label: str) -> None:
    axes.set_ylim(0, 105)
    axes.set_ylabel(label, fontsize=9, color=INK)
    axes.tick_params(length=0, labelsize=9)
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    plain(axes, ("bottom",))
    axes.figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=8.5)


def _finish(figure: Figure, title: str, found: Found, more: str = "") -> Figure:
    """Title above, and below what the numbers are."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    width = int(19 * figure.get_figwidth())
    figure.supxlabel(
        fill(". ".join(filter(None, [more, found.what()])), width), fontsize=7, color=_QUIET, x=0.01, ha="left"
    )
    return figure
