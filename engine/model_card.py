"""The model card of an exported folder: what the model does, how well, and what it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from engine.journal import EVENTS_FILE, read_rows
from engine.trained import Trained


def model_card(trained: Trained, run: Path | None) -> str:
    """Markdown with a YAML head. `run`: the run folder, whose journal has the scores; None where there is none."""
    events = read_rows(run / EVENTS_FILE) if run is not None else []
    start = next((row for row in events if row["event"] == "start"), None)
    results = {row["task"]: row for row in events if row["event"] == "result"}
    examples = {task["name"]: task for task in start["tasks"]} if start else {}
    tasks = [
        {
            "row": row,
            "result": results.get(name),
            "data": examples.get(name, {}),
            "metric": row.metric.replace("_", " "),
        }
        for name, row in trained.rows.items()
    ]
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    # Markdown, not HTML: a table's cells must not hold a bar or a line's end, which `cell` sees to.
    environment = Environment(
        loader=PackageLoader("engine", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(cell=_cell, percent=_percent)
    return environment.get_template("model_card.md").render(
        config=trained.config, tasks=tasks, parameters=parameters, first=next(iter(trained.rows.values())),
        finished=next(iter(results.values()), None), started=start is not None, weights=trained.path.name,
    )  # fmt: skip


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
