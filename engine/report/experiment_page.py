"""What an experiment folder holds: its tables, its figures, its runs. No torch.

tables/NAME.json     {"title", "note", "columns", "rows"}
figures/NAME.svg     with NAME.json {"title", "caption"}
results.json         scores of all runs, which the tables are made from
runs/NAME/           run folders
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from engine.journal import EVENTS_FILE
from engine.report.journal_page import JournalPage, read_page
from pipelines.errors import BadInput
from pipelines.files import open_json

_MOST_BYTES = 2 << 20
"""Of a figure; a larger one would make the page slow."""


class TableFile(BaseModel):
    """One table."""

    model_config = ConfigDict(frozen=True)

    title: str
    note: str = ""
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]

    def numeric(self, column: int) -> bool:
        """Whether the column is set to the right: no cell of it is a text with letters."""
        cells = [row[column] for row in self.rows if column < len(row) and row[column] is not None]
        return all(not isinstance(cell, str) or not any(letter.isalpha() for letter in cell) for cell in cells)


class FigureFile(BaseModel):
    """What is said of a figure."""

    model_config = ConfigDict(frozen=True)

    title: str
    caption: str = ""


@dataclass(frozen=True)
class FigureShown:
    """A figure, embedded."""

    title: str
    caption: str
    address: str
    """data: of the SVG, shown as an image: what it holds can run nothing."""


@dataclass(frozen=True)
class ExperimentPage:
    """An experiment folder."""

    name: str
    tables: tuple[TableFile, ...]
    figures: tuple[FigureShown, ...]
    runs: tuple[tuple[Path, JournalPage], ...]

    @property
    def shown_run(self) -> Path | None:
        """The finished run with the most tasks, whose pictures are shown; the first of several."""
        finished = [(folder, page) for folder, page in self.runs if page.state == "finished"]
        return max(finished, key=lambda run: len(run[1].results))[0] if finished else None


def is_experiment(folder: Path) -> bool:
    """Whether this is an experiment's folder rather than a run's."""
    return not (folder / EVENTS_FILE).is_file() and any(
        (folder / name).exists() for name in ("results.json", "tables", "figures", "runs")
    )


def read_experiment(folder: Path) -> ExperimentPage:
    """Raises BadInput naming the file that cannot be used."""
    tables = tuple(_table(path) for path in sorted((folder / "tables").glob("*.json")))
    figures = tuple(_figure(path) for path in sorted((folder / "figures").glob("*.svg")))
    journals = sorted(path.parent for path in (folder / "runs").glob(f"*/{EVENTS_FILE}"))
    runs = []
    for run in journals:
        try:
            runs.append((run, read_page(run)))
        except BadInput:
            if (run / EVENTS_FILE).stat().st_size:  # one that has just begun has said nothing yet
                raise
    return ExperimentPage(folder.resolve().name, tables, figures, tuple(runs))


def _table(path: Path) -> TableFile:
    try:
        return TableFile.model_validate(open_json(path))
    except ValidationError as error:
        raise _not_as_agreed(path, error, "a title, columns, and rows of texts and numbers") from None


def _figure(path: Path) -> FigureShown:
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise BadInput(path, f"{size / 2**20:.1f} MiB", "a figure of less than 2 MiB, with fewer points")
    told, beside = FigureFile(title=path.stem.replace("_", " ")), path.with_suffix(".json")
    if beside.is_file():
        try:
            told = FigureFile.model_validate(open_json(beside))
        except ValidationError as error:
            raise _not_as_agreed(beside, error, "a title and a caption") from None
    address = "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
    return FigureShown(told.title, told.caption, address)


def _not_as_agreed(path: Path, error: ValidationError, wanted: str) -> BadInput:
    first = error.errors()[0]
    where = ".".join(str(key) for key in first["loc"])
    return BadInput(
        f"{path}: {where}" if where else path, first["msg"][0].lower() + first["msg"][1:], f"it has {wanted}"
    )
