"""The paper's own numbers, typed as data with their source: `configs/paper`. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.tasks import CONFIGS
from engine.yaml_files import read_mapping, validated
from pipelines.errors import BadInput

PAPER = CONFIGS / "paper"
Value = int | float | str | None


class PaperRow(BaseModel):
    """One printed row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str = Field(description="as printed")
    values: tuple[Value, ...] = Field(description="by column; null where the paper prints nothing")
    clean: bool | None = Field(None, description="Table 2: trained without all data sets' test images")


class PaperTable(BaseModel):
    """One table of the paper; scores in per cent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    source: str = Field(description="where it stands in the paper")
    note: str = Field(description="what to know of it: splits, and where the paper's own arithmetic does not come out")
    columns: tuple[str, ...]
    rows: dict[str, PaperRow]

    @model_validator(mode="after")
    def _rows_fit_columns(self) -> Self:
        for name, row in self.rows.items():
            if len(row.values) != len(self.columns):
                raise ValueError(f"row {name} has {len(row.values)} values for {len(self.columns)} columns")
        return self

    def value(self, row: str, column: str) -> Value:
        """What is printed there. KeyError for a row or column that the paper does not have."""
        if column not in self.columns:
            raise KeyError(column)
        return self.rows[row].values[self.columns.index(column)]

    def number(self, row: str, column: str) -> float | None:
        """The number printed there; None where there is none."""
        value = self.value(row, column)
        return float(value) if isinstance(value, (int, float)) else None


def paper_table(name: str, folder: Path = PAPER) -> PaperTable:
    """`table1` … `table6`, or `figures`. Raises BadInput for a name that is not there, and for a file that cannot be used."""
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise BadInput(path, "no such table of the paper", f"there are {known}")
    return validated(PaperTable, read_mapping(path), lambda key: path)
