"""The catalogue of experiments: every row of the paper has one, and every configuration that it makes can be loaded."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest

from engine.config import load, load_tasks
from engine.experiments import listing
from engine.experiments.paper import paper_table
from engine.experiments.parameters import counted
from engine.experiments.series import Series
from engine.experiments.systems import FOLDER, load_catalogue
from engine.tasks import CONFIGS
from pipelines.errors import BadInput

CATALOGUE = load_catalogue()
MODELS = list(CATALOGUE.models)


def series(
    model: str = "tiny", seeds: tuple[int, ...] = (0, 1), output: Path = Path("nowhere"), **more: object
) -> Series:
    return Series(CATALOGUE, model, CATALOGUE.model(model).base, 400, seeds, output, **more)  # type: ignore[arg-type]


def settings(series: Series, name: str) -> dict[str, str]:
    jobs = {job.name: job for job in series.jobs([series.entries[name.rpartition("-seed")[0]].system])}
    return dict(key.split("=", 1) for key in series.configuration(jobs[name], assumed=True)[1])


@pytest.mark.parametrize("table", ["table2", "table3", "table5", "table6"])
def test_every_row_of_the_paper_is_listed_with_an_experiment(table: str) -> None:
    lines = {line.row: line for line in listing.lines(series()) if line.table == table}
    assert list(lines) == list(paper_table(table).rows)
    for row, line in lines.items():
        if row in ("OmniNet", "HDC"):  # other people's systems
            assert line.status == "printed, not ours"
            continue
        assert line.status == "not run" and line.runs > 0
        assert line.experiments == CATALOGUE.experiments[table].rows[row]
        assert all(CATALOGUE.chosen(name).systems == (name,) for name in line.experiments)


@pytest.mark.parametrize(
    ("system", "runs"),
    [("single-task", 12), ("single-task-full", 12), ("group-tasks", 4), ("all-tasks", 1), ("finetune-gt", 12),
     ("finetune-at", 12), ("finetune-gt-full", 12), ("finetune-at-full", 12), ("pairs", 6), ("triples", 4), ("gaps", 3),
     ("hdc", 1), ("curriculum", 1)],
)  # fmt: skip
def test_systems_have_the_runs_of_the_paper(system: str, runs: int) -> None:
    assert len(series().of(system)) == runs


def test_every_task_is_trained_once_by_each_system_of_table_2() -> None:
    names = [row.name for row in series().rows]
    for systems in CATALOGUE.experiments["table2"].rows.values():
        trained = [task for entry in series().of(systems[0]) for task in entry.tasks]
        expected = names[:-2] if systems[0] == "all-tasks-without-g4" else names
        assert sorted(trained) == sorted(expected)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("single-task-full-gqa-seed1", {"tasks": "[gqa]", "seed": "1", "unclean_data": "allow", "stopgo.enabled": "false"}),
        ("single-task-gqa-seed0", {"unclean_data": "refuse", "warmup.longest_task_iterations": "400"}),
        ("finetune-gt-nlvr2-seed1", {"tasks": "[nlvr2]", "initial_weights": "nowhere/runs/group-tasks-G4-seed1"}),
        ("finetune-at-full-vqa-seed0", {"unclean_data": "allow", "initial_weights": "nowhere/runs/all-tasks-seed0"}),
        ("pairs-visual7w.nlvr2-seed0", {"tasks": "[visual7w, nlvr2]", "max_iterations": "400"}),
        ("token-per-head-seed0", {"task_tokens": "head"}),
        ("curriculum-seed0", {"task_tokens": "none", "stopgo.enabled": "false", "curriculum.iterations": "50"}),
        ("gaps-16-seed0", {"stopgo.gap": "16"}),
    ],
)  # fmt: skip
def test_what_runs_override(run: str, expected: dict[str, str]) -> None:
    assert expected.items() <= settings(series(), run).items()


def test_runs_from_pretraining_begin_with_new_heads_and_wait_for_it() -> None:
    jobs = series("vilbert_6l_6c").jobs(["single-task"])
    assert jobs[0].name == "pretraining-seed0" and len(jobs) == 1 + 2 * 12
    assert all(job.after == ("pretraining-seed0",) for job in jobs[1:])
    found = settings(series("vilbert_6l_6c"), "single-task-vqa-seed1")
    assert found["initial_weights"] == "nowhere/runs/pretraining-seed0"
    assert found["max_iterations"] == "84700" and "vil_prediction_gqa" in found["fresh_weights"]
    ready = series("vilbert_6l_6c", weights="pretrained.bin")
    assert [job.after for job in ready.jobs(["all-tasks"])] == [(), ()]
    assert settings(ready, "all-tasks-seed0")["initial_weights"] == "pretrained.bin"


def test_seeds_come_one_after_the_other_and_every_run_after_what_it_needs() -> None:
    jobs = series().jobs(["finetune-at", "single-task"])
    assert [seed for seed, _ in groupby(job.seed for job in jobs)] == [0, 1]
    before: set[str] = set()
    for job in jobs:
        assert set(job.after) <= before
        before.add(job.name)
    assert jobs[0].name == "all-tasks-seed0"  # its steps are the length of runs of one task


@pytest.mark.parametrize("model", MODELS)
def test_all_configurations_load(model: str) -> None:
    one = series(model, (0,))
    jobs = one.jobs(CATALOGUE.systems)
    assert {job.entry.system for job in jobs} == CATALOGUE.systems.keys() and len(jobs) == 100
    for job in jobs:
        path, overrides = one.configuration(job, assumed=True)
        config = load(path, overrides)
        assert config.name == job.name
        if job.entry.system != "pretraining":
            assert tuple(row.name for row in load_tasks(config)[1]) == job.entry.tasks


def test_parameters_are_those_that_the_paper_rounds() -> None:
    """At the published sizes of heads; the paper's 3B, 1B and 270M hold the pretraining heads too (14 million)."""
    found = counted(series("vilbert_6l_6c", overrides=(f"data={CONFIGS / 'data/published.yaml'}",)),
                    ["single-task", "group-tasks", "all-tasks", "all-tasks-without-g4"])  # fmt: skip
    assert {system: models for system, (_, models) in found.items()} == {
        "single-task": 12, "group-tasks": 4, "all-tasks": 1, "all-tasks-without-g4": 1,
    }  # fmt: skip
    whole, without = found["all-tasks"][0], found["all-tasks-without-g4"][0]
    assert 250e6 < whole < 270e6
    assert 4e6 < whole - without < 4.5e6  # the paper: 270M and 266M
    assert 2.7e9 < found["single-task"][0] < 3.1e9 and 0.9e9 < found["group-tasks"][0] < 1.05e9


def test_data_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "sheet.yaml").write_text("format: 1\nroot: .\nvocabulary: v.txt\nsets: {}\n")
    lines = listing.lines(series(overrides=(f"data={tmp_path / 'sheet.yaml'}",)))
    ours = next(line for line in lines if (line.table, line.row) == ("table5", "Ours"))
    assert ours.status == "needs data"
    assert ours.lacking == ("coco_retrieval", "flickr30k_grounding", "flickr30k_retrieval", "vqa")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("single-task: {title: x, each: tusk}", "each"),
        ("single-task: {title: x, starts_at: nobody}", "no system nobody"),
        ("single-task: {title: x, tuskes: []}", "unknown key; did you mean tasks"),
        ("single-task: {title: x, each: task, vary: {key: a, values: [1]}}", "vary goes with one run"),
    ],
)
def test_mistakes_in_the_catalogue_are_named(tmp_path: Path, change: str, named: str) -> None:
    for file in FOLDER.glob("*.yaml"):
        (tmp_path / file.name).write_text(file.read_text())
    text = (FOLDER / "systems.yaml").read_text()
    line = next(line for line in text.splitlines() if line.strip().startswith("single-task:"))
    (tmp_path / "systems.yaml").write_text(
        text.replace(line, f"  {change}").replace("*alone", "[stopgo.enabled=false]")
    )
    with pytest.raises(BadInput, match=named):
        load_catalogue(tmp_path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(BadInput, match="table7.*table2.*all-tasks"):
        CATALOGUE.chosen("table7")
