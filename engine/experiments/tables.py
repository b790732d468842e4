"""The paper's tables, its numbers beside those of a series. Imports no torch.

A table is plain data, `OUTPUT/tables/NAME.json`: {"title", "note", "columns": [text], "rows": [[text, number or null]]};
the same as markdown and CSV beside it. Scores are in points; means over seeds carry the half-width of their 95 % interval.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.experiments.compare import comparisons
from engine.experiments.paper import paper_table
from engine.experiments.results import BySeed, Estimate, Results, combine, estimate, mean
from engine.experiments.series import Series
from pipelines.files import write_atomic

Cell = str | float | None
PAPER, HERE = "paper", "here"


@dataclass(frozen=True)
class Table:
    """What is written."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Found:
    """What tables are made of."""

    series: Series
    results: Results
    parameters: Mapping[str, tuple[int, int]]
    """System -> values of all its models together, and how many models."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Of the base configuration."""
        return tuple(row.name for row in self.series.rows)

    def title(self, task: str) -> str:
        """How people call a task."""
        return self.series.table.row(task).title

    def what(self) -> str:
        """What the numbers here are, in a sentence that tables and figures carry."""
        seeds = len(self.results.seeds())
        series = self.series
        options = any(row.metric == "option_accuracy" for row in self.results.rows)
        return (
            f"Here: {series.catalogue.model(series.model).what or series.model}; {self.split} scores"
            f"{' (retrieval: the right one of four options)' if options else ''}; {series.iterations} iterations of runs of "
            f"several tasks; {seeds} {'seed' if seeds == 1 else 'seeds'}; ± is the 95 % interval of the mean."
        )

    @property
    def split(self) -> str:
        """The split that scores are of, as people call it."""
        splits = sorted({row.split for row in self.results.rows})
        return " and ".join({"val": "validation"}.get(split, split) for split in splits) or "no"


def table2(found: Found) -> Table:
    """Rows 1 to 8, each as printed and as found here."""
    paper = paper_table("table2")
    tasks = [column for column in paper.columns if column in found.tasks]
    rows: list[list[Cell]] = []
    for number, (system, *_) in found.series.catalogue.experiments["table2"].rows.items():
        printed = paper.rows[number]
        clean = "clean" if printed.clean else "full"
        models = f"{paper.value(number, 'parameters')} ({paper.value(number, 'models')})"
        rows.append([number, printed.label, clean, PAPER, *(paper.number(number, task) for task in tasks),
                     paper.number(number, "average"), models])  # fmt: skip
        scores = [found.results.of(system, task) for task in tasks]
        average = mean(scores) if all(scores) else {}
        count = _models(found, system)
        rows.append([number, printed.label, clean, HERE, *map(_shown, scores), _shown(average), count])
    note = f"{paper.source}. {paper.note} {found.what()} {_rule(found)} Parameters here are counted from the models."
    columns = ["row", "system", "data", "from", *map(found.title, tasks), "average", "parameters (models)"]
    return Table(paper.title, note, columns, rows)


def table3(found: Found) -> Table:
    """Relative change in per cent from single-task, by seed."""
    paper = paper_table("table3")
    tasks = found.series.catalogue.systems["pairs"].tasks
    groups = {found.series.table.row(task).group: task for task in tasks}
    here: dict[tuple[str, str], BySeed] = {}
    for column in paper.columns:
        others = [groups[name] for name in column.split(" & ") if name in groups]
        for group, task in groups.items():
            if others and task not in others:
                here[group, column] = _change(found, task, [name for name in tasks if name in (*others, task)])
    for group in groups:
        for column, members in (("pairs", 1), ("triples", 2)):
            here[group, column] = mean(value for (row, name), value in here.items()
                                       if row == group and len(name.split(" & ")) == members and name in paper.columns
                                       and name not in ("pairs", "triples"))  # fmt: skip
    for column in paper.columns:
        if column not in ("pairs", "triples"):
            here["average", column] = mean(value for (row, name), value in here.items() if name == column)
    rows: list[list[Cell]] = []
    for name, printed in paper.rows.items():
        rows.append([printed.label, PAPER, *(paper.number(name, column) for column in paper.columns)])
        rows.append([printed.label, HERE, *(_signed(here.get((name, column), {}), 1) for column in paper.columns)])
    note = f"{paper.source}. {paper.note} {found.what()} {_rule(found)}"
    return Table(paper.title, note, ["trained with", "from", *paper.columns], rows)


def _change(found: Found, task: str, together: Sequence[str]) -> dict[int, float]:
    system = "pairs" if len(together) == 2 else "triples"
    several = found.results.of(system, task, ".".join(together))
    alone = {
        seed: score for seed, score in found.results.of("single-task", task).items() if score
    }  # of 0 there is no share
    return combine(lambda a, b: 100 * (a / b - 1), several, alone)


def table4(found: Found) -> Table:
    """The paper's comparison, and our two columns as found here."""
    paper = paper_table("table4")
    ours = {name: systems[0] for name, systems in found.series.catalogue.experiments["table4"].rows.items()}
    rows: list[list[Cell]] = []
    for task in (name for name in paper.rows if name in found.tasks):
        here = [_shown(found.results.of(system, task)) for system in ours.values()]
        rows.append([found.title(task), *paper.rows[task].values, *here])
    columns = [
        "task",
        "split",
        "SOTA",
        "UNITER base",
        "UNITER large",
        "Ours AT",
        "Ours AT->ST",
        "AT here",
        "AT->ST here",
    ]
    return Table(paper.title, f"{paper.source}. {paper.note} {found.what()}", columns, rows)


def table5(found: Found) -> Table:
    """The task set of HDC."""
    paper = paper_table("table5")
    known = found.series.table.tasks
    rows: list[list[Cell]] = [
        [name, PAPER, *(paper.number(name, column) for column in paper.columns)] for name in paper.rows
    ]
    here = [found.results.of("hdc", column) if column in known else {} for column in paper.columns]
    rows.append(["Ours", HERE, *map(_shown, here)])
    columns = [known[column].title if column in known else column.replace("_", " ") for column in paper.columns]
    return Table(paper.title, f"{paper.source}. {paper.note} {found.what()}", ["system", "from", *columns], rows)


def table6(found: Found) -> Table:
    """Means of groups and of all tasks under each ablation."""
    paper = paper_table("table6")
    rows: list[list[Cell]] = []
    for number, (system, *_) in found.series.catalogue.experiments["table6"].rows.items():
        printed = paper.rows[number]
        rows.append([number, printed.label, PAPER, *(paper.number(number, column) for column in paper.columns)])
        here = [found.results.mean(system, group_tasks(found, column)) for column in paper.columns]
        rows.append([number, printed.label, HERE, *map(_shown, here)])
    note = f"{paper.source}. {paper.note} {found.what()}"
    return Table(paper.title, note, ["row", "system", "from", *paper.columns], rows)


def group_tasks(found: Found, group: str) -> list[str]:
    """Tasks of a group of the base configuration; of `average`, all."""
    return [row.name for row in found.series.rows if group in (row.group, "average")]


def differences(found: Found) -> Table:
    """The paper's comparisons of systems, task by task and on average, paired by seed, and what came out in words."""
    compared = comparisons(found.series, found.results)
    rows: list[list[Cell]] = [
        [found.title(task), *(_signed(one.by_task[task]) for one in compared)] for task in found.tasks
    ]
    rows.append(["average", *(one.average.signed() if one.average else None for one in compared)])
    rows.append(["average in the paper", *(one.paper for one in compared)])
    words = " ".join(one.words() for one in compared)
    note = f"{words} Differences are taken seed by seed. {found.what()} {_rule(found)}"
    return Table("Differences between systems, in points", note, ["task", *(one.title for one in compared)], rows)


TABLES: dict[str, Callable[[Found], Table]] = {
    "table2": table2, "table3": table3, "table4": table4, "table5": table5, "table6": table6, "differences": differences,
}  # fmt: skip
"""Name of the file -> what makes it. Table 1 needs the data: `overlap.py`."""


def write(table: Table, name: str, folder: Path) -> None:
    """`NAME.json`, `NAME.md` and `NAME.csv` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{name}.json", (json.dumps(asdict(table), indent=1, ensure_ascii=False) + "\n").encode())
    write_atomic(folder / f"{name}.md", markdown(table).encode())
    write_atomic(folder / f"{name}.csv", as_csv(table).encode())


def markdown(table: Table) -> str:
    """Title, table, note."""
    lines = [_line(table.columns), "|" + "---|" * len(table.columns), *map(_line, table.rows)]
    return f"## {table.title}\n\n" + "\n".join(lines) + f"\n\n{table.note}\n"


def as_csv(table: Table) -> str:
    """Columns and rows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([["" if cell is None else cell for cell in row] for row in table.rows])
    return text.getvalue()


def _line(cells: Sequence[Cell]) -> str:
    shown = ("–" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
    return "| " + " | ".join(text.replace("|", "\\|") for text in shown) + " |"


def _shown(values: BySeed) -> str | None:
    found = estimate(values)
    return str(found) if found else None


def _signed(values: BySeed, scale: float = 100.0) -> str | None:
    found: Estimate | None = estimate(values, scale)
    return found.signed() if found else None


def _models(found: Found, system: str) -> str | None:
    if system not in found.parameters:
        return None
    values, models = found.parameters[system]
    return f"{values / 1e6:.1f}M ({models})" if values < 1e9 else f"{values / 1e9:.1f}B ({models})"


def _rule(found: Found) -> str:
    """How long runs of one task are, and at which rate they learn."""
    if found.series.catalogue.model(found.series.model).alone != "like all-tasks":
        return "A run of one task has 20 epochs of it."
    return (
        "A run of one task, from scratch or fine-tuned, takes as many steps as the all-tasks run of its seed gave that task, "
        "with the same batch, rate of the trunk, warm-up share and decay. So a trunk of one task gets the steps of that task "
        "alone, and a trunk of all tasks those of all; the paper trains every task until it has converged."
    )
