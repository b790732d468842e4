"""Table 1 of the paper for the data of a series: which test images other data sets' training shows."""

from __future__ import annotations

from pathlib import Path

from engine.assembly import sheet_path
from engine.experiments.figures import describe
from engine.experiments.paper import paper_table
from engine.experiments.series import Series
from engine.experiments.tables import Cell, Table
from pipelines.overlap import survey
from pipelines.overlap_figure import draw, percent
from pipelines.sheet import load_sheet


def table1(series: Series, figures: Path) -> Table:
    """Reads the images of all splits, draws `table1.png` and `.svg` into `figures`. Raises BadInput as the readers do."""
    paper = paper_table("table1")
    table = series.table
    names = [name for name in paper.columns if name in {row.name for row in series.rows}]
    sheet = load_sheet(sheet_path(series.base_config, lambda message: None), names)
    found = survey(sheet, {name: table.row(name).reader for name in names}, names)
    matrix = found.matrix()
    figures.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        draw(matrix, {name: len(images) for name, images in found.tests.items()}, figures / f"table1{suffix}")
    what = series.catalogue.model(series.model).what or series.model
    note = f"{paper.source}. Each cell: here, and in brackets the paper's. Before cleaning. Data here: {what}."
    describe(figures, "table1", paper.title, note)
    rows: list[list[Cell]] = [
        [
            paper.rows[row].label,
            *(f"{percent(matrix[row][column])} ({paper.number(row, column):.0f})" for column in names),
        ]
        for row in names
    ]
    return Table(paper.title, note, ["test images of", *(table.row(name).title for name in names)], rows)
