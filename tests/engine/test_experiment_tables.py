"""Tables and figures: every number against one computed by hand from made-up scores."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from engine import student
from engine.experiments import figures, tables
from engine.experiments.compare import comparisons
from engine.experiments.curves import curve
from engine.experiments.overlap import table1
from engine.experiments.paper import paper_table
from engine.experiments.results import Estimate, Results, Row, combine, difference, estimate, mean
from engine.experiments.series import Series
from engine.experiments.systems import load_catalogue
from engine.figures import save
from engine.journal import EVENTS_FILE, METRICS_FILE, read_rows
from pipelines.overlap_figure import percent
from tests.pipelines import small_world

CATALOGUE = load_catalogue()
T3 = 4.302653  # 97.5 % quantile of Student's t with 2 degrees of freedom
GAIN = {"single-task": 0.0, "all-tasks": 0.02, "finetune-at": 0.05, "without-dsg": 0.03, "token-per-head": -0.01}


def series(tmp_path: Path = Path("nowhere"), seeds: tuple[int, ...] = (0, 1, 2)) -> Series:
    return Series(CATALOGUE, "tiny", CATALOGUE.model("tiny").base, 450, seeds, tmp_path)


def row(system: str, part: str, seed: int, task: str, score: float) -> Row:
    return Row(f"{system}-seed{seed}", system, part, seed, task, 450, "val", "metric", score, None, None)


def score(system: str, task: str, seed: int, names: list[str]) -> float:
    """A seed moves all systems by as much, and the gain of one a little: pairs tell what means alone do not."""
    return 0.3 + 0.04 * names.index(task) + 0.05 * seed + GAIN[system] + 0.001 * seed * (system == "all-tasks")


def results(systems: tuple[str, ...] = tuple(GAIN), seeds: tuple[int, ...] = (0, 1, 2)) -> Results:
    one = series()
    names = [row.name for row in one.rows]
    rows = [
        row(system, entry.part, seed, task, score(system, task, seed, names))
        for system in systems for entry in one.of(system) for task in entry.tasks for seed in seeds
    ]  # fmt: skip
    return Results(tuple(rows))


def found(of: Results | None = None, tmp_path: Path = Path("nowhere")) -> tables.Found:
    counted = {"all-tasks": (863866, 1), "single-task": (2_855_143_035, 12)}
    return tables.Found(series(tmp_path), results() if of is None else of, counted)


@pytest.mark.parametrize(
    ("values", "half"),
    [
        ([0.1, 0.2, 0.3], T3 * 0.1 / math.sqrt(3)),
        ([1.0, 2.0], 12.7062 * math.sqrt(0.5) / math.sqrt(2)),
        ([5.0, 5.0, 5.0, 5.0], 0.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 2.776445 * math.sqrt(2.5) / math.sqrt(5)),
    ],
)  # fmt: skip
def test_intervals_are_those_of_student(values: list[float], half: float) -> None:
    assert student.interval(values) == pytest.approx(half, rel=1e-5, abs=1e-12)
    assert estimate(dict(enumerate(values)), 1.0) == Estimate(
        statistics.mean(values), student.interval(values), len(values)
    )


def test_one_value_has_no_interval() -> None:
    assert math.isnan(student.interval([1.0])) and estimate({}) is None
    assert str(Estimate(50.0, math.nan, 1)) == "50.0" and Estimate(2.0, 0.5, 3).signed() == "+2.0 ± 0.5"


def test_what_is_paired_has_the_seeds_of_both() -> None:
    assert difference({0: 0.5, 1: 0.7}, {1: 0.4, 2: 0.1}) == pytest.approx({1: 0.3})
    assert mean([{0: 1.0, 1: 3.0}, {0: 2.0, 1: 5.0}]) == {0: 1.5, 1: 4.0}
    assert combine(lambda: 0.0) == {}


def test_table_2_has_means_and_intervals_beside_the_paper() -> None:
    table = tables.table2(found())
    rows = {(row[0], row[3]): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert (
        len(rows) == 16
        and rows["4", "paper"]["VQAv2"] == 72.57
        and rows["4", "paper"]["parameters (models)"] == "270M (1)"
    )
    vqa = [100 * (0.32 + 0.051 * seed) for seed in range(3)]
    half = T3 * statistics.stdev(vqa) / math.sqrt(3)
    assert rows["4", "here"]["VQAv2"] == f"{statistics.mean(vqa):.1f} ± {half:.1f}" == "37.1 ± 12.7"
    average = [statistics.mean(100 * (0.32 + 0.04 * place + 0.051 * seed) for place in range(12)) for seed in range(3)]
    half = T3 * statistics.stdev(average) / math.sqrt(3)
    assert rows["4", "here"]["average"] == f"{statistics.mean(average):.1f} ± {half:.1f}"
    assert (
        rows["4", "here"]["parameters (models)"] == "0.9M (1)"
        and rows["2", "here"]["parameters (models)"] == "2.9B (12)"
    )
    assert set(list(rows["3", "here"].values())[4:]) == {None}  # not run
    assert "embedded world" in table.note and "validation" in table.note and "3 seeds" in table.note


def test_table_3_is_relative_to_single_task_and_averages_by_row_and_column() -> None:
    one = series()
    names = list(CATALOGUE.systems["pairs"].tasks)
    rows = [row("single-task", task, seed, task, 0.5) for task in names for seed in (0, 1)]
    for system in ("pairs", "triples"):
        for entry in one.of(system):
            # the row's task gains one per cent for each place of its partners, counted from 1
            for task in entry.tasks:
                gain = sum(names.index(other) + 1 for other in entry.tasks if other != task)
                rows += [row(system, entry.part, seed, task, 0.5 * (1 + gain / 100)) for seed in (0, 1)]
    table = tables.table3(found(Results(tuple(rows))))
    here = {str(row[0])[:2]: dict(zip(table.columns, row, strict=True)) for row in table.rows if row[1] == "here"}
    shown = "{:+.1f} ± 0.0".format
    assert here["G1"]["G1"] is None and here["G1"]["G2"] == shown(2) and here["G4"]["G1"] == shown(1)
    assert here["G1"]["G2 & G3"] == shown(5) and here["G3"]["G1 & G4"] == shown(5) and here["G1"]["G1 & G2"] is None
    assert here["G1"]["pairs"] == shown((2 + 3 + 4) / 3) and here["G4"]["triples"] == shown((3 + 4 + 5) / 3)
    assert here["Av"]["G3"] == shown(3) and here["Av"]["G2 & G4"] == shown(6) and here["Av"]["pairs"] is None


def test_table_6_has_means_of_groups() -> None:
    table = tables.table6(found())
    here = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows if row[2] == "here"}
    g2 = [100 * statistics.mean(0.32 + 0.04 * place + 0.051 * seed for place in (3, 4)) for seed in range(3)]
    assert here["1"]["G2"] == f"{statistics.mean(g2):.1f} ± {T3 * statistics.stdev(g2) / math.sqrt(3):.1f}"
    assert here["5"]["G2"] is None


def test_differences_are_paired_by_seed_and_told_in_words() -> None:
    """Every seed moves both systems by 5 points, so unpaired intervals would be 12 points wide."""
    all_over_single, tuned, _, dsg = comparisons(series(), results())
    gains = [2.0, 2.1, 2.2]
    assert all_over_single.average is not None
    assert all_over_single.average.mean == pytest.approx(2.1)
    assert all_over_single.average.half == pytest.approx(T3 * statistics.stdev(gains) / math.sqrt(3), rel=1e-5)
    assert all_over_single.paper == 2.05 and tuned.paper == 0.47 and dsg.paper == 0.56
    said = all_over_single.words()
    assert said.startswith("Here all-tasks is ahead of single-task by 2.1 ± 0.2 points on average (paper: +2.05); ")
    assert said.endswith("the paper's finding appears.")
    assert (
        "behind without-dsg by 0.9 ± 0.2 points" in dsg.words() and "the paper's finding does not appear" in dsg.words()
    )
    table = tables.differences(found())
    rows = {row[0]: row for row in table.rows}
    assert (
        rows["VQAv2"][1] == "+2.1 ± 0.2"
        and rows["average"][1] == "+2.1 ± 0.2"
        and rows["average in the paper"][1] == 2.05
    )
    assert said in table.note


@pytest.mark.parametrize(
    ("of", "words"),
    [
        (results(("all-tasks",)), "all-tasks against single-task: not run."),
        (results(seeds=(0,)), "one seed tells nothing of the spread"),
        (Results(tuple(row for row in results().rows if row.task != "gqa" or row.system != "all-tasks")), "not run"),
    ],
)
def test_what_cannot_be_compared_is_said(of: Results, words: str) -> None:
    assert words in comparisons(series(), of)[0].words()


def test_an_interval_that_holds_0_shows_nothing() -> None:
    rows = [
        row(system, "", seed, task.name, 0.5 + (0.01 * seed - 0.005) * (system == "all-tasks"))
        for system in ("all-tasks", "single-task") for task in series().rows for seed in range(3)
    ]  # fmt: skip
    assert "do not show a difference" in comparisons(series(), Results(tuple(rows)))[0].words()


@pytest.mark.parametrize("name", list(tables.TABLES))
@pytest.mark.parametrize("empty", [False, True])
def test_every_form_of_a_table_says_the_same(name: str, empty: bool, tmp_path: Path) -> None:
    table = tables.TABLES[name](found(Results(()) if empty else None))
    tables.write(table, name, tmp_path)
    plain = json.loads((tmp_path / f"{name}.json").read_text())
    assert plain.keys() == {"title", "note", "columns", "rows"}
    assert all(len(row) == len(plain["columns"]) for row in plain["rows"])
    assert all(cell is None or isinstance(cell, (str, int, float)) for row in plain["rows"] for cell in row)
    written = list(csv.reader(io.StringIO((tmp_path / f"{name}.csv").read_text())))
    assert written[0] == plain["columns"] and len(written) == 1 + len(plain["rows"])
    assert [["" if cell is None else str(cell) for cell in row] for row in plain["rows"]] == written[1:]
    lines = (tmp_path / f"{name}.md").read_text().splitlines()
    assert lines[0] == f"## {table.title}" and sum(line.startswith("|") for line in lines) == 2 + len(plain["rows"])


def test_figures_say_what_the_numbers_are(tmp_path: Path) -> None:
    """Those that need journals, Figures 2 left and 4, are drawn by `test_experiment_driver` and below."""
    made = found(tmp_path=tmp_path)
    for name in ("figure1", "table6"):
        drawn = figures.FIGURES[name](made)
        assert drawn is not None
        figure, title, caption = drawn
        save(figure, tmp_path / f"{name}.svg")
        figures.describe(tmp_path, name, title, caption)
        assert ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")
        texts = [text.get_text() for text in figure.texts]
        assert any("embedded world" in " ".join(text.split()) for text in texts)
        assert json.loads((tmp_path / f"{name}.json").read_text()) == {"title": title, "caption": caption}


def test_bars_of_figure_1_are_the_means() -> None:
    drawn = figures.figure1(found())
    assert drawn is not None
    bars = [bar for bar in drawn[0].axes[0].patches if isinstance(bar, Rectangle)]
    assert len(bars) == 3 * 13
    assert bars[0].get_height() == pytest.approx(100 * (0.3 + 0.05))  # VQA, single-task: the mean over three seeds
    assert bars[13].get_height() == pytest.approx(100 * (0.32 + 0.051))


def test_the_gap_is_normalised_over_gaps() -> None:
    """The paper's scale: four gaps have a quarter each."""
    rows = [
        row("all-tasks" if gap == 4 else "gaps", "" if gap == 4 else str(gap), seed, task.name, value)
        for gap, value in ((2, 0.4), (4, 0.6), (8, 0.6), (16, 0.4)) for task in series().rows for seed in (0, 1)
    ]  # fmt: skip
    drawn = figures.figure2_right(found(Results(tuple(rows))))
    assert drawn is not None
    lines = drawn[0].axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["G1", "G2", "G3", "G4", "all tasks"]
    for line in lines:
        assert np.array_equal(line.get_xdata(), [2, 4, 8, 16])
        assert np.allclose(np.asarray(line.get_ydata()), [0.2, 0.3, 0.3, 0.2])


def test_curves_are_the_journal_over_the_steps_of_the_task(undisturbed: Callable[[str], Path]) -> None:
    folder = undisturbed("float32")
    found = curve(folder, "phrases")
    rows = [row for row in read_rows(folder / METRICS_FILE) if row["task"] == "phrases"]
    assert [tuple(point) for point in zip(*found.training, strict=True)] == [
        (row["steps"], 100 * row["score"]) for row in rows
    ]
    at = {0: 0, **{row["iteration"]: row["steps"] for row in rows}}
    events = [
        row for row in read_rows(folder / EVENTS_FILE) if row["event"] == "validation" and row["task"] == "phrases"
    ]
    assert [score for _, score in zip(*found.validation, strict=True)] == [100 * row["score"] for row in events]
    known = [(place, at[row["iteration"]]) for place, row in enumerate(events) if row["iteration"] in at]
    assert known and all(found.validation[0][place] == steps for place, steps in known)
    assert np.all(np.diff(found.validation[0]) >= 0) and found.validation[0][-1] == rows[-1]["steps"]


def test_table_1_has_the_overlap_of_the_data_beside_the_paper(tmp_path: Path) -> None:
    sheet = small_world.world() / "sheet.yaml"
    table = table1(replace(series(tmp_path), overrides=(f"data={sheet}",)), tmp_path)
    names = list(paper_table("table1").columns)
    cells = {(names[y], names[x - 1]): str(row[x]) for y, row in enumerate(table.rows) for x in range(1, 13)}
    tests = {example.images[0] for example in small_world.examples("flickr30k_retrieval", "test")}
    shown = {image for split in ("train", "val") for e in small_world.examples("snli_ve", split) for image in e.images}
    assert cells["flickr30k_retrieval", "snli_ve"] == f"{percent(100 * len(tests & shown) / len(tests))} (98)"
    assert cells["visual7w", "visual_genome_qa"].endswith("(100)") and cells["nlvr2", "nlvr2"] == "0 (0)"
    assert (
        (tmp_path / "table1.svg").exists()
        and (tmp_path / "table1.png").exists()
        and (tmp_path / "table1.json").exists()
    )


def test_nothing_is_drawn_without_runs() -> None:
    assert [draw(found(Results(()))) for draw in figures.FIGURES.values()] == [None] * 4
