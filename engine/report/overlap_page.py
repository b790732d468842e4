"""The paper's Table 1 for a page: which test images other data sets train on, before the removal list and after it."""

from __future__ import annotations

from dataclasses import dataclass

from engine.trained import Trained
from pipelines.errors import BadInput
from pipelines.overlap import survey
from pipelines.overlap_figure import percent
from pipelines.progress import Show
from pipelines.removal import list_path, load_list


@dataclass(frozen=True)
class Cell:
    """A share of the row's test images."""

    text: str
    level: int
    """0 to 5: how strongly it is coloured."""


@dataclass(frozen=True)
class Overlap:
    """The matrix, and what is left of it in training."""

    names: tuple[str, ...]
    rows: tuple[tuple[str, int, tuple[Cell, ...]], ...]
    """Data set, its test images, one cell per data set."""
    left: str
    """In words, after the removal list; empty where there is none."""


def overlap(trained: Trained, show: Show) -> Overlap:
    """Of the run's data sets. Raises BadInput as `pipelines.overlap.survey` does, and where there is no test split."""
    trained.check_data()
    readers = {name: row.reader for name, row in trained.table.tasks.items()}
    names, done = list(trained.rows), 0

    def on_split(name: str, split: str) -> None:
        nonlocal done
        done += 1
        show("data overlap", min(done, 3 * len(names)), 3 * len(names))

    found = survey(trained.sheet, readers, names, on_split)
    if not found.tests:
        raise BadInput(trained.sheet.path, "no test split is there, so nothing can overlap with one")
    matrix = found.matrix()
    rows = tuple(
        (trained.rows[name].title, len(found.tests.get(name, ())), tuple(_cell(share) for share in shares.values()))
        for name, shares in matrix.items()
    )
    left, path = "", list_path(trained.sheet)
    if path.is_file():
        shares = found.matrix(load_list(path).keys())
        most = max((share for row in shares.values() for share in row.values() if share is not None), default=0.0)
        left = f"With the removal list, what is left of it in training is {percent(most)} % at most."
    return Overlap(tuple(trained.rows[name].title for name in matrix), rows, left)


def _cell(share: float | None) -> Cell:
    return Cell(percent(share), 0 if not share else 1 + min(4, int(share / 20)))
