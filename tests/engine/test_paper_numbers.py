"""The paper's numbers as typed: they fit together as the paper says they do."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

from engine.experiments.paper import PAPER, paper_table
from engine.tasks import load_table
from pipelines.errors import BadInput
from tests.reference import reference

TASKS = load_table().default_tasks()
NAMES = [row.name for row in TASKS]
TRUNCATED = 0.0101  # printed averages are cut, not rounded: 67.2567 stands as 67.25


def scores(row: str) -> dict[str, float]:
    table = paper_table("table2")
    found = {name: table.number(row, name) for name in NAMES}
    return {name: score for name, score in found.items() if score is not None}


@pytest.mark.parametrize("name", [path.stem for path in sorted(PAPER.glob("*.yaml"))])
def test_every_file_reads(name: str) -> None:
    assert paper_table(name).rows


@pytest.mark.parametrize("row", ["1", "2", "3", "4", "6", "7", "8"])
def test_average_of_table_2_is_that_of_all_twelve(row: str) -> None:
    assert len(scores(row)) == 12
    assert statistics.mean(scores(row).values()) == pytest.approx(
        paper_table("table2").number(row, "average"), abs=TRUNCATED
    )


@pytest.mark.parametrize(("row", "said"), [("4", 67.39), ("5", 67.96)])
def test_averages_without_g4_that_the_text_states(row: str, said: float) -> None:
    kept = [row.name for row in TASKS if row.group != "G4"]
    assert statistics.mean(scores(row)[name] for name in kept) == pytest.approx(said, abs=TRUNCATED)


@pytest.mark.parametrize(
    ("better", "worse", "task", "gain"),
    [
        ("3", "2", "flickr30k_retrieval", 4.54),
        ("3", "2", "nlvr2", 0.37),
        ("4", "2", "nlvr2", 4.19),
        ("4", "2", "snli_ve", 0.25),
    ],
)
def test_gains_that_the_text_states(better: str, worse: str, task: str, gain: float) -> None:
    assert scores(better)[task] - scores(worse)[task] == pytest.approx(gain, abs=1e-6)


def test_all_tasks_win_at_11_of_12_but_for_coco() -> None:
    behind = [name for name in NAMES if scores("4")[name] < scores("2")[name]]
    assert behind == ["coco_retrieval"]


@pytest.mark.parametrize("half", [("G1", "G2", "G3", "G4", "pairs"), ("triples",)])
def test_averages_of_table_3_are_those_of_its_entries(half: tuple[str, ...]) -> None:
    table = paper_table("table3")
    average = half[-1]
    entries = [
        name for name in table.columns if (" & " in name) == (average == "triples") and name not in ("pairs", "triples")
    ]
    groups = ["G1", "G2", "G3", "G4"]
    for group in groups:
        values = [value for name in entries if (value := table.number(group, name)) is not None]
        assert len(values) == 3
        assert all(table.number(group, name) is None for name in entries if group in name.split(" & "))
        assert statistics.mean(values) == pytest.approx(table.number(group, average), abs=TRUNCATED), group
    for name in entries:
        values = [value for group in groups if (value := table.number(group, name)) is not None]
        assert len(values) == 4 - len(name.split(" & "))
        assert statistics.mean(values) == pytest.approx(table.number("average", name), abs=TRUNCATED), name


@pytest.mark.parametrize(("column", "row"), [("ours_at", "4"), ("ours_at_st", "8")])
def test_our_columns_of_table_4_are_rows_of_table_2(column: str, row: str) -> None:
    table = paper_table("table4")
    assert {name: table.number(name, column) for name in NAMES} == scores(row)


def test_fine_tuned_beats_the_state_of_the_art_on_7_of_12() -> None:
    """The paper's count. Where neither SOTA nor UNITER has a number (VG QA) nothing is beaten."""
    table = paper_table("table4")
    beaten = []
    for name in NAMES:
        others = [table.number(name, column) for column in ("sota", "uniter_base", "uniter_large")]
        known = [value for value in others if value is not None]
        ours = table.number(name, "ours_at_st")
        if known and ours is not None and ours > max(known):
            beaten.append(name)
    assert len(beaten) == 6 and "visual_genome_qa" not in beaten  # with VG QA they are seven


@pytest.mark.parametrize("group", ["G1", "G2", "G3", "G4"])
def test_row_1_of_table_6_is_row_4_of_table_2(group: str) -> None:
    tasks = [row.name for row in TASKS if row.group == group]
    assert statistics.mean(scores("4")[name] for name in tasks) == pytest.approx(
        paper_table("table6").number("1", group), abs=TRUNCATED
    )


@pytest.mark.parametrize(
    ("row", "follows"),
    [("1", True), ("2", True), ("3", True), ("4", 68.43), ("5", 67.98), ("6", 67.25), ("7", True)],
)
def test_averages_of_table_6_follow_from_its_groups_but_for_three(row: str, follows: bool | float) -> None:
    """The note of the table says which three, and that those of rows 5 and 6 look exchanged."""
    table = paper_table("table6")
    sizes = {group: sum(task.group == group for task in TASKS) for group in ("G1", "G2", "G3", "G4")}
    weighted = sum(size * (table.number(row, group) or 0) for group, size in sizes.items()) / 12
    printed = table.number(row, "average")
    expected = printed if follows is True else follows
    assert weighted == pytest.approx(expected, abs=2 * TRUNCATED)  # means of means that are cut themselves
    if follows is not True:
        assert abs(weighted - (printed or 0)) > 4 * TRUNCATED
        assert f"{follows:.2f}" in table.note


def test_table_1_has_the_blocks_of_the_text() -> None:
    """Twelve blocks of twelve in the paper's text: its columns."""
    text = reference("paper/12-in-1.txt").read_text(encoding="utf-8")
    start = text.index("% Row-Task Test Images")
    found = [int(value) for value in re.findall(r"^(\d+)%$", text[start : text.index("Table 1:", start)], re.MULTILINE)]
    table = paper_table("table1")
    assert len(found) == 144
    typed = [row.values[column] for column in range(12) for row in table.rows.values()]
    # the paper's rows end with SNLI-VE and NLVR2, in this order, as ours do
    assert typed == found


@pytest.mark.parametrize("name", ["table2", "table3", "table4", "table5", "table6"])
def test_every_typed_number_stands_in_the_paper(name: str) -> None:
    text = reference("paper/12-in-1.txt").read_text(encoding="utf-8")
    for label, row in paper_table(name).rows.items():
        for value in row.values:
            if isinstance(value, (int, float)):
                assert re.search(rf"(?<![\d.]){re.escape(f'{value:.2f}')}(?!\d)", text) or value == int(value), (
                    label,
                    value,
                )


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="table7.*there are.*table2"):
        paper_table("table7")
    (tmp_path / "bad.yaml").write_text(
        "title: t\nsource: s\nnote: n\ncolumns: [a, b]\nrows: {x: {label: x, values: [1]}}\n"
    )
    with pytest.raises(BadInput, match="row x has 1 values for 2 columns"):
        paper_table("bad", tmp_path)
