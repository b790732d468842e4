"""How many values the models of a system have: counted from the models themselves, made without memory for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from engine.assembly import head_specs, shared_answers, sheet_path
from engine.experiments.series import Series
from engine.model.heads import HeadSpec
from engine.model.published import PUBLISHED_HEADS
from engine.model.vilbert import ViLBERT
from pipelines.sheet import inspect_sheet


def counted(series: Series, systems: Iterable[str]) -> dict[str, tuple[int, int]]:
    """System -> (values of all its models together, how many models): trunks and the heads that the runs train.

    Answer vocabularies are those of the data sheet; where it cannot be read, the published sizes.
    """
    known = _specs(series)
    table = series.table
    seen: dict[frozenset[str], int] = {}
    found = {}
    for system in systems:
        runs = [frozenset(table.row(task).head for task in entry.tasks) for entry in series.of(system)]
        for heads in set(runs) - seen.keys():
            seen[heads] = _values(series, {head: known[head] for head in sorted(heads)})
        found[system] = sum(seen[heads] for heads in runs), len(runs)
    return found


def _values(series: Series, heads: Mapping[str, HeadSpec]) -> int:
    with torch.device("meta"):
        model = ViLBERT(series.base_config.model, heads)
    return sum(parameter.numel() for parameter in model.parameters())


def _specs(series: Series) -> dict[str, HeadSpec]:
    config, table = series.base_config, series.table
    rows = tuple({row.head: row for row in (*table.tasks.values(), *series.rows) if row.loss != "masked"}.values())
    sheet, problems = inspect_sheet(Path(sheet_path(config, lambda message: None)), [row.name for row in series.rows])
    if sheet is None or problems:
        return dict(PUBLISHED_HEADS)
    ours = head_specs(table, series.rows, shared_answers(series.rows, sheet))
    others = head_specs(table, tuple(row for row in rows if row.loss != "soft_labels"), {})
    return {**others, **ours}
