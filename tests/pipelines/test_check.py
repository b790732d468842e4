from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipelines.check import check, main
from pipelines.datasets import load_task
from pipelines.errors import BadInput
from pipelines.loader import validation_batches
from pipelines.packing import pack
from pipelines.runs import read_run
from pipelines.sheet import load_sheet
from pipelines.wordpiece import WordPiece
from tests.pipelines import small
from tests.reference import ROOT

HEADS = {
    "soft_labels": "vil_prediction",
    "options": "vil_logit",
    "regions": "vision_logit",
    "choices": "vision_logit",
    "classes": "vil_binary_prediction",
}


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    return small.build(tmp_path)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = {
        name: {
            "number": spec.number,
            "head": HEADS[spec.target],
            "reader": spec.reader,
            "images": spec.images,
            "max_tokens": spec.max_tokens,
            "max_regions": spec.max_regions,
            "loss": spec.target,
        }
        for name, spec in small.SPECS.items()
    }
    heads = {head: {"kind": "any"} for head in HEADS.values()} | {"vil_logit": {"kind": "match", "options": 4}}
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump({"heads": heads, "tasks": rows}))
    return path


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))


def test_the_table_row_becomes_the_spec(sheet: Path, table: Path) -> None:
    assert {spec.name: spec for spec in read_run(sheet, table).specs} == small.SPECS


def test_counts(sheet: Path, table: Path) -> None:
    reports, problems = check(read_run(sheet, table), sheet)
    assert not problems
    assert len(reports) == 2 * len(small.SPECS)
    row = next(report for report in reports if (report.task, report.split) == ("answers", "train"))
    examples = small.EXAMPLES["answers"]
    lengths = np.array([2 + len(example.text.split()) for example in examples])
    assert row.records == 40
    assert row.images == len({example.images[0] for example in examples})
    assert row.missing == 0
    assert row.tokens[3] == lengths.max()
    assert abs(row.tokens[0] - np.median(lengths)) <= 1
    assert row.cut == pytest.approx((lengths > 9).mean())
    assert row.cut > 0
    assert row.regions[3] == 8, "max_regions"
    known = [set(small.target("answers", index).answers) & set(small.ANSWERS) for index in range(40)]
    assert row.answerable == pytest.approx(np.mean([bool(answers) for answers in known]))
    assert next(report for report in reports if report.task == "pairs").answerable is None


def test_reachable_regions(sheet: Path, table: Path) -> None:
    reports, _ = check(read_run(sheet, table, ["phrases"]), sheet)
    data = small.load(sheet, "phrases", "val")
    target: Any = pack(data, np.arange(40), epoch=0, seed=0, training=False, task_token=None).target
    best = [float(scores.max()) for scores in target.scores.split(target.cu_regions.diff().tolist())]
    assert reports[1].answerable == pytest.approx(np.mean([score > 0.5 for score in best]))
    assert 0.1 < np.mean(np.array(best) > 0.5) < 0.99


def test_a_good_sheet_exits_0_with_a_table(sheet: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sheet), "--tasks-table", str(table)]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in small.SPECS)
    assert "50/90/99/max" in output


def test_every_problem_is_one_line(sheet: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.EXAMPLES["pairs"][3] = dataclasses.replace(small.EXAMPLES["pairs"][3], images=("1", "nowhere"))
    small.EXAMPLES["answers"][1] = dataclasses.replace(small.EXAMPLES["answers"][1], id="answers-0")
    edit(sheet, lambda c: c["sets"]["phrases"].update(features="gone.lmdb"))
    edit(sheet, lambda c: c["sets"]["captions"]["val"].update(exampels="x"))
    assert main([str(sheet), "--tasks-table", str(table)]) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    for message in (
        r"sets\.pairs\.train: 1 images have no features .* 'nowhere' \(1 examples\)",
        r"sets\.pairs\.val: 1 images",
        r"sets\.answers\.train: 1 example ids occur more than once",
        r"sets\.phrases\.features: no such file",
        r"sets\.captions\.val\.exampels: the reader has no such",
    ):
        assert sum(bool(re.search(message, line)) for line in lines) == 1, message
    assert "pointing" in printed.out, "what is good is still shown"


def test_damaged_records_are_found(sheet: Path, table: Path) -> None:
    path = next((sheet.parent / "detected.lmdb").glob("data.mdb"))
    content = bytearray(path.read_bytes())
    needle = small.load(sheet, "answers").store.record("5").features[0].tobytes()
    content[content.find(needle) + 1] ^= 1
    path.write_bytes(content)
    _, problems = check(read_run(sheet, table), sheet)
    assert ["image 5: damaged record" in str(problem) for problem in problems] == [True]
    assert not check(read_run(sheet, table, ["answers"]), sheet, records=False)[1]


def test_a_run_names_sheet_tasks_lengths_and_model(sheet: Path, table: Path, tmp_path: Path) -> None:
    base, run = tmp_path / "base.yaml", tmp_path / "run.yaml"
    base.write_text(
        yaml.safe_dump({"data": str(sheet), "model": {"v_feature_size": 16, "vocab_size": 10}, "tasks": ["answers"]})
    )
    run.write_text(
        yaml.safe_dump(
            {
                "extends": "base.yaml",
                "tasks": ["phrases"],
                "model": {"vocab_size": 12},
                "task_overrides": {"phrases": {"max_tokens": 5, "lr": 1}},
            }
        )
    )
    data = read_run(run, table)
    assert (data.sheet, data.vocab_size, data.feature_size) == (sheet, 12, 16)
    assert [(spec.name, spec.max_tokens) for spec in data.specs] == [("phrases", 5)]
    _, problems = check(data, sheet)
    assert [str(problem).partition(": ")[2] for problem in problems] == [
        "15 word pieces for a model of 12 (raise the model's vocab_size or take its own vocabulary)",
        "features of 8 values for a model of 16 (set the model's v_feature_size)",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tasks: [nothing]", "no task 'nothing' in the task table"),
        ("tasks: nothing", "tasks: a list is wanted here"),
        ("model: giant", "model: no model preset or file giant"),
        ("extends: run.yaml", "this file extends itself"),
        ("- 1", "a mapping is wanted here"),
    ],
)
def test_bad_runs_are_refused(tmp_path: Path, table: Path, content: str, message: str) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(content)
    with pytest.raises(BadInput, match=message):
        read_run(run, table)


def test_the_command_prints_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.check", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'none.yaml'}: no such file (check the path)\n"


def test_the_embedded_world_passes_and_every_task_of_it_packs(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    world = {"path": str(tmp_path / "world"), "seed": 3, "size": "small"}
    run.write_text(yaml.safe_dump({"data": "world", "world": world, "model": "tiny"}))
    assert main([str(run)]) == 0
    specs = read_run(run).specs
    assert len(specs) == 12
    sheet = load_sheet(tmp_path / "world" / "sheet.yaml")
    tokenizer = WordPiece.load(sheet.vocabulary)
    for spec in specs:
        for split in sheet.entry(spec.name).splits():
            data = load_task(spec, sheet, split, tokenizer)
            first, *_ = validation_batches(data, 16, seed=0, task_token=spec.number)
            assert first.examples == 16
            assert first.target is not None


def test_every_published_task_has_a_row_and_a_set() -> None:
    published = yaml.safe_load((ROOT / "configs/data/published.yaml").read_text())
    specs = {spec.name: spec for spec in read_run(ROOT / "configs/data/published.yaml").specs}
    assert set(published["sets"]) == set(specs)
    assert len(specs) == 14
