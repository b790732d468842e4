"""The paper's comparisons of two systems, repeated here and paired by seed, with what came out in words. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.experiments.paper import paper_table
from engine.experiments.results import BySeed, Estimate, Results, difference, estimate, mean
from engine.experiments.series import Series
from engine.experiments.systems import ComparisonRow


@dataclass(frozen=True)
class Comparison:
    """One system less another."""

    title: str
    of: str
    against: str
    by_task: Mapping[str, BySeed]
    """Task -> seed -> difference of scores in [0, 1]."""
    average: Estimate | None
    """Over all tasks, in points; None where no seed has both."""
    paper: float
    """Points, on average over the tasks."""

    def words(self) -> str:
        """One sentence: what was found, and whether it is the paper's finding."""
        found = self.average
        if found is None:
            return f"{self.of} against {self.against}: not run."
        size = f"{abs(found.mean):.1f} ± {found.half:.1f}" if found.seeds > 1 else f"{abs(found.mean):.1f}"
        side = f"{'ahead of' if found.mean > 0 else 'behind'} {self.against} by {size} points"
        if found.mean == 0:
            side = f"level with {self.against}"
        said = f"Here {self.of} is {side} on average (paper: {self.paper:+.2f})"
        return f"{said}; {self._verdict(found)}."

    def _verdict(self, found: Estimate) -> str:
        if found.seeds < 2:
            return "one seed tells nothing of the spread"
        if abs(found.mean) <= found.half:
            return "the interval holds 0, so these seeds do not show a difference"
        if (found.mean > 0) == (self.paper > 0):
            return "the paper's finding appears"
        return "the paper's finding does not appear"


def comparisons(series: Series, results: Results) -> list[Comparison]:
    """All comparisons of the catalogue over the tasks of the base configuration."""
    return [_compare(series, results, row) for row in series.catalogue.comparisons]


def _compare(series: Series, results: Results, row: ComparisonRow) -> Comparison:
    by_task = {
        task.name: difference(results.of(row.of, task.name), results.of(row.against, task.name)) for task in series.rows
    }
    table, first, second = row.paper
    paper = paper_table(table)
    printed = [paper.number(name, "average") for name in (first, second)]
    assert printed[0] is not None and printed[1] is not None  # a test sees to it
    return Comparison(
        row.title, row.of, row.against, by_task, estimate(mean(by_task.values())), round(printed[0] - printed[1], 2)
    )
