"""Every row of the paper's tables and figures with the experiment that makes it, and how far its runs are. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from engine.experiments.driver import State, state_of
from engine.experiments.paper import PAPER, paper_table
from engine.experiments.series import Job, Series
from pipelines.errors import BadInput
from pipelines.sheet import Sheet, inspect_sheet


@dataclass(frozen=True)
class Line:
    """One row of the paper."""

    table: str
    row: str
    label: str
    experiments: tuple[str, ...]
    """Names for `stopgo experiment NAME`."""
    status: str
    """`not run`, `n of m runs done`, `done`, `needs data`, `printed, not ours`, or what is wrong with a folder."""
    runs_done: int
    runs: int
    seeds: tuple[int, ...]
    """Those of which every run is done."""
    lacking: tuple[str, ...] = ()
    """Data sets that are not there."""


def lines(series: Series) -> list[Line]:
    """All rows, in the paper's order. The runs that a system needs from others are not counted with it."""
    states: dict[str, State | str] = {}
    lacking = _lacking(series)
    return [
        _line(series, (name, row, label), experiment.rows.get(row, ()), experiment.alone, states, lacking)
        for name, experiment in series.catalogue.experiments.items()
        if experiment.listed
        for row, label in _labels(name, experiment.rows).items()
    ]


def _labels(name: str, rows: Iterable[str]) -> dict[str, str]:
    """Every printed row of a table, those of others too; of a figure, or of columns, what the experiment names."""
    if not (PAPER / f"{name}.yaml").exists():
        return {row: row for row in rows}
    printed = {row: value.label for row, value in paper_table(name).rows.items()}
    return printed if set(rows) <= printed.keys() else {row: row for row in rows}


def _line(
    series: Series, place: tuple[str, str, str], systems: tuple[str, ...], alone: tuple[str, ...],
    states: dict[str, State | str], lacking: set[str],
) -> Line:  # fmt: skip
    if not systems:
        return Line(*place, (), "printed, not ours", 0, 0, ())
    try:
        jobs = [job for job in series.jobs(systems, alone) if job.entry.system in systems]
    except BadInput as error:
        return Line(*place, systems, f"cannot be made: {error}", 0, 0, ())
    for job in jobs:
        if job.name not in states:
            states[job.name] = _state(series, job)
    done = [job for job in jobs if states[job.name] is State.DONE]
    whole = tuple(seed for seed in series.seeds if all(job in done for job in jobs if job.seed == seed))
    missing = tuple(sorted({task for job in jobs for task in job.entry.tasks} & lacking))
    damaged = next((str(states[job.name]) for job in jobs if not isinstance(states[job.name], State)), None)
    status = damaged or _status(len(done), len(jobs), bool(missing))
    return Line(*place, systems, status, len(done), len(jobs), whole, missing)


def _status(done: int, runs: int, lacking: bool) -> str:
    if done == runs:
        return "done"
    if done:
        return f"{done} of {runs} runs done"
    return "needs data" if lacking else "not run"


def _state(series: Series, job: Job) -> State | str:
    try:
        return state_of(series, job)
    except BadInput as error:
        return str(error)


def _lacking(series: Series) -> set[str]:
    """Tasks whose data set the data sheet does not have, or whose files are not there.

    The embedded world has every set, and is built on first use.
    """
    config, table = series.base_config, series.table
    if config.data == "world":
        return set()
    tasks = {task for entry in series.entries.values() for task in entry.tasks}
    sheet, _ = inspect_sheet(Path(config.data), [])
    return {task for task in tasks if sheet is None or not _there(sheet, task, table.row(task).reader)}


def _there(sheet: Sheet, task: str, reader: str) -> bool:
    try:
        entry = sheet.entry(task)
        return all(file.exists() for split in ("train", "val") for file in sheet.files(task, split, reader)) and all(
            store.exists() for store in entry.stores().values()
        )
    except BadInput:
        return False


def _few(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f" ({', '.join(names[:2])}{more})" if names else ""


def as_json(series: Series) -> list[dict[str, Any]]:
    """The lines as plain data."""
    return [asdict(line) for line in lines(series)]


def page(series: Series) -> Table:
    """The lines as a table for the terminal."""
    table = Table(title=f"The paper's tables and figures, {series.model}, {series.output}", title_justify="left")
    for column in ("of the paper", "row", "", "stopgo experiment …", "here", "whole seeds"):
        table.add_column(column, no_wrap=column == "of the paper")
    before = ""
    for line in lines(series):
        if before and line.table != before:
            table.add_section()
        label = line.label if line.label != line.row else ""
        seeds = ", ".join(map(str, line.seeds)) or "–"
        made_by = ", ".join(line.experiments) or "–"
        first = line.table if line.table != before else ""
        table.add_row(first, line.row, label, made_by, line.status + _few(line.lacking), seeds)
        before = line.table
    return table
